"""The checkpoints of one directory: their order, which ones stay, and what is cleaned up.

A checkpoint of MPNet-base takes 1.3 GB, so most are deleted. With `keep` = 2, after update 500:

    checkpoint500        just saved       stays: newest
    checkpoint400        whole            stays: second
    checkpoint300        damaged          stays, not counted: it must not replace a whole one
    checkpoint200        whole            deleted
    checkpoint150        another run's    stays
    best_checkpoint      update 200       stays: it has no number
    checkpoint_old.bak                    not one of our names: not looked at

Pruning happens only after the new checkpoint is on disk, so there must be room for one more than
`keep`.
"""

import os
import shutil
from collections.abc import Collection
from pathlib import Path

from annotated_mpnet.checkpoints.checkpoint import (
    BEST,
    NUMBERED,
    STATE,
    owner,
    read_state,
)
from annotated_mpnet.errors import CheckpointError
from annotated_mpnet.files.atomic import REPLACED, TEMPORARY, remove


def is_checkpoint_name(name: str) -> bool:
    """Return whether a checkpoint can have this name; "checkpoint_old" is the user's."""
    return name == BEST or NUMBERED.fullmatch(name) is not None


def prune(directory: Path, keep: int, run_id: str, protected: Collection[str]) -> list[str]:
    """Delete all but the newest `keep` numbered checkpoints of a run; return warnings.

    -1 keeps all. `protected` is kept in any case: the checkpoint that was just saved does not have
    the highest number if the run resumed from an older one.
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
            # Renamed first: killed here, the process leaves a .tmp- and not half a checkpoint.
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
            remove(path, ignore_errors=True)
        else:
            os.rename(path, directory / name)
    # A .tmp- may be complete, but was never reported; a resume computes the same bytes again.
    for path in directory.glob(f"{TEMPORARY}*"):
        remove(path, ignore_errors=True)


def newest_first(directory: Path) -> list[Path]:
    """Return the checkpoints of a directory, whole or not, by decreasing update.

    By number: "checkpoint9" comes after "checkpoint10" in the alphabet. At the same update a
    numbered one comes before `best_checkpoint`. A missing directory has none.
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
        return read_state(best / STATE).update
    except CheckpointError:
        return -1
