"""A run's directory: what lies in it, whose it is, and who may write to it now.

    checkpoints/my_run/
        environment.json      the run's id, library versions, the machine: written first
        config.toml  metrics.jsonl  log.txt  report.md  loss.png
        checkpoint2500/       (`checkpoints/checkpoint.py`)
        best_checkpoint/      the same, with the lowest validation loss so far
        hf/                   the export
        .lock                 held by the process that trains; names it

Everything that a run leaves behind is in there, and nothing else of a run's is anywhere, but for
the cache of packed text. So to move a run, to archive it or to be rid of it is to do that to a
directory. Only rank 0 has one (`runs/session.py`).

Three things go wrong with such a directory, and each of them can cost weeks of training:

*Two processes write to it.* A scheduler restarts a job that was only slow. The lock is an advisory
one (`flock`), which the kernel drops when its holder dies: there is no stale lock to delete by
hand. Its text, process and host, is only there for the message.

>>> from tempfile import TemporaryDirectory
>>> with TemporaryDirectory() as folder, RunDirectory(Path(folder)):
...     try:
...         RunDirectory(Path(folder)).__enter__()
...     except CheckpointError as error:
...         print(str(error).split("; ")[1])
wait for it, stop it, or choose another directory

*A second run starts over the first.* The directory holds a run if there are checkpoints or metrics
in it; then only `--resume` or `--overwrite` gets in. What an aborted start leaves (a wrong path, an
empty corpus) is no run and stands in nobody's way:

    what lies there              neither flag    --resume            --overwrite
    ---------------------------  --------------  ------------------  --------------------
    nothing, or files of others  a new run       no checkpoint       a new run
    an aborted start             a new run       no checkpoint       a new run
    a run                        refused         goes on             deleted, then a new run
    files of a run, but no id    refused         refused             refused

*No checkpoint* is an error too, but not of this class, for which a directory without a run is a new
one: `nothing_to_resume`. It is also what is said of a run that was killed before it saved anything;
its metrics are in the way of a new run, which then needs `--overwrite`. And without an id not even
`--overwrite` gets in: nothing proves whose files they are.

*A clean-up deletes too much.* `--overwrite` deletes the names in the list above and no others, and
no checkpoint that carries another run's id. The id is drawn once, and written before anything that
it stands for; a resume reads it, and each checkpoint carries it in its manifest.

**The order in which a run comes in**: look without touching; lock; look again, since another one
may have come in between; clear away what a killed process left; delete, if asked to; only then
write. A second run that is refused leaves no trace, not even a lock's file, so that a slip costs
nothing. And all of it happens before any text is tokenised or network built
(`refuse_taken_directory` looks even earlier): an error that comes after ten minutes is an error
that somebody else finds in the morning.

HF: the Trainer starts over an earlier run without a word. fairseq: goes on from
`checkpoint_last.pt` whenever there is one, wanted or not.

Next: `checkpoints/resume.py`.
"""

import fcntl
import os
import platform
import shutil
import socket
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import torch

from annotated_mpnet.checkpoints.checkpoint import REPLACED, TEMPORARY, owner
from annotated_mpnet.checkpoints.manifest import library_versions, sync, write_synced
from annotated_mpnet.checkpoints.retention import is_checkpoint_name, recover
from annotated_mpnet.checkpoints.strict_json import (
    JsonObject,
    as_text,
    read_json,
    reading,
    short,
    to_json,
)
from annotated_mpnet.errors import CheckpointError, WriteError

# The names that a run gives, apart from those of its checkpoints. A new one must be entered here,
# or `--overwrite` leaves it behind, and the next run of the directory finds a report of another.
ENVIRONMENT = "environment.json"
LOCK = ".lock"
METRICS = "metrics.jsonl"
FILES = ("config.toml", "log.txt", METRICS, "report.md", "loss.png")
EXPORT = "hf"


class RunDirectory:
    """A run's directory, locked for as long as the `with` block lasts.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     with RunDirectory(Path(folder)) as directory:
    ...         directory.write("metrics.jsonl", "...")
    ...     with RunDirectory(Path(folder), resume=True) as again:
    ...         print(again.run_id == directory.run_id)
    True

    Attributes:
        path: the directory.
        run_id: 32 hexadecimal digits, drawn when the run first starts and kept by every resume.
    """

    def __init__(self, path: Path, resume: bool = False, overwrite: bool = False) -> None:
        """Touches nothing yet; `with` does.

        Args:
            path: the directory, made if it is missing.
            resume: go on with the run in it, if there is one.
            overwrite: delete the run in it, if there is one.
        """
        # Given by `__enter__`: before it nobody knows whether a run is gone on with, or begins.
        self.path = path
        self.run_id = ""
        self._resume = resume
        self._overwrite = overwrite
        # The lock's open file. As long as it is open it is held: closed by `_release`, or by the
        # kernel when the process ends, in whatever way.
        self._lock: int | None = None
        # Whether the text in it is ours.
        self._signed = False

    def __enter__(self) -> Self:
        """Lock the directory and find or draw the run's id.

        Raises:
            WriteError: the path is a file, or cannot be written to.
            CheckpointError: another process uses the directory; or it holds a run and neither
                resume nor overwrite was asked for. Nothing has been changed then.
        """
        try:
            self._enter()
        except OSError as error:
            self._release()
            raise WriteError(
                f"--checkpoint-dir {self.path} cannot be written to ({error.strerror}); expected "
                "a directory, there or to be made, that you may write to"
            ) from error
        # A refusal, or Ctrl-C: `__exit__` is only called for what was entered.
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        """Release the lock, after an error too; nothing else is to be tidied up.

        A run that ended well and one that was killed leave the same kind of directory: there is no
        file that says "running", which a dead process could not take back.

        The lock's file stays. Were it deleted, a second process might have opened it just before
        and lock what has no name any more, while a third makes a new one and locks that.
        """
        self._release()

    def write(self, name: str, text: str) -> None:
        """Write a text file, whole or not at all, in the place of what had its name.

        For the small files of a run. A reader, or a run that is killed, finds the former one or the
        new one, and on a full disk the former one stays. (`metrics.jsonl` and `log.txt` grow line
        by line and go other ways: `tracking/sinks.py`.)

        Args:
            name: of the file, one of `FILES`.
            text: all of it.

        Raises:
            WriteError: full disk, lost permission.
        """
        try:
            _write_whole(self.path, name, text)
        except OSError as error:
            raise WriteError(
                f"{self.path / name} could not be written: {error.strerror}; make room or mend "
                "that, and go on with --resume"
            ) from error

    def _enter(self) -> None:
        """Come in, in the order that stands in the module's docstring.

        Raises:
            OSError: `__enter__` puts it into words.
            CheckpointError: refused.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        # A refusal must leave no trace: a directory with a run but without a lock's file gets none.
        # Where there is one, being in use is the better thing to say, so that comes first.
        if (self.path / LOCK).exists() or self._is_admitted():
            self._acquire()
        if not self._is_admitted():
            raise _taken(self.path)
        # From here on the directory is ours alone, and the next comer is told by whom it is held.
        self._sign()
        # Only where a run has been: in a directory that is somebody else's, a `.tmp-` is his.
        if (self.path / ENVIRONMENT).exists():
            recover(self.path)
        if self._overwrite and holds_run(self.path):
            _delete_run(self.path)
        # A resume only reads the id. The environment of the first start stays: the machine that a
        # run began on is what its first checkpoints were made by.
        if self._resume and holds_run(self.path):
            self.run_id = _read_run_id(self.path)
            _probe(self.path)
        else:
            # By chance, and outside of the seed: two runs of the same command are two runs.
            self.run_id = uuid.uuid4().hex
            _write_whole(self.path, ENVIRONMENT, to_json(_environment(self.run_id)))

    def _is_admitted(self) -> bool:
        # Asked once before the lock and once under it; only the second answer counts.
        return self._resume or self._overwrite or not holds_run(self.path)

    def _acquire(self) -> None:
        """Open the lock's file and lock it, without waiting; `CheckpointError` if it is held.

        A run takes days: who waited for it would find out when it is too late.
        """
        # Mode 0666 is cut by the umask, as for any file. Not truncated here: if the lock is held,
        # the text in it is the holder's name, and the message below needs it.
        path = self.path / LOCK
        self._lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"--checkpoint-dir {self.path} is in use by {_holder(path)}; wait for it, stop it, "
                "or choose another directory"
            ) from error

    def _sign(self) -> None:
        """Write into the lock's file who holds it, for the message that the next comer gets."""
        # Through the descriptor that is locked: the name could lead to another file by now.
        assert self._lock is not None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        self._signed = True

    def _release(self) -> None:
        """Give the lock back, if there is one; may be called twice."""
        if self._lock is None:
            return
        # Only who has signed may strike the name out: the lock may be somebody else's.
        if self._signed:
            os.ftruncate(self._lock, 0)
        os.close(self._lock)
        self._lock, self._signed = None, False


def refuse_taken_directory(directory: Path, resume: bool, overwrite: bool) -> None:
    """Refuse at once what `RunDirectory` would refuse only after the text has been tokenised.

    Reads only, and takes no lock, so that `RunDirectory` must look again. It makes no directory
    either: a path that was mistyped shall not be there afterwards.

    Raises:
        CheckpointError: the directory holds a run, and neither flag was given.
        WriteError: the path is a file, or lies under one.
    """
    # Up to the nearest thing that is there: only a directory can have directories made in it.
    nearest = directory.absolute()
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    if not nearest.is_dir():
        raise WriteError(
            f"--checkpoint-dir {directory} cannot be made: {nearest} is not a directory; choose "
            "another path"
        )
    if not (resume or overwrite) and holds_run(directory):
        raise _taken(directory)


def nothing_to_resume(directory: Path) -> CheckpointError:
    """Return the error of a `--resume` without a path in a directory without a checkpoint.

    It would be kinder to scripts to begin at update 0 then. But the weights that a preset or a file
    of settings begins with are left out where `--resume` stands (`settings/parsing.py`), and nobody would
    notice that the run began without them.
    """
    # With metrics in it, a new run would be refused as well: see the table.
    way_out = "with --overwrite instead" if holds_run(directory) else "without it"
    return CheckpointError(f"--resume finds no checkpoint in {directory}; start the run {way_out}")


def holds_run(directory: Path) -> bool:
    """Tell whether there is a run in a directory, or what might be one.

    Of an aborted start, which left an id but neither checkpoints nor metrics, nothing is worth
    keeping. Files of our names without an id may be somebody's own `config.toml`: they count.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     for name in ("corpus.txt", ENVIRONMENT, "log.txt", "checkpoint5"):
    ...         (Path(folder) / name).touch()
    ...         print(name, holds_run(Path(folder)))
    corpus.txt False
    environment.json False
    log.txt False
    checkpoint5 True
    """
    named = _named(directory)
    if not (directory / ENVIRONMENT).exists():
        return bool(named)
    metrics = directory / METRICS
    has_metrics = metrics.exists() and metrics.stat().st_size > 0
    return has_metrics or any(path.name not in FILES for path in named)


def _named(directory: Path) -> list[Path]:
    """Return what has one of the names that a run gives, but for its id and its lock.

    The one list for two questions, whether there is a run and what `--overwrite` deletes: what does
    not count as a run's is not deleted as a run's either.
    """
    if not directory.is_dir():
        return []
    return [
        path
        for path in sorted(directory.iterdir())
        if path.name in (*FILES, EXPORT) or is_checkpoint_name(path.name.removeprefix(REPLACED))
    ]


def _taken(directory: Path) -> CheckpointError:
    """Return the refusal, with the three ways out, for both of the places that refuse.

    Which of them is right only the user knows. A default would be wrong for somebody, and one of
    the three cannot be taken back.
    """
    return CheckpointError(
        f"--checkpoint-dir {directory} already holds a run; go on with it by --resume, delete it "
        "by --overwrite, or choose another directory"
    )


def _holder(lock: Path) -> str:
    """Return who holds a lock, as far as its text says.

    It is only read, not believed: whether the lock is held is the kernel's answer. Of a process
    that was killed the name is still there, and the next comer writes over it.
    """
    # Empty if the holder has locked, but not signed yet.
    text = lock.read_text(encoding="utf-8", errors="replace").strip()
    return short(text) if text else "another process"


def _delete_run(directory: Path) -> None:
    """Delete what the run in a directory wrote, and nothing else; its id last.

    Last, so that a deletion which is cut short can be repeated: without an id, what is left would
    be nobody's, and refused.

    Raises:
        CheckpointError: there is no id, so that nothing proves that a run wrote these files.
    """
    if not (directory / ENVIRONMENT).exists():
        raise CheckpointError(
            f"--overwrite: {directory} has no {ENVIRONMENT}, so that a run may not have written "
            "what is there; nothing was deleted: do it by hand, or choose another directory"
        )
    # An id that cannot be read is one all the same: a run was here, whichever.
    try:
        run_id: str | None = _read_run_id(directory)
    except CheckpointError:
        run_id = None
    # `hf/`, the logs and the figures carry no id of their own and go with the run.
    for path in _named(directory):
        # A damaged checkpoint, whose manifest names nobody, is taken for this run's.
        foreign = run_id is not None and owner(path) not in (run_id, None)
        if not foreign:
            _delete(path)
    (directory / ENVIRONMENT).unlink()


def _delete(path: Path) -> None:
    """Delete a file, a directory with all it holds, or a link, but not what the link leads to.

    Somebody may have moved the large checkpoints to another disk, and left links in their place:
    the disk is his, and may hold more than this run's.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _read_run_id(directory: Path) -> str:
    """Return the id that every checkpoint of a run carries; `CheckpointError` if there is none.

    It is not made up anew: the checkpoints would be another run's then, and never be pruned.
    """
    path = directory / ENVIRONMENT
    if not path.exists():
        raise CheckpointError(
            f"{directory} has files of a run, but no {ENVIRONMENT} that says which run; go on from "
            "one of its checkpoints with --resume-checkpoint in another --checkpoint-dir"
        )
    values = read_json(path)
    with reading(path):
        return as_text(values["run_id"])


def _environment(run_id: str) -> JsonObject:
    """Return the run's id and what it runs on. No environment variables: they hold secrets.

    For whoever asks, months later, why two runs of the same configuration differ in the last bits:
    sums on another number of threads, or on another device, are added in another order.
    """
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


def _probe(directory: Path) -> None:
    """Raise the `OSError` now that would otherwise come with the first checkpoint.

    A resume writes nothing when it starts, so that nothing else would notice a lost permission
    until hours of updates are to be saved.
    """
    probe = directory / f"{TEMPORARY}probe"
    probe.touch()
    probe.unlink()


def _write_whole(directory: Path, name: str, text: str) -> None:
    """Write a file by the protocol of `checkpoints/checkpoint.py`: under another name, synced, renamed.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     for text in ("lr = 0.1", "lr = 0.2"):
    ...         _write_whole(Path(folder), "config.toml", text)
    ...     [(path.name, path.read_text()) for path in Path(folder).iterdir()]
    [('config.toml', 'lr = 0.2')]
    """
    temporary = directory / f"{TEMPORARY}{name}"
    write_synced(temporary, text)
    os.rename(temporary, directory / name)
    sync(directory)
