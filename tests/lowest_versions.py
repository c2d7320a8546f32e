"""Run the tests with the lowest versions that pyproject.toml allows, in their own environment.

    python3.11 tests/lowest_versions.py -- tests/conversion tests/data

The arguments after the two dashes go to pytest; without any, the whole suite runs. The environment
has the Python that this script was started with. uv installs: in ten minutes, pip did not find
versions of the other packages that fit to these. On Linux, PyTorch comes with CUDA: 7 GB of disk.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def bounds(pyproject: Path) -> dict[str, str]:
    """Return the lower bound of each dependency, those of the extras too.

    >>> bounds(ROOT / "pyproject.toml")["filelock"]
    '4.0'
    """
    project = tomllib.loads(pyproject.read_text())["project"]
    extras = project["optional-dependencies"].values()
    lines = [line for lines in [project["dependencies"], *extras] for line in lines]
    found = [re.match(r"([\w-]+)(?:\[[\w,-]+\])?>=([\w.]+)", line) for line in lines]
    return {match[1]: match[2] for match in found if match}


def main() -> int:
    """Install, print what was installed, run pytest, and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--environment", type=Path, help="make it here, and keep it")
    parser.add_argument("pytest", nargs="*", help="arguments of pytest, after --")
    options = parser.parse_args()
    lowest = bounds(ROOT / "pyproject.toml")
    with tempfile.TemporaryDirectory() as temporary:
        environment = (options.environment or Path(temporary) / "environment").absolute()
        constraints = Path(temporary) / "lowest.txt"
        constraints.write_text("".join(f"{name}=={lowest[name]}\n" for name in lowest))
        python = environment / "bin" / "python"
        uv = [python, "-m", "uv", "pip"]
        wanted = ["--constraint", constraints, "--editable", f"{ROOT}[dev]"]
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "uv"], check=True)
        subprocess.run([*uv, "install", "--quiet", "--python", python, *wanted], check=True)
        listed = [*uv, "list", "--quiet", "--format", "json", "--python", python]
        packages = json.loads(subprocess.run(listed, check=True, capture_output=True).stdout)
        installed = {each["name"]: each["version"] for each in packages}
        said = [f"{name} {installed[name]}" for name in lowest if name in installed]
        print(", ".join([f"Python {sys.version.split()[0]}", *said]), flush=True)
        code = subprocess.run([python, "-m", "pytest", *options.pytest], cwd=ROOT).returncode
    print("passed with these versions" if code == 0 else f"pytest ended with exit code {code}")
    return code


if __name__ == "__main__":
    sys.exit(main())
