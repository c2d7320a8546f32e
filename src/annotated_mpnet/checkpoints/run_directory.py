"""A run's directory: what is in it, which run it belongs to, and who may write to it now.

    checkpoints/my_run/
        environment.json      the run's id, library versions, the machine: written first
        config.toml  metrics.jsonl  guesses.jsonl  log.txt  report.md  loss.png
        checkpoint2500/  best_checkpoint/       (`checkpoints/checkpoint.py`)
        hf/                   the export
        .lock                 locked by the process that trains; names it

*Two processes* must not write to it, as when a scheduler restarts a job that was only slow. The
lock is the kernel's (`filelock`), so it ends with its process, however that ends. The text in
`.lock` is only for the message.

*A second run* must not start over the first. What an aborted start leaves (a wrong path, an empty
corpus) is not a run: a run has checkpoints or metrics.

    what is there                neither flag    --resume            --overwrite
    ---------------------------  --------------  ------------------  --------------------
    nothing, or other files      a new run       no checkpoint (1)   a new run
    an aborted start             a new run       no checkpoint (1)   a new run
    a run                        refused         resumes             deleted, then a new run
    files of a run, but no id    refused         refused             refused

(1) an error as well, raised by `runs` with `nothing_to_resume`; this class starts a new run there.

--autoresume is one of these columns, chosen by `find_start`: --resume where a run has a checkpoint,
otherwise neither. A run that was killed before its first checkpoint is started anew ("restart"):
its metrics are all there is to lose, and come out the same again.

*A clean-up* must not delete too much. `--overwrite` deletes only the names above, and no checkpoint
with another run's id, which is random, written first, and in the manifest of each checkpoint.

**Order on entering**: check without writing; lock; check again, because another process may have
entered in between; clean up after a killed process; delete, if asked to; only then write. A refused
run leaves no trace, not even a lock file.

What is written by its name is never a link, a FIFO or a directory: in a shared directory, a link
`.lock` to another file would have that file emptied.
"""

import os
import platform
import socket
import uuid
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Self

import msgspec
import torch
from filelock import FileLock, Timeout

from annotated_mpnet.checkpoints.checkpoint import (
    CONFIG,
    EXPORT_FILES,
    MODEL,
    OPTIMIZER,
    STATE,
    STREAM,
    STREAM_TENSORS,
    TOKENIZER,
    owner,
)
from annotated_mpnet.checkpoints.manifest import MANIFEST, library_versions
from annotated_mpnet.checkpoints.retention import is_checkpoint_name, recover
from annotated_mpnet.errors import CheckpointError, WriteError, shown
from annotated_mpnet.files.atomic import REPLACED, TEMPORARY, remove, write_file
from annotated_mpnet.files.output import HUGGING_FACE_MODEL, Kind
from annotated_mpnet.files.records import decode, to_json

# `--overwrite` deletes these, so a new file of a run must be added here.
ENVIRONMENT = "environment.json"
LOCK = ".lock"
METRICS, GUESSES = "metrics.jsonl", "guesses.jsonl"
FILES = ("config.toml", "log.txt", METRICS, GUESSES, "report.md", "loss.png")
EXPORT = "hf"
CHECKPOINT = Kind(
    "a checkpoint",
    MANIFEST,
    f"{MODEL} {OPTIMIZER} {STATE} {CONFIG} {STREAM} {STREAM_TENSORS} {MANIFEST}",
    directories=f"{TOKENIZER} {EXPORT_FILES}",
)


class RunDirectory:
    """A run's directory, locked inside the `with` block."""

    def __init__(
        self, path: Path, resume: bool = False, overwrite: bool = False, restart: bool = False
    ) -> None:
        """Touch nothing yet. `restart` replaces a run that has no checkpoint, and only that."""
        self.path = path
        self.run_id = ""
        """32 hexadecimal digits, drawn when the run first starts and kept on resume."""
        self._resume = resume
        self._overwrite = overwrite
        self._restart = restart
        # Without a fallback: a lock that is only a file would outlive its process.
        self._lock = FileLock(path / LOCK, blocking=False, fallback_to_soft=False)

    def __enter__(self) -> Self:
        """Lock the directory and read or draw the run's id.

        Raises:
            WriteError: the path is a file, or cannot be written to.
            CheckpointError: refused by the table above, or in use. Nothing was changed.
        """
        try:
            self._enter()
        except BaseException as error:
            self._lock.release()
            if not isinstance(error, OSError):
                raise
            raise WriteError(
                f"--checkpoint-dir {self.path} cannot be written to ({error.strerror}); expected "
                "a directory that exists or can be made, with write permission"
            ) from error
        return self

    def __exit__(self, *error: object) -> None:
        """Release the lock. Its file stays: deleted, it could be locked by two processes."""
        with suppress(OSError), open(self.path / LOCK, "w", opener=_no_link):
            pass  # emptied, if the directory is still there
        self._lock.release()

    def write(self, name: str, text: str) -> None:
        """Write one of `FILES`, whole or not at all; raises `WriteError` for a full disk."""
        try:
            write_file(self.path / name, text.encode())
        except OSError as error:
            raise WriteError(
                f"{self.path / name} could not be written: {error.strerror}; make room or fix "
                "that, and continue with --resume"
            ) from error

    def _enter(self) -> None:
        _refuse_odd_files(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        # "In use" is the better message, but a refusal must not create the lock file.
        if (self.path / LOCK).exists() or self._is_admitted():
            try:
                self._lock.acquire()
            except Timeout as error:
                raise CheckpointError(
                    f"--checkpoint-dir {self.path} is in use by {_holder(self.path / LOCK)}; wait "
                    "for it, stop it, or choose another directory"
                ) from error
        if not self._is_admitted():
            raise _taken(self.path)
        # Only where a run has been: elsewhere, a `.tmp-` may be the user's.
        if (self.path / ENVIRONMENT).exists():
            recover(self.path)
        if (self._overwrite or self._restart) and holds_run(self.path):
            _delete_run(self.path)
        if self._resume and holds_run(self.path):
            self.run_id = _read_run_id(self.path)
            # Lost permissions must be noticed now, not with the first checkpoint.
            probe = self.path / f"{TEMPORARY}probe"
            probe.touch()
            probe.unlink()
        else:
            # Not from the seed: two runs of the same command are two runs.
            self.run_id = uuid.uuid4().hex
            write_file(self.path / ENVIRONMENT, to_json(_environment(self.run_id)).encode())
        holder = f"process {os.getpid()} on {socket.gethostname()}"
        with open(self.path / LOCK, "w", opener=_no_link) as file:
            file.write(holder)

    def _is_admitted(self) -> bool:
        if self._resume or self._overwrite:
            return True
        # Looked at again inside the lock: a process that was still ending may have saved.
        return not holds_run(self.path) or (self._restart and not _holds_results(self.path))


def refuse_taken_directory(directory: Path, resume: bool, overwrite: bool) -> None:
    """Refuse now, without writing, what `RunDirectory` would refuse after minutes of tokenizing."""
    nearest = directory.absolute()
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    if not nearest.is_dir():
        raise WriteError(
            f"--checkpoint-dir {directory} cannot be made: {nearest} is not a directory; choose "
            "another path"
        )
    _refuse_odd_files(directory)
    if not (resume or overwrite) and holds_run(directory):
        raise _taken(directory)
    if overwrite and not resume and holds_run(directory):
        _refuse_foreign(directory)


def _refuse_odd_files(directory: Path) -> None:
    for name in (*FILES, ENVIRONMENT, LOCK):
        path = directory / name
        if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
            kind = "a link" if path.is_symlink() else "not a regular file"
            raise CheckpointError(
                f"{path} is {kind}; a run writes a file of that name: move it away, or choose "
                "another --checkpoint-dir"
            )


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def nothing_to_resume(directory: Path) -> CheckpointError:
    """Return the error for `--resume` in a directory without a checkpoint."""
    # With metrics in it, a new run would be refused too.
    way_out = "with --overwrite instead" if holds_run(directory) else "without it"
    return CheckpointError(f"--resume finds no checkpoint in {directory}; start the run {way_out}")


def holds_run(directory: Path) -> bool:
    """Return whether there is a run in a directory, or what might be one."""
    named = _named(directory)
    if not (directory / ENVIRONMENT).exists():
        return bool(named)  # perhaps the user's own config.toml
    metrics = directory / METRICS
    has_metrics = metrics.exists() and metrics.stat().st_size > 0
    return has_metrics or any(path.name not in FILES for path in named)


def find_start(directory: Path) -> Literal["start", "restart", "resume"]:
    """Return what --autoresume means in a directory; it may not exist.

    Raises:
        CheckpointError: there are files of a run, but none that says which.
    """
    if not holds_run(directory):
        return "start"
    _read_run_id(directory)
    return "resume" if _holds_results(directory) else "restart"


def _holds_results(directory: Path) -> bool:
    """Return whether a run has more than its settings, its log and its metrics."""
    logs = ("config.toml", "log.txt", METRICS, GUESSES)
    return any(path.name not in logs for path in _named(directory))


def _named(directory: Path) -> list[Path]:
    """Return what has a name of a run's, except its id and its lock."""
    if not directory.is_dir():
        return []
    return [
        path
        for path in sorted(directory.iterdir())
        if path.name in (*FILES, EXPORT) or is_checkpoint_name(path.name.removeprefix(REPLACED))
    ]


def _holder(lock: Path) -> str:
    text = lock.read_text(encoding="utf-8", errors="replace").strip()
    return shown(text) if text else "another process"


def _taken(directory: Path) -> CheckpointError:
    return CheckpointError(
        f"--checkpoint-dir {directory} already holds a run; resume it with --resume, delete it "
        "with --overwrite, or choose another directory"
    )


def _delete_run(directory: Path) -> None:
    """Delete what the run in a directory wrote, if its id proves that one did."""
    if not (directory / ENVIRONMENT).exists():
        raise CheckpointError(
            f"--overwrite: {directory} has no {ENVIRONMENT}, so a run may not have written what "
            "is there; nothing was deleted: do it by hand, or choose another directory"
        )
    _refuse_foreign(directory)
    run_id = None
    with suppress(CheckpointError):  # damaged, but still a run's
        run_id = _read_run_id(directory)
    for path in _named(directory):
        # A damaged checkpoint, without an owner, is taken for this run's.
        if run_id is not None and owner(path) not in (run_id, None):
            continue
        # Checkpoints may have been moved to another disk, with a link in their place.
        remove(path)
    # Last: a deletion that was interrupted can be repeated only with an id.
    (directory / ENVIRONMENT).unlink()


def _refuse_foreign(directory: Path) -> None:
    """Refuse to delete directories of a run that hold files which no run has written."""
    for path in _named(directory):
        if path.is_symlink() or not path.is_dir():
            continue
        kind = HUGGING_FACE_MODEL if path.name == EXPORT else CHECKPOINT
        if foreign := kind.foreign_in(path):
            raise CheckpointError(
                f"--overwrite: {path} holds what no run writes: {', '.join(foreign[:3])}; nothing "
                "was deleted: move it away, or choose another --checkpoint-dir"
            )


class _RunId(msgspec.Struct):
    run_id: str


def _read_run_id(directory: Path) -> str:
    path = directory / ENVIRONMENT
    if not path.exists():
        raise CheckpointError(
            f"{directory} has files of a run, but no {ENVIRONMENT} that says which run; resume "
            "from one of its checkpoints with --resume-checkpoint in another --checkpoint-dir"
        )
    return decode(path, _RunId).run_id


def _environment(run_id: str) -> dict[str, object]:
    """Return the run's id and what it runs on. No environment variables: they hold secrets."""
    devices = range(torch.cuda.device_count())
    return {
        "run_id": run_id,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "libraries": library_versions(),
        "machine": {
            "system": platform.platform(),
            "processors": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "cuda_devices": [torch.cuda.get_device_name(index) for index in devices],
        },
    }
