"""Memory that is kept: a CPU spends part of a training step on asking for it.

A layer's forward pass asks for dozens of tensors of 6 to 30 MB, and gives them back a moment later.
Large pieces, glibc's `malloc` takes from the system one by one, and returns each when it is freed;
and of the heap, from which smaller ones come, it returns the end as soon as that is free. The
system hands out memory in pages of 4 kB, each of which it fills with zeros when it is first
touched. A tensor of the inner rows of a feed-forward part has

>>> 4 * 664 * 3072 * 4 // 4096     # 4 samples of MPNet-base, 664 rows each, in float32
7968

of them, and to touch them takes as long as to write them twice. The same pieces come and go in each
step. So the cure is to keep them: up to the size for which glibc allows it, they come from the
heap, and the heap never shrinks. The numbers of a run do not change (`docs/performance.md` has
times and memory).

GPUs have the same problem, much larger, and PyTorch's caching allocator does the same against it.
On a CPU, PyTorch relies on `malloc`; other implementations (jemalloc, tcmalloc) keep memory by
themselves, if somebody has put one in place of glibc's: then this asks nobody and changes nothing.

Next: `trainer.py`.
"""

import ctypes
import sys

# The numbers of `mallopt`, from glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3

LARGEST_IN_HEAP = 32 * 2**20
"""Bytes of the largest piece that may come from the heap: glibc accepts no more."""

NEVER = 2**31 - 1
"""Free bytes at the end of the heap above which it is returned: as many as an int can say."""


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
    settings = ((M_MMAP_THRESHOLD, LARGEST_IN_HEAP), (M_TRIM_THRESHOLD, NEVER))
    answers = [mallopt(number, value) for number, value in settings]
    return all(answer == 1 for answer in answers)
