"""Run a benchmark as its user does, in a shape that takes no time, and read the JSON it writes."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# Scripts import each other by name. At the end of the path: at its beginning, `profile.py` would
# hide Python's module of that name.
sys.path.append(str(BENCHMARKS))
# Two threads that wait for each other are slow on a machine that has other work.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}

TINY = ["--shape", "demo", "--layers", "2", "--width", "32", "--length", "32", "--batch", "2"]

HEAD = {"benchmark", "convention", "machine", "versions", "settings", "results"}
VERSIONS = {"python", "torch", "transformers", "annotated-mpnet", "commit"}


def run_script(name: str, flags: list[str], directory: Path) -> tuple[Any, str]:
    """Run in a process of its own, and return the results in the JSON file, and the terminal."""
    file = directory / "result.json"
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / name), *flags, "--json", str(file)],
        env=ENVIRONMENT, cwd=directory, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return results_of(file), checked(done.stdout)


def run_main(
    main: Callable[[], None], flags: list[str], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """Run a script's `main` in this process, and return the results in its JSON file."""
    file = directory / "result.json"
    script = BENCHMARKS / f"{main.__module__}.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--json", str(file), *flags])
    main()
    return results_of(file)


def in_this_process(main: Callable[[], None]) -> Callable[..., SimpleNamespace]:
    """Return what can stand in for `subprocess.run` where a script starts itself once more.

    The same flags are parsed, and the same answer is printed, but nothing is imported anew.
    """

    def run(command: list[str], **_: object) -> SimpleNamespace:
        before, sys.argv = sys.argv, command[1:]
        said = io.StringIO()
        try:
            with redirect_stdout(said):
                main()
        finally:
            sys.argv = before
        return SimpleNamespace(stdout=said.getvalue())

    return run


def results_of(file: Path) -> Any:
    """Return the results of a JSON file that has the head of all of them."""
    report = json.loads(file.read_text())
    assert set(report) == HEAD
    assert set(report["versions"]) == VERSIONS
    assert {"device", "cores", "threads"} <= set(report["machine"])
    return report["results"]


def checked(printed: str) -> str:
    """Return what was printed, if it fits on a terminal of 100 columns."""
    assert max(len(line) for line in printed.splitlines()) <= 100, printed
    return printed
