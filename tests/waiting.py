"""Wait for events, never for the clock: other jobs can make any machine slow."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from processes import Command

HUNG = 600
"""Seconds after which a process or a thread counts as hung. No test depends on how fast anything
happens: this only ends a wait that would never end."""


def wait_for(condition: Callable[[], bool], *processes: subprocess.Popen[Any] | Command) -> None:
    """Wait until a condition holds, and fail if a process ends before that.

    Args:
        condition: called again and again.
        processes: the processes that should fulfil it. If the wait fails, they are stopped and
            their output is shown.
    """
    deadline = time.monotonic() + HUNG
    while True:
        # In this order, because a process may end right after fulfilling the condition.
        ended = any(process.poll() is not None for process in processes)
        if condition():
            return
        if ended or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    for process in processes:
        process.terminate()
    try:
        said = [process.communicate(timeout=HUNG) for process in processes]
    finally:
        for process in processes:
            process.kill()
    pytest.fail(f"the condition did not come true; the processes printed {said}")


def holds(path: Path, text: str) -> Callable[[], bool]:
    """Return the condition that a file exists and contains a text."""
    return lambda: path.exists() and text in path.read_text()
