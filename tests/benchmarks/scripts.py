"""Run a benchmark as its user does, in a shape that takes no time, and read the JSON it writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# One thread: two that wait for each other are slow on a machine that has other work.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}

TINY = ["--shape", "demo", "--layers", "2", "--width", "32", "--length", "32", "--batch", "2"]

HEAD = {"benchmark", "convention", "machine", "versions", "settings", "results"}
VERSIONS = {"python", "torch", "transformers", "annotated-mpnet", "commit"}


def run_script(name: str, flags: list[str], directory: Path) -> tuple[dict[str, object], str]:
    """Run in a process of its own, and return the results in the JSON file, and the terminal."""
    file = directory / "result.json"
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / name), *flags, "--json", str(file)],
        env=ENVIRONMENT, cwd=directory, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return results_of(file), checked(done.stdout)


def run_main(
    main: object, flags: list[str], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, object]:
    """Run a script's `main` in this process, and return the results in its JSON file."""
    file = directory / "result.json"
    monkeypatch.setattr(sys, "argv", ["benchmark", *flags, "--json", str(file)])
    assert callable(main)
    main()
    return results_of(file)


def results_of(file: Path) -> dict[str, object]:
    """Return the results of a JSON file that has the head of all of them."""
    report = json.loads(file.read_text())
    assert set(report) == HEAD
    assert set(report["versions"]) == VERSIONS
    assert {"device", "cores", "threads"} <= set(report["machine"])
    results = report["results"]
    assert isinstance(results, dict)
    return results


def checked(printed: str) -> str:
    """Return what was printed, if it fits on a terminal of 100 columns."""
    assert max(len(line) for line in printed.splitlines()) <= 100, printed
    return printed
