"""Processes that share the seconds in which libraries are imported.

A tiny run takes less than a second of a core, and its imports five. So a server imports them once
for all tests, and each process is forked from it. Where a test is about how a command starts, or
about what it imports, take `subprocess`.
"""

import atexit
import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from typing import Any
from unittest import mock

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "annotated_mpnet.runs.run",
        "matplotlib.figure",
        "matplotlib.backends.backend_agg",
        # What multiprocessing imports for each process, because it is how the tests were started.
        "pytest",
        "tomlkit",
        "transformers.models.mpnet.modeling_mpnet",
    ]
)


def forked(target: Callable[..., None], *arguments: Any) -> multiprocessing.process.BaseProcess:
    """Start a function of a module in a process of its own, with one thread."""
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
        forkserver.ensure_running()
    process = CONTEXT.Process(target=target, args=arguments)
    process.start()
    # Multiprocessing would wait for a process that a failed test has left.
    atexit.register(process.kill)
    return process


class Command:
    """`pretrain-mpnet` in a process of its own, as `subprocess.Popen` would start it."""

    def __init__(
        self, arguments: Sequence[str], variables: Mapping[str, str] | None = None, limit: int = 0
    ) -> None:
        """Start it; with `limit`, no file that it writes may become longer (bytes)."""
        self._said = [tempfile.NamedTemporaryFile("r") for _ in range(2)]  # noqa: SIM115
        names = [file.name for file in self._said]
        environment = {**os.environ, **(variables or {})}
        self._process = forked(_pretrain, list(arguments), environment, names, limit)

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        """Wait for the end, and return the exit code."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("pretrain-mpnet", timeout)
        return self._process.exitcode

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait for the end, and return standard output and standard error."""
        self.wait(timeout)
        said, complained = (file.read() for file in self._said)
        return said, complained

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            assert self._process.pid is not None
            os.kill(self._process.pid, number)

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()


def _pretrain(
    arguments: list[str], environment: dict[str, str], outputs: list[str], limit: int
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, name in enumerate(outputs, 1):
        os.dup2(os.open(name, os.O_WRONLY), descriptor)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.argv[1:] = arguments
    runpy.run_module("annotated_mpnet", run_name="__main__", alter_sys=True)
