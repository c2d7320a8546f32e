"""Stub."""
import os
from pathlib import Path


def sync(path: Path) -> None:
    """Sync."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes) -> None:
    """Write."""
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_bytes(data)
    sync(temporary)
    os.rename(temporary, path)
    sync(path.parent)
