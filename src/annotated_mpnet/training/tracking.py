"""What a run says while it runs: one record for programs, one for people.

`metrics.jsonl` has an object a line and is the truth: whatever else shows numbers (the console, the
report, TensorBoard, W&B) takes them from the same dictionaries, under the same names.

    step                        updates done
    train/loss, train/bits      mean cross-entropy per predicted token since the line before, in
                                nats and in bits (nats / ln 2)
    train/learning_rate, train/gradient_norm      of the last update
    valid/loss, valid/bits, valid/accuracy        over the whole validation text, with the same
                                masks each time
    perf/tokens_per_second      input tokens, padding not counted, per second of training
    perf/predicted_per_second   predicted tokens per second of training
    perf/mfu                    share of the device's peak, where that is known (`throughput.py`)
    perf/data_wait              share of that time in which training waited for a batch
    memory/peak_gb              the most memory so far: of the device, or of the process on a CPU

Time of evaluations and checkpoints is not training time. Bits are shown because they can be judged:
13 bits is guessing evenly among 8192 tokens, and each bit less halves the candidates.

`log.txt` keeps, with the time of day, each line that the console said. On a terminal the console
also shows three live lines at its bottom; where nobody watches, it prints a line now and then
instead, which is kept whole for grep.

When training leaves the unigram plateau, or stays on it for long, that is said once (`plateau.py`).

**Nothing of this may end a run.** A full disk, a dead network, a terminal that was closed: what
fails is told once, and training goes on. A checkpoint that cannot be written is another matter, and
is not decided here. (HF: an error in a callback of W&B ends the training.)

When the reader of the output is gone (`pretrain-mpnet ... | head`), the run goes on in silence and
says so in `log.txt`: more often than not that reader was a shell that somebody closed, and days of
training should not hang on it. A hang-up or an interrupt, which are meant for the run, stop it.

**Who speaks?** Of several processes only the first. The others have a tracker too, so that the loop
need not ask who it is, but theirs is silent:

>>> with Tracker.silent() as tracker:
...     tracker.say("a word")
...     tracker.log(1, {"train/bits": 13.0})

Next: `sinks.py` and `display.py` for the two halves; `trainer.py`, which says what to log;
`report.py`, which makes a page of it.
"""

import io
import math
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import ParamSpec, TypeVar

from rich.console import Console
from rich.markup import escape
from torch import nn

from annotated_mpnet.config import PretrainingConfig
from annotated_mpnet.training.display import LiveLines, duration, finish_line, learning, speed
from annotated_mpnet.training.plateau import PlateauWatch
from annotated_mpnet.training.run_directory import METRICS
from annotated_mpnet.training.sinks import (
    Metrics,
    MetricsFile,
    RecordFile,
    Sink,
    TensorBoard,
    WeightsAndBiases,
)

P = ParamSpec("P")
T = TypeVar("T")

LOG, WANDB, TENSORBOARD = "log.txt", "W&B", "TensorBoard"


def nats_to_bits(nats: float) -> float:
    """Convert a loss from nats to bits.

    >>> round(nats_to_bits(math.log(8192)), 6)
    13.0
    """
    return nats / math.log(2)


class Tracker:
    """Records of one run; a context manager, within which live lines and sinks are open.

    The files of the run's directory are written from the first word on, before that too.
    """

    def __init__(
        self, directory: Path | None, run_id: str, config: PretrainingConfig, console: Console
    ) -> None:
        """Touch nothing yet.

        Args:
            directory: the run's; None for a tracker that writes nothing anywhere.
            run_id: the run's, by which W&B knows it.
            config: says what is asked for, and how many updates there will be.
            console: where people read.
        """
        self._directory = directory
        self._run_id = run_id
        self._config = config
        self._console = console
        self._metrics = None if directory is None else MetricsFile(directory / METRICS)
        self._sinks: dict[str, Sink] = {} if self._metrics is None else {METRICS: self._metrics}
        self._wandb: WeightsAndBiases | None = None
        self._total = config.optimization.total_updates
        # What has failed once, so that it is told once.
        self._failed: set[str] = set()
        # The update that the run goes on from, and when this process had done its first one.
        self._resumed_from = 0
        self._first_done: tuple[int, float] | None = None
        self._said_finish = False
        self._latest: dict[str, float] = {}
        self._plateau: PlateauWatch | None = None
        self._live = LiveLines(self._total, console)

    @classmethod
    def silent(cls) -> "Tracker":
        """Return a tracker that says and writes nothing: that of every rank but the first."""
        return cls(None, "", PretrainingConfig(), Console(file=io.StringIO(), quiet=True))

    def __enter__(self) -> "Tracker":
        """Open TensorBoard and W&B, and show the live lines.

        Not before: a start that is refused, or finds the run complete, should not leave a run on
        somebody's server. By now the tracker knows, too, where the run goes on (`rewind`).
        """
        if self._directory is not None:
            tracking, first = self._config.tracking, self._resumed_from + 1
            log_dir = tracking.tensorboard_log_dir
            if log_dir is not None:
                events = self._try(TENSORBOARD, TensorBoard, log_dir, first)
                if events is not None:
                    self._sinks[TENSORBOARD] = events
            if tracking.wandb:
                self._wandb = self._try(WANDB, WeightsAndBiases, self._config, self._run_id)
                if self._wandb is not None:
                    self._sinks[WANDB] = self._wandb
                    self.say(f"W&B: {self._wandb.place}")
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the live lines as they are, and close the sinks."""
        # The terminal first: what a sink may say while it closes is then a line like others.
        self._live.stop()
        for name, sink in self._sinks.items():
            self._try(name, sink.close, kind is not None)

    def say(self, text: str) -> None:
        """Print a line for the reader, and keep it in the log.

        The text is plain: what looks like rich's markup, `[bold]`, may be part of a path.
        """
        self._print(escape(text))
        self._keep(text)

    def warn(self, text: str) -> None:
        """Print a line that the reader should not miss, and keep it in the log."""
        self._print(f"[yellow]warning:[/] {escape(text)}")
        self._keep(f"warning: {text}")

    def watch(self, model: nn.Module) -> None:
        """Let W&B watch weights and gradients, if that is asked for; within the `with` block."""
        if self._config.tracking.wandb_watch and self._wandb is not None:
            self._try(WANDB, self._wandb.watch, model)

    def watch_plateau(self, watch: PlateauWatch) -> None:
        """From now on say when training leaves the plateau, or does not."""
        self._plateau = watch

    def progress(self, step: int) -> None:
        """Move the live line to an update. Costs microseconds: rich redraws at its own pace."""
        if self._first_done is None:
            self._first_done = step, time.perf_counter()
        self._live.show(step, self._left(step))

    def log(self, step: int, metrics: Metrics) -> None:
        """Send a line of metrics to all sinks, and show it.

        On a terminal only validations stay as lines; training is in the live ones, and in the log.

        Args:
            step: updates done.
            metrics: by the names of the chapter; those that are not known now are left out.
        """
        for name, sink in self._sinks.items():
            self._try(name, sink.log, step, metrics)
        # Training and validation come at different times; the live lines show the latest of both.
        self._latest.update(metrics)
        self._live.numbers = learning(self._latest), speed(self._latest)
        self.progress(step)
        # A line of its own has to say everything at once, and fit into 80 columns: no waiting, no
        # memory. Validation has no speed, and the time left stands in the line just before it.
        brief = speed(metrics, brief=True)
        parts = [learning(metrics), brief, self._left(step) if brief else ""]
        line = f"update {step}: " + "  ".join(part for part in parts if part)
        if not self._console.is_terminal or "valid/bits" in metrics:
            self.say(line)
        else:
            self._keep(line)
        self._say_finish(step)
        if self._plateau is not None and "train/bits" in metrics:
            told = self._plateau.look(step, metrics["train/bits"])
            if told is not None:
                self.say(told)

    def rewind(self, step: int) -> int:
        """Go on from an update: drop lines of metrics behind it, which will be written again.

        Returns:
            How many were dropped.
        """
        self._resumed_from = step
        if self._metrics is None:
            return 0
        return self._try(METRICS, self._metrics.rewind, step) or 0

    def _try(
        self, name: str, action: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T | None:
        """Do what may fail, in whatever way, without harm to the run; tell the first time."""
        # The one place for a broad `except`: what is called here belongs to other people's
        # libraries, networks and disks, and nothing of the run depends on it.
        try:
            return action(*args, **kwargs)
        except Exception as error:
            if name not in self._failed:
                self._failed.add(name)
                reason = " ".join(str(error).split()) or type(error).__name__
                self.warn(f"{name} fails: {reason[:200]}; training goes on without it")
            return None

    def _seconds_per_update(self, step: int) -> float | None:
        """Return the mean since this process had done its first update; None if it is too early."""
        # The mean of all and not of the last few: evaluations and checkpoints come rarely, and are
        # to be shared out among the updates between them.
        if self._first_done is None or step <= self._first_done[0]:
            return None
        first, then = self._first_done
        return (time.perf_counter() - then) / (step - first)

    def _left(self, step: int) -> str:
        """Say how long the rest will take, if that can be known and there is any."""
        pace = self._seconds_per_update(step)
        if pace is None or step >= self._total:
            return ""
        return f"{duration(pace * (self._total - step))} left"

    def _say_finish(self, step: int) -> None:
        pace = self._seconds_per_update(step)
        if pace is not None and not self._said_finish and step < self._total:
            self._said_finish = True
            self.say(finish_line(self._total - step, pace))

    def _print(self, marked_up: str) -> None:
        # A terminal gets lines broken between words; a file gets them whole, for grep.
        whole = not self._console.is_terminal
        try:
            self._console.print(marked_up, highlight=False, soft_wrap=whole)
        except (OSError, SystemExit):
            # SystemExit is rich's answer to a broken pipe, after it has turned the output to
            # nowhere. Quiet first: a word about it must not come back here.
            self._console.quiet = True
            self._keep("warning: nobody reads the output any more; going on without it")

    def _keep(self, text: str) -> None:
        """Append a line to `log.txt`."""
        if self._directory is None:
            return
        file = RecordFile(self._directory / LOG)
        moment = datetime.now().isoformat(timespec="seconds")
        # A path may hold bytes that are no text in any encoding; they are written as escapes.
        line = f"{moment} {text}\n".encode(errors="backslashreplace")
        self._try(LOG, file.write, line)


class Stopwatch:
    """Measures the time spent in training itself, and the part of it spent waiting for data.

    A GPU works through what it was told while the clock goes on, so that the time of a single
    update means little. But before a line is logged, or anything else is done, the loop waits until
    the GPU is through, and so their sum is right.

    Attributes:
        training: seconds within updates, the waiting included; evaluations, checkpoints and logging
            are outside.
        waiting: seconds from the beginning of an update until its batches were there.
    """

    def __init__(self) -> None:
        self.training = 0.0
        self.waiting = 0.0
        self._started = time.perf_counter()

    def start(self) -> None:
        """Begin an update."""
        self._started = time.perf_counter()

    def data_arrived(self) -> None:
        """Note that the batches of the update are there."""
        self.waiting += time.perf_counter() - self._started

    def stop(self) -> None:
        """End an update."""
        self.training += time.perf_counter() - self._started
