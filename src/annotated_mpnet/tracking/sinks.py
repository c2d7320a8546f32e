"""Where metrics go besides the console: `metrics.jsonl`, TensorBoard, Weights & Biases.

All get the same names and numbers at the same updates. A killed process may leave half a line, and
metrics of updates that no checkpoint has. A resumed run repeats these updates:

    metrics.jsonl   their lines are dropped first, because they are written again with the same
                    numbers
    TensorBoard     a mark, "restarted at update 51", makes its reader drop older points from there
    W&B             the run's id continues the run; the update is a metric and the axis of all
                    others, so a repeated point falls on itself (W&B's own step may only grow)

Settings go to W&B; environment, command line and source code do not, and passwords in addresses are
cut out. TensorBoard and W&B are extras, imported only when asked for.
"""

import dataclasses
import errno
import importlib
import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from torch import nn

from annotated_mpnet.errors import ConfigError, without_password
from annotated_mpnet.settings.config import PretrainingConfig, TrackingConfig

Metrics = Mapping[str, float]


class Sink(Protocol):
    """What takes metrics. Whatever it raises, the tracker turns into a warning."""

    def log(self, step: int, metrics: Metrics) -> None:
        """Take the metrics of an update."""

    def close(self, failed: bool) -> None:
        """Write the rest; the run has ended, by an error or not."""


def check_tracking(tracking: TrackingConfig) -> None:
    """Find out what is missing for the tracking that is asked for, before anything is read.

    Raises:
        ConfigError: a package is not installed, W&B has no key, or a flag needs another one.
    """
    if tracking.wandb_watch and not tracking.wandb:
        raise ConfigError("--wandb-watch needs --wandb, where its histograms go")
    wanted = {"tensorboard": tracking.tensorboard_log_dir is not None, "wandb": tracking.wandb}
    flags = {"tensorboard": "--tensorboard-log-dir", "wandb": "--wandb"}
    for package in (name for name, is_wanted in wanted.items() if is_wanted):
        # Imported, not only looked for: a broken installation should be found now too.
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ConfigError(
                f"{flags[package]} needs the package {package}, which cannot be imported "
                f"({error}); pip install 'annotated-mpnet[{package}]'"
            ) from error
    # Without a key W&B would ask for one on the terminal, after the text has been read.
    if tracking.wandb and os.environ.get("WANDB_MODE", "online") in ("online", "shared"):
        import wandb

        wandb.setup(wandb.Settings(silent=True))
        if not wandb.login(prompt=False, verify=False):
            raise ConfigError(
                "--wandb finds no API key; run `wandb login`, set WANDB_API_KEY, or keep the "
                "metrics on this machine with WANDB_MODE=offline"
            )


def append(path: Path, text: str) -> None:
    """Append whole lines to a file, or nothing.

    Unbuffered and opened each time: a killed process loses no line, and an error belongs to the
    line that caused it.

    Raises:
        OSError: the disk is full, the directory is gone, ...
    """
    # A path may hold bytes that are not text.
    data = text.encode(errors="backslashreplace")
    with path.open("ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        try:
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            # Or the next line would be glued to half of this one.
            with suppress(OSError):
                file.truncate(before)
            raise


def metrics_line(step: int, metrics: Metrics) -> str:
    """Return a line of `metrics.jsonl`. JSON has no NaN and no infinity: they become null.

    >>> metrics_line(20, {"train/bits": 8.5, "valid/bits": math.nan})
    '{"step": 20, "train/bits": 8.5, "valid/bits": null}\\n'
    """
    numbers = {name: each if math.isfinite(each) else None for name, each in metrics.items()}
    return json.dumps({"step": step, **numbers}) + "\n"


def drop_metrics_after(step: int, path: Path, evaluation_due: bool = False) -> int:
    """Drop the lines of later updates, and broken ones; return how many.

    If the evaluation after this update is due, its lines are dropped too: an earlier resume may
    have made it and died before the next checkpoint, and this one makes it again.
    """
    if not path.exists():
        return 0
    lines = path.read_bytes().splitlines()
    kept = [line for line in lines if 0 <= _step_of(line) <= step]
    if evaluation_due:
        kept = [each for each in kept if _step_of(each) < step or "train/bits" in json.loads(each)]
    if len(kept) < len(lines):
        # Not in place: on a full disk nothing would be left.
        new = path.with_name(f".{path.name}.new")
        new.write_bytes(b"".join(line + b"\n" for line in kept))
        new.replace(path)
    return len(lines) - len(kept)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the lines of a `metrics.jsonl`, without nulls and broken lines."""
    lines = path.read_bytes().splitlines()
    records = [json.loads(line) for line in lines if _step_of(line) >= 0]
    return [
        {
            name: value
            for name, value in record.items()
            if isinstance(value, int | float) and abs(value) < 1e300
        }
        for record in records
    ]


def _step_of(line: bytes) -> int:
    """Return the update of a line of metrics; -1 if the line is broken."""
    try:
        return int(json.loads(line)["step"])
    # A step of 1e999 is an OverflowError, a hundred thousand brackets a RecursionError.
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return -1


class TensorBoard:
    """A file of events in a directory, which may hold those of earlier starts."""

    def __init__(self, directory: Path, first_step: int) -> None:
        """Begin a file; earlier ones no longer count from `first_step`."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(directory, purge_step=first_step)

    def log(self, step: int, metrics: Metrics) -> None:
        """Write a point of each curve."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        # Its own thread writes. Waiting for it raises here what failed there.
        self._writer.flush()

    def close(self, failed: bool) -> None:
        """Close the file."""
        self._writer.close()


class WeightsAndBiases:
    """A run on Weights & Biases, new or continued."""

    def __init__(self, config: PretrainingConfig, run_id: str) -> None:
        """Open the run.

        Args:
            config: sent along; it may name project, run and id.
            run_id: the id, unless the configuration has one.
        """
        import wandb

        tracking = config.tracking
        self._run = wandb.init(
            project=tracking.wandb_project,
            name=tracking.wandb_name or config.run.checkpoint_dir.resolve().name,
            id=tracking.wandb_id or run_id,
            resume="allow",
            config=plain_settings(config),
            settings=wandb.Settings(
                # The console belongs to the tracker.
                silent=True,
                console="off",
                # The metadata hold the command line.
                x_disable_meta=True,
                disable_git=True,
                disable_code=True,
                # Without a network the end would wait forever; `wandb sync` sends the rest later.
                finish_timeout=60,
            ),
        )
        self._run.define_metric("*", step_metric="step")
        # W&B counts backward passes, one per micro-batch.
        self._watch_every = tracking.logging_steps * config.optimization.update_freq

    @property
    def place(self) -> str:
        """Where to look at the run."""
        return str(Path(self._run.dir).parent if self._run.offline else self._run.url)

    def log(self, step: int, metrics: Metrics) -> None:
        """Send the metrics."""
        self._run.log({"step": step, **metrics})

    def watch(self, model: nn.Module) -> None:
        """Send histograms of weights and gradients from now on, as often as metrics."""
        self._run.watch(model, log="all", log_freq=self._watch_every)

    def close(self, failed: bool) -> None:
        """Tell how the run ended, and send the rest."""
        self._run.finish(exit_code=int(failed))


def setting_text(value: object) -> str:
    """Return the text of a setting; several values are separated by spaces."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def plain_settings(config: PretrainingConfig) -> dict[str, dict[str, object]]:
    """Return all settings as plain values, grouped as in `config.toml`, without passwords."""
    return {
        group: {
            name: without_password(setting_text(value))
            if isinstance(value, str | Path | tuple)
            else value
            for name, value in values.items()
        }
        for group, values in dataclasses.asdict(config).items()
    }
