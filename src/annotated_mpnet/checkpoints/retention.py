"""The checkpoints of one directory: their order, which ones stay, and what is cleaned up.

A checkpoint of MPNet-base takes 1.3 GB, so most are deleted again while the run trains. Three rules
keep that safe:

- only checkpoints with this run's id are pruned;
- a damaged one is neither pruned nor counted: it must not take the place of a whole one;
- a name that is not exactly one of ours (`checkpoint_old.bak`, `best.txt`) is never looked at.

With `keep` = 2, after the checkpoint of update 500:

    checkpoint500        just saved       stays: newest
    checkpoint400        whole            stays: second
    checkpoint300        damaged          stays, not counted
    checkpoint200        whole            deleted
    checkpoint150        another run's    stays
    best_checkpoint      update 200       stays: it is a copy, without a number
    checkpoint_old.bak                    not ours

Pruning happens only after the new checkpoint is published and synced, so the disk needs room for
one more than `keep`. In the other order there would be a moment with one fewer: with `keep` = 1,
none.
"""

import os
import shutil
from collections.abc import Collection
from pathlib import Path

from annotated_mpnet.checkpoints.checkpoint import (
    BEST,
    NUMBERED,
    REPLACED,
    STATE,
    TEMPORARY,
    TrainState,
    owner,
)
from annotated_mpnet.checkpoints.records import decode_exactly
from annotated_mpnet.errors import CheckpointError


def is_checkpoint_name(name: str) -> bool:
    """Return whether a checkpoint can have this name.

    >>> [is_checkpoint_name(name) for name in ("checkpoint25", "best_checkpoint", "checkpoint_old")]
    [True, True, False]
    """
    return name == BEST or NUMBERED.fullmatch(name) is not None


def prune(directory: Path, keep: int, run_id: str, protected: Collection[str]) -> list[str]:
    """Delete all but the newest `keep` numbered checkpoints of a run; return warnings.

    Args:
        directory: the run's directory.
        keep: how many; -1 keeps all.
        run_id: the run.
        protected: names to keep in any case: the checkpoint that was just saved does not have the
            highest number if the run resumed from an older one.

    Returns:
        A line for each checkpoint that could not be deleted: no reason to end a run.
    """
    if keep < 0:
        return []
    # A link may lead to another run's directory, and deleting it would free nothing.
    own = [
        path
        for path in newest_first(directory)
        if path.name != BEST and not path.is_symlink() and owner(path) == run_id
    ]
    warnings = []
    for path in own[keep:]:
        if path.name in protected:
            continue
        try:
            # Renamed first: if the process is killed here, a .tmp- is left and not half a
            # checkpoint.
            doomed = directory / f"{TEMPORARY}{path.name}"
            os.rename(path, doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            warnings.append(f"{path} could not be deleted ({error.strerror}); it takes up space")
    return warnings


def recover(directory: Path) -> None:
    """Clean up after a killed process; the caller must hold the directory's lock."""
    # Killed between the two renames, the name is free and the old checkpoint gets it back.
    for path in directory.glob(f"{REPLACED}*"):
        name = path.name.removeprefix(REPLACED)
        if not is_checkpoint_name(name):
            continue
        if (directory / name).exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.rename(path, directory / name)
    # A .tmp- may be complete, but was never reported; a resume computes the same bytes again.
    for path in directory.glob(f"{TEMPORARY}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def newest_first(directory: Path) -> list[Path]:
    """Return the checkpoints of a directory, whole or not, by decreasing update.

    By number: "checkpoint9" comes after "checkpoint10" in the alphabet. At the same update a
    numbered one comes before `best_checkpoint`. A missing directory has none.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     for name in ("checkpoint9", "checkpoint100", "checkpoint10", "checkpoint_old.bak"):
    ...         (Path(folder) / name).mkdir()
    ...     print([path.name for path in newest_first(Path(folder))])
    ['checkpoint100', 'checkpoint10', 'checkpoint9']
    """
    found = []
    for path in directory.iterdir() if directory.is_dir() else ():
        if numbered := NUMBERED.fullmatch(path.name):
            found.append((int(numbered[1]), 1, path))
        elif path.name == BEST:
            found.append((_claimed_update(path), 0, path))
    return [path for _, _, path in sorted(found, reverse=True)]


def _claimed_update(best: Path) -> int:
    # Not verified: a wrong number only changes which checkpoint is tried first.
    try:
        return decode_exactly(best / STATE, TrainState).update
    except CheckpointError:
        return -1
