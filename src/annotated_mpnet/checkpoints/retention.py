"""The checkpoints of one directory: their order, which ones stay, and what is swept away.

A checkpoint of MPNet-base takes 1.3 GB, three times the network: AdamW keeps two more numbers for
each weight. So most of them have to go again, and this is the only place where anything of a run's
goes while it trains. A clean-up that deletes too much is worse than none. So three rules:

- only what carries this run's id is pruned;
- what is damaged is neither pruned nor counted, since it must not take the place of a whole one;
- a name that is not exactly one of ours (`checkpoint_old.bak`, `best.txt`) is never looked at.

With `keep` = 2, after the checkpoint of update 500 is on the disk:

    checkpoint500        just saved       stays: newest
    checkpoint400        whole            stays: second
    checkpoint300        damaged          stays, and counts for nothing
    checkpoint200        whole            goes
    checkpoint150        another run's    stays
    best_checkpoint      update 200       stays: it is a copy, and has no number
    checkpoint_old.bak                    is none of ours

*When* is part of it: after the new one is published and synced, never before. Between the two there
is one more on the disk than was asked for, and that room must be there; the other way round there
would be a moment with one fewer, and with `keep` = 1 with none.

HF: the Trainer prunes by name alone, whoever wrote what has the name.

Next: `checkpoints/run_directory.py`.
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
    owner,
    read_state,
)
from annotated_mpnet.errors import CheckpointError


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

    Returns:
        What could not be deleted and why, a line each. No error: the run can go on, and the disk
        will say so when it is full.
    """
    if keep < 0:
        return []
    numbered = [path for path in newest_first(directory) if path.name != BEST]
    # A link may lead to another run's directory; deleting it would not free a byte.
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
    # First what was being replaced. Killed between the two renames, the name is free and the former
    # checkpoint gets it back; killed after them, it is the former one's end that is still to come.
    for path in directory.glob(f"{REPLACED}*"):
        name = path.name.removeprefix(REPLACED)
        if not is_checkpoint_name(name):
            continue
        if (directory / name).exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.rename(path, directory / name)
    # Then what never got its name. It may be complete: but nobody was told of it, and a resume that
    # trains those updates again arrives at the same bytes.
    for path in directory.glob(f"{TEMPORARY}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def newest_first(directory: Path) -> list[Path]:
    """Return the checkpoints of a directory, whole or not, by falling update.

    By number, not by name, since "checkpoint9" comes after "checkpoint10" in the alphabet. At the
    same update a numbered one comes before `best_checkpoint`, which anything may replace.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     for name in ("checkpoint9", "checkpoint100", "checkpoint10", "checkpoint_old.bak"):
    ...         (Path(folder) / name).mkdir()
    ...     print([path.name for path in newest_first(Path(folder))])
    ['checkpoint100', 'checkpoint10', 'checkpoint9']

    A directory that is not there has none.
    """
    found = []
    for path in directory.iterdir() if directory.is_dir() else ():
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
