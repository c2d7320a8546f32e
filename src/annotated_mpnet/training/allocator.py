"""Memory that is kept: why a CPU spends a fifth of a training step on nothing.

A layer's forward pass asks for dozens of tensors of 6 to 50 MB, and gives them back a moment later.
glibc's `malloc` takes anything above 32 MB, and at first anything above 128 kB, from the system
directly, and returns it there when it is freed. The system hands out memory in pages of 4 kB, each
of which it fills with zeros when it is first touched:

>>> pages = 4 * 12 * 512 * 512 * 4 // 4096     # of one tensor of scores, in MPNet-base
>>> pages
12288

At a microsecond for each, that is longer than the product whose result goes there takes. The same
addresses come and go in each step, so that the cure is to keep them: ask the system once, and never
give back. The numbers of a run do not change, and its peak of memory grows by a few per cent, for
what lies between two tensors and fits neither (`docs/performance.md`).

GPUs have the same problem, much larger, and PyTorch's caching allocator does the same against it.
On a CPU, PyTorch relies on `malloc`; other implementations (jemalloc, tcmalloc) keep memory by
themselves, if somebody has put one in place of glibc's: then this asks nobody and changes nothing.

Next: `trainer.py`.
"""

import ctypes
import sys

# The numbers of `mallopt`, from glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4

KEPT = 2**31 - 1
"""Bytes at the end of the heap that may lie unused before they are returned: as many as an int can
say. Above that, a whole step's memory would have to be free at once, and at its very end."""

PORTION = 64 * 2**20
"""Bytes that the heap grows by: in few large steps rather than in many."""


def keep_memory() -> bool:
    """Tell glibc to keep the memory that this process frees; return whether there is a glibc.

    For a process that trains on a CPU; it holds for the rest of its life.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False  # musl, for one, has no such function
    # Nothing comes from the system directly; all comes from the heap, which does not shrink.
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, KEPT), (M_TOP_PAD, PORTION))
    answers = [mallopt(number, value) for number, value in settings]
    return all(answer == 1 for answer in answers)
