"""Run a benchmark as its user does, in a tiny shape, and read its JSON file."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tiny_run import TinyText

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# The scripts import each other by name. Appended, because at the front of the path `profile.py`
# would hide Python's module of that name.
sys.path.append(str(BENCHMARKS))
# On a busy machine, two threads that wait for each other are slow.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}

# For the benchmarks of a training step, and for those that train with flags of `pretrain-mpnet`.
TINY = ["--shape", "demo", "--layers", "2", "--width", "32", "--length", "32", "--batch", "2"]
TINY_FLAGS = [
    *("--encoder-layers", "1", "--encoder-embed-dim", "16", "--encoder-ffn-dim", "32"),
    *("--encoder-attention-heads", "2", "--max-tokens", "32", "--batch-size", "4"),
]

FIELDS = {"benchmark", "convention", "machine", "versions", "settings", "results"}
VERSIONS = {"python", "torch", "transformers", "annotated-mpnet", "commit"}


def run_script(name: str, flags: list[str], directory: Path) -> tuple[Any, str]:
    """Run in a new process; return the results in the JSON file, and what was printed."""
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
    """Run a script's `main` in this process; return the results in its JSON file."""
    file = directory / "result.json"
    script = BENCHMARKS / f"{main.__module__}.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--json", str(file), *flags])
    main()
    return results_of(file)


def without_novels(script: ModuleType, text: TinyText, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a script a tiny text where it would unpack the demo's novels."""
    monkeypatch.setattr(script, "prepare", lambda *_: (text.train_dir, str(text.tokenizer)))


def in_this_process(main: Callable[[], None]) -> Callable[..., SimpleNamespace]:
    """Return a replacement for `subprocess.run`, for scripts that start themselves.

    It parses the same flags and returns the same output, but need not import everything again.
    """

    def run(command: list[str], **_: object) -> SimpleNamespace:
        before, sys.argv = sys.argv, command[1:]
        printed = io.StringIO()
        try:
            with redirect_stdout(printed):
                main()
        finally:
            sys.argv = before
        return SimpleNamespace(stdout=printed.getvalue())

    return run


def results_of(file: Path) -> Any:
    """Return the results of a JSON file, after checking its other fields."""
    report = json.loads(file.read_text())
    assert set(report) == FIELDS
    assert set(report["versions"]) == VERSIONS
    assert {"device", "cores", "threads"} <= set(report["machine"])
    return report["results"]


def checked(printed: str) -> str:
    """Return the output, after checking that it fits into 100 columns."""
    assert max(len(line) for line in printed.splitlines()) <= 100, printed
    return printed
