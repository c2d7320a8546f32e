"""Files that are written whole or not at all, also if the process is killed or the power fails."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a directory, is on disk.

    A write returns when the kernel has the bytes in memory.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes) -> None:
    """Write a file, or leave the previous one as it was; raises `OSError`.

    Killed before the rename, it leaves a `.tmp-` file next to it.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_bytes(data)
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)
