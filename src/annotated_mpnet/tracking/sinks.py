"""Where metrics go besides the console: `metrics.jsonl`, TensorBoard, Weights & Biases.

All get the same dictionaries with the same names at the same updates, so that a curve is the same
curve wherever it is looked at. What is left to say is how each of them takes an interruption.

**A killed process** may leave half a line, and has logged updates that no checkpoint has. Records
are appended in one write each, and what a full disk cuts off is taken away again, so that the next
record is not glued to half of another one. A resumed run repeats the updates behind its checkpoint:

    metrics.jsonl   their lines are dropped first, since they will be written again, to the same
                    numbers; twice in the file, they would bend every curve drawn from it
    TensorBoard     its files are never changed; a mark, "restarted from update 51", makes its
                    reader drop what is older than the mark and not before that update
    W&B             the run's id continues the run; the number of the update is a metric like the
                    others and the axis of all of them, so that a repeated point falls on itself

(W&B has a step of its own, which may only grow: it would throw away what a resumed run repeats.)

**Secrets.** Settings go to W&B, the environment and the command line do not; nor do the address of
the git repository and the source, which W&B would take along if it was not told otherwise.

>>> without_password("https://me:hunter2@example.org/texts")
'https://example.org/texts'

**Packages.** TensorBoard and W&B are extras, imported when they are asked for. Whether they are
there is found out before any text is read: `check_tracking`.

fairseq and annotated-mpnet: TensorBoard by `SummaryWriter`, whose thread prints a traceback when
the disk is full, and then drops what it is given. The format is simple enough to be written here:
records with checksums, each holding one protocol buffer.

Next: `tracking/tracker.py`, which speaks to all of them.
"""

import dataclasses
import errno
import importlib
import json
import math
import os
import re
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from torch import nn

from annotated_mpnet.errors import ConfigError
from annotated_mpnet.settings.config import PretrainingConfig, TrackingConfig

Metrics = Mapping[str, float]


class Sink(Protocol):
    """What takes metrics. May raise whatever it likes: the tracker survives it.

    Opening is not part of it: that takes other things for each, and may fail as well.
    """

    def log(self, step: int, metrics: Metrics) -> None:
        """Take the metrics of an update."""

    def close(self, failed: bool) -> None:
        """Write the rest; the run has ended, by an error or not."""


def check_tracking(tracking: TrackingConfig) -> None:
    """Find out what is missing for the tracking that is asked for, before anything is read.

    Raises:
        ConfigError: a package is not installed; W&B has no key; flags that need another one.
    """
    if tracking.wandb_watch and not tracking.wandb:
        raise ConfigError("--wandb-watch has nobody to send histograms to; give --wandb too")
    if tracking.tensorboard_log_dir is not None:
        _require("tensorboard", "--tensorboard-log-dir")
    if tracking.wandb:
        _require("wandb", "--wandb")
        _require_key()


def _require(package: str, flag: str) -> None:
    # Imported and not only looked for: an installation that is broken is as good as none, and
    # should be found out now.
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"{flag} needs the package {package}, which cannot be imported ({error}); "
            f"pip install 'annotated-mpnet[{package}]'"
        ) from error


def _require_key() -> None:
    import wandb

    # Without a key, W&B asks for one on the terminal, when the text has been read and nobody may be
    # there to answer. It is looked up, but neither tried nor kept.
    if os.environ.get("WANDB_MODE", "online") not in ("online", "shared"):
        return
    wandb.setup(wandb.Settings(silent=True))
    if not wandb.login(prompt=False, verify=False):
        raise ConfigError(
            "--wandb finds no key of yours; call `wandb login`, set WANDB_API_KEY, or keep the "
            "metrics here with WANDB_MODE=offline"
        )


class RecordFile:
    """A file that grows by whole records.

    Opened for each of them, so that a process that is killed has lost none, and that the file may
    be moved away. Unbuffered: what Python keeps back for later would fail later, at a moment when
    nobody knows any more which record it was.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, record: bytes) -> None:
        """Append a record, or nothing.

        Raises:
            OSError: the disk is full, the directory gone, or whatever else it may be.
        """
        with self.path.open("ab", buffering=0) as file:
            before = file.seek(0, os.SEEK_END)
            try:
                if file.write(record) < len(record):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            except OSError:
                # To give space back works on a full disk too.
                with suppress(OSError):
                    file.truncate(before)
                raise


class MetricsFile:
    """`metrics.jsonl`: an object a line, which any program can read."""

    def __init__(self, path: Path) -> None:
        self._file = RecordFile(path)

    def log(self, step: int, metrics: Metrics) -> None:
        """Append a line. What is not a number becomes null: JSON knows no NaN."""
        # The file is read by other programs, for years. A loss that is no number ends the run
        # (`mpnet/loop.py`), but the bits of a validation without a single prediction are none either.
        numbers = {name: each if math.isfinite(each) else None for name, each in metrics.items()}
        self._file.write((json.dumps({"step": step, **numbers}) + "\n").encode())

    def close(self, failed: bool) -> None:
        """Do nothing: each line is in the file."""

    def rewind(self, step: int) -> int:
        """Drop the lines behind an update, and what is no line; return how many."""
        path = self._file.path
        if not path.exists():
            return 0
        lines = path.read_bytes().splitlines()
        # By their number and not by their place: whatever happened to the file, what is of updates
        # that count stays.
        kept = [line for line in lines if 0 <= _step_of(line) <= step]
        if len(kept) < len(lines):
            # Not in place: a full disk would leave nothing of what was there.
            new = path.with_name(f".{path.name}.new")
            new.write_bytes(b"".join(line + b"\n" for line in kept))
            new.replace(path)
        return len(lines) - len(kept)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the lines of a `metrics.jsonl` in order, without what is not a number.

    A line that is none, the rest of a killed process, is passed over.
    """
    records = []
    for line in path.read_bytes().splitlines():
        if _step_of(line) >= 0:
            values = json.loads(line)
            records.append({n: v for n, v in values.items() if isinstance(v, int | float)})
    return records


class TensorBoard:
    """Scalars in TensorBoard's own format: each a small protocol buffer, in a record."""

    def __init__(self, directory: Path, first_step: int) -> None:
        """Begin a file in a directory, and mark that the run goes on from an update.

        Args:
            directory: may hold the files of former starts, which are read together.
            first_step: what they have from this update on does not count any more.
        """
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

        # The classes are kept, because the packages can be imported here only.
        self._Event, self._Summary = Event, Summary
        directory.mkdir(parents=True, exist_ok=True)
        # TensorBoard finds its files by this name, and reads them in its order; with the process in
        # it, no two are the same.
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter(RecordFile(directory / name))
        now = time.time()
        # The first event says which format this is, the second is the mark: "from this update on,
        # believe me and not those before me". It stands in a new run's file too, for a directory in
        # which another run has been.
        start = SessionLog(status=SessionLog.START)
        for event in (
            Event(wall_time=now, file_version="brain.Event:2"),
            Event(wall_time=now, step=first_step, session_log=start),
        ):
            self._records.write(event.SerializeToString())

    def log(self, step: int, metrics: Metrics) -> None:
        """Append one event with a value for each metric."""
        values = [self._Summary.Value(tag=n, simple_value=v) for n, v in metrics.items()]
        event = self._Event(wall_time=time.time(), step=step, summary=self._Summary(value=values))
        self._records.write(event.SerializeToString())

    def close(self, failed: bool) -> None:
        """Do nothing: each event is in the file."""


class WeightsAndBiases:
    """A run on Weights & Biases, new or gone on with."""

    def __init__(self, config: PretrainingConfig, run_id: str) -> None:
        """Open the run there.

        Args:
            config: sent along; says project, name and id.
            run_id: the id, unless the configuration has another.
        """
        import wandb

        tracking = config.tracking
        self._run = wandb.init(
            project=tracking.wandb_project,
            name=tracking.wandb_name or config.run.checkpoint_dir.resolve().name,
            id=tracking.wandb_id or run_id,
            # Go on with the run of this id if there is one there, else begin it.
            resume="allow",
            config=plain_settings(config),
            settings=wandb.Settings(
                # The console is the tracker's. What W&B says is in its own log.
                silent=True,
                console="off",
                # The metadata hold the command line, the other two what is said above.
                x_disable_meta=True,
                disable_git=True,
                disable_code=True,
                # Without a network, the end of the run would wait for ever; the rest can be sent
                # later by `wandb sync`.
                finish_timeout=60,
            ),
        )
        # Curves are drawn over our updates, not over W&B's count of the lines it was sent.
        self._run.define_metric("*", step_metric="step")
        self._every = tracking.logging_steps * config.optimization.update_freq

    @property
    def place(self) -> str:
        """Where to look at the run."""
        return str(Path(self._run.dir).parent if self._run.offline else self._run.url)

    def log(self, step: int, metrics: Metrics) -> None:
        """Send the metrics."""
        self._run.log({"step": step, **metrics})

    def watch(self, model: nn.Module) -> None:
        """Send histograms of weights and gradients from now on, as often as metrics."""
        # W&B counts backward passes, which are those of micro-batches.
        self._run.watch(model, log="all", log_freq=self._every)

    def close(self, failed: bool) -> None:
        """Say how the run ended, and wait for what is not yet sent."""
        self._run.finish(exit_code=int(failed))


def plain_settings(config: PretrainingConfig) -> dict[str, dict[str, object]]:
    """Return all settings as plain values, groups as in `config.toml`, without passwords.

    >>> plain_settings(PretrainingConfig())["run"]["checkpoint_dir"]
    'checkpoints'
    """
    return {
        group: {name: _plain(value) for name, value in values.items()}
        for group, values in dataclasses.asdict(config).items()
    }


def _plain(value: object) -> object:
    # Numbers stay numbers, so that runs can be sorted by them there.
    if isinstance(value, str | Path):
        return without_password(str(value))
    return value


def without_password(text: str) -> str:
    """Take user and password out of addresses, where a text has any.

    A Hub token comes from the environment or from a file of Hugging Face's and is no setting at
    all; but any path may be an address, and people do write passwords into addresses.
    """
    return re.sub(r"://[^/@\s]+@", "://", text)


def _step_of(line: bytes) -> int:
    """Return the update of a line of metrics; -1 if it is none."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1
