"""The checkpoints of one directory: their order, which ones stay, and what is swept away.

A clean-up that deletes too much is worse than none. So three rules: only what carries this run's id
is pruned; what is damaged is neither pruned nor counted, since it must not take the place of a
whole one; and a name that is not exactly one of ours (`checkpoint_old.bak`, `best.txt`) is never
looked at.

HF: the Trainer prunes by name alone, whoever wrote what has the name.

Next: `run_directory.py`.
"""

import os
import shutil
from collections.abc import Collection
from pathlib import Path

from annotated_mpnet.errors import CheckpointError
from annotated_mpnet.training.checkpoint import (
    BEST,
    NUMBERED,
    REPLACED,
    STATE,
    TEMPORARY,
    owner,
    read_state,
)


def is_checkpoint_name(name: str) -> bool:
    """Tell whether a name is one that a checkpoint gets.

    >>> [is_checkpoint_name(name) for name in ("checkpoint25", "best_checkpoint", "checkpoint_old")]
    [True, True, False]
    """
    return name == BEST or NUMBERED.fullmatch(name) is not None


def prune(directory: Path, keep: int, run_id: str, protected: Collection[str]) -> list[str]:
    """Delete all but the newest `keep` numbered checkpoints of a run; return warnings.

    A checkpoint is deleted only if its manifest says that this run wrote it. What is damaged is
    neither deleted nor counted: it must not take the place of a whole one.

    Args:
        directory: the run's directory.
        keep: how many; -1 keeps all, 0 none.
        run_id: whose checkpoints.
        protected: names that stay whatever their number: the checkpoint that was just saved, which
            need not have the highest number in a run that was resumed from an older one.
    """
    if keep < 0:
        return []
    numbered = [path for path in newest_first(directory) if path.name != BEST]
    own = [path for path in numbered if not path.is_symlink() and owner(path) == run_id]
    warnings = []
    for path in own[keep:]:
        if path.name in protected:
            continue
        try:
            # Renamed first: killed while it deletes, this leaves a .tmp-, not half a checkpoint.
            doomed = directory / f"{TEMPORARY}{path.name}"
            os.rename(path, doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            warnings.append(f"{path} could not be deleted ({error.strerror}); it takes up space")
    return warnings


def recover(directory: Path) -> None:
    """Clear away what a killed process left: half-written checkpoints, half-done replacements.

    Only for whoever holds the directory's lock: it would delete what another process is writing.
    """
    for path in directory.glob(f"{REPLACED}*"):
        name = path.name.removeprefix(REPLACED)
        if not is_checkpoint_name(name):
            continue
        if (directory / name).exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.rename(path, directory / name)
    for path in directory.glob(f"{TEMPORARY}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def newest_first(directory: Path) -> list[Path]:
    """Return the checkpoints of a directory, whole or not, by falling update."""
    found = []
    for path in directory.iterdir():
        numbered = NUMBERED.fullmatch(path.name)
        if numbered is not None:
            found.append((int(numbered[1]), 1, path))
        elif path.name == BEST:
            found.append((_claimed_update(path), 0, path))
    return [path for _, _, path in sorted(found, reverse=True)]


def _claimed_update(best: Path) -> int:
    # Not verified yet, and it need not be: a wrong number changes only which is tried first.
    try:
        return read_state(best / STATE).update
    except CheckpointError:
        return -1
