"""With glibc, freed memory is kept and reused; elsewhere nothing changes."""

import subprocess
import sys

import pytest

from annotated_mpnet.fast import allocator

# Allocates and frees 64 tensors of 6 MB, and counts page faults once memory can be reused.
PROGRAM = """
import resource, sys, torch
from annotated_mpnet.fast.allocator import keep_memory
if sys.argv[1] == "keep":
    assert keep_memory()
def step():
    kept = [torch.ones(1_500_000) for _ in range(64)]
for _ in range(2):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def has_glibc() -> bool:
    import platform

    return platform.libc_ver()[0] == "glibc"


@pytest.mark.skipif(not has_glibc(), reason="needs glibc")
def test_freed_memory_is_used_again() -> None:
    faults = {
        mode: int(
            subprocess.run(
                [sys.executable, "-c", PROGRAM, mode], check=True, capture_output=True, text=True
            ).stdout
        )
        for mode in ("keep", "leave")
    }
    assert faults["keep"] < faults["leave"] / 10


def test_other_systems_are_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert allocator.keep_memory() is False


def test_other_c_libraries_are_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
    assert allocator.keep_memory() is False
