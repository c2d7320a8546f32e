"""Files that are written whole or not at all, also if the process is killed or the power fails."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

TEMPORARY, REPLACED = ".tmp-", ".old-"
"""Before the name of what is being written, and of a directory that was replaced."""


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

    Only if it is killed before the rename, a `.tmp-` file stays next to it.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        temporary.write_bytes(data)
        sync(temporary)
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync(path.parent)


def write_if_changed(path: Path, data: bytes) -> None:
    """Leave a file alone that has the right bytes: another process may be reading it."""
    if not path.is_file() or path.read_bytes() != data:
        write_file(path, data)


def remove(path: Path, *, ignore_errors: bool = False) -> None:
    """Delete a file or a directory, or a link, but never what the link leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors)
    else:
        path.unlink(missing_ok=True)


def write_files(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write files by their path in a directory; they are not synced."""
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@contextmanager
def directory_of(files: Mapping[str, bytes]) -> Iterator[str]:
    """Yield a temporary directory that holds these files."""
    with tempfile.TemporaryDirectory() as directory:
        write_files(Path(directory), files)
        yield directory


def beside(target: Path) -> tuple[Path, Path]:
    """Return where `replacing` builds a directory, and where it puts the one that it replaces."""
    name, parent = target.name, target.parent
    return parent / f"{TEMPORARY}{name}", parent / f"{REPLACED}{name}"


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield an empty directory that takes the name of `target` at the end of the block.

    It is built in a sibling, because a rename is atomic only within a file system. After an error
    it is removed, with the parents that were made for it, and `target` is as it was. An older
    directory of that name steps aside first:

        killed while it                 target, if free   target, if taken   beside it
        -----------------------------   ---------------   ----------------   -------------------
        builds and syncs                nothing           the old one        .tmp-NAME
        is between the two renames      (only one)        nothing            .tmp-NAME, .old-NAME
        deletes what was replaced       (nothing to)      the new one        .old-NAME

    The next call removes what is left over. Raises `OSError`.
    """
    staging, previous = beside(target)
    made = [parent for parent in target.parents if not parent.exists()]
    remove(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        yield staging
        # Synced before the rename: after a power cut, a name without contents would look complete.
        for path in (*staging.rglob("*"), staging):
            sync(path)
        # A rename replaces an empty directory.
        if target.exists() and any(target.iterdir()):
            remove(previous, ignore_errors=True)
            os.rename(target, previous)
        elif target.exists() and target.samefile(os.curdir):
            # The shell that started us would be left in a directory that is deleted.
            for path in staging.iterdir():
                os.rename(path, target / path.name)
            staging.rmdir()
            return
        try:
            os.rename(staging, target)
        except OSError:
            if previous.exists():
                os.rename(previous, target)
            raise
        sync(target.parent)
    except BaseException:  # Ctrl-C too
        shutil.rmtree(staging, ignore_errors=True)
        with suppress(OSError):  # not empty: another process uses it
            for parent in made:
                parent.rmdir()
        raise
    remove(previous, ignore_errors=True)
