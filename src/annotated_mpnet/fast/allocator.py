"""Keep freed memory: a CPU spends part of every training step on asking for it again.

A forward pass allocates dozens of tensors of 6 to 30 MB and frees them a moment later. glibc's
`malloc` gets each of them from the system and returns it, and the system fills every page with
zeros when it is first touched, which takes as long as writing the tensor. Here the heap keeps them
instead. The numbers of a run do not change; `docs/performance.md` has times and memory.

A GPU needs none of this, because PyTorch's caching allocator does the same there. Where another
allocator (jemalloc, tcmalloc) replaces glibc's, this has no effect.
"""

import ctypes
import sys

# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3

LARGEST_IN_HEAP = 32 * 2**20
"""Bytes of the largest piece from the heap; glibc accepts no more."""

NEVER = 2**31 - 1
"""Free bytes at the end of the heap that are returned to the system: the largest int."""


def keep_memory() -> bool:
    """Tell glibc to keep what this process frees, for good; return whether there is a glibc."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False  # musl has no such function
    settings = ((M_MMAP_THRESHOLD, LARGEST_IN_HEAP), (M_TRIM_THRESHOLD, NEVER))
    answers = [mallopt(number, value) for number, value in settings]
    return all(answer == 1 for answer in answers)
