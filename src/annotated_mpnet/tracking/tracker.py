"""What a run says while it runs: `metrics.jsonl` for programs, console and `log.txt` for people.

`metrics.jsonl` has one object per line. Console, report, TensorBoard and W&B show the same numbers
under the same names:

    step                        updates done
    train/loss, train/bits      mean cross-entropy per predicted token since the line before, in
                                nats and in bits (nats / ln 2)
    train/learning_rate, train/gradient_norm      of the last update
    valid/loss, valid/bits, valid/accuracy        over the whole validation text, with the same
                                masks each time
    perf/tokens_per_second      input tokens without padding, per second of training
    perf/predicted_per_second   predicted tokens per second of training
    perf/mfu                    share of the device's peak, if that is known
    perf/data_wait              share of the time that training waited for a batch
    memory/peak_gb              the most memory so far, of the device or of the process on a CPU

Evaluations and checkpoints are not part of the training time.

**Nothing here ends a run.** Whatever fails (a full disk, the network, a closed terminal) is one
warning, and training continues. When the output is closed (`pretrain-mpnet ... | head`), the run
continues in silence and `log.txt` says so: most often a shell was closed, and days of training
should not depend on it. (HF: an error in W&B's callback ends the training.)

Of several processes only the first one speaks. The others have a silent tracker:

>>> with Tracker.silent() as tracker:
...     tracker.say("a word")
...     tracker.log(1, {"train/bits": 13.0})
"""

import io
import math
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import ParamSpec, TypeVar

from rich.console import Console
from rich.markup import escape
from torch import nn

from annotated_mpnet.checkpoints.run_directory import GUESSES, METRICS
from annotated_mpnet.errors import printable
from annotated_mpnet.settings.config import PretrainingConfig
from annotated_mpnet.tracking import display, sinks
from annotated_mpnet.tracking.guesses import Guess, lines_of
from annotated_mpnet.tracking.plateau import PlateauWatch

P = ParamSpec("P")
T = TypeVar("T")

LOG, WANDB, TENSORBOARD = "log.txt", "W&B", "TensorBoard"

NEWS_EVERY = 30
"""Seconds of an evaluation between two lines about it, where there are no live lines."""


class Tracker:
    """The records of one run. A context manager, in which live lines and sinks are open; the files
    of the run's directory are written before that too."""

    def __init__(
        self, directory: Path | None, run_id: str, config: PretrainingConfig, console: Console
    ) -> None:
        """Touch nothing yet.

        Args:
            directory: of the run; None for a tracker that writes nothing.
            run_id: by which W&B knows the run.
            config: of the run.
            console: where people read.
        """
        self._directory = directory
        self._run_id = run_id
        self._config = config
        self._console = console
        self._sinks: dict[str, sinks.Sink] = {}
        self._failed: set[str] = set()
        self._resumed_from = 0
        # This process's first update, and when it was done.
        self._first_done: tuple[int, float] | None = None
        self._said_finish = False
        # When the evaluation began, and when something was said about it.
        self._evaluation = self._latest_news = 0.0
        self._latest: dict[str, float] = {}
        self._plateau: PlateauWatch | None = None
        self._total = config.optimization.total_updates
        self._live = display.LiveLines(self._total, console)

    @classmethod
    def silent(cls) -> "Tracker":
        """Return a tracker that says and writes nothing: that of every rank but the first."""
        return cls(None, "", PretrainingConfig(), Console(file=io.StringIO(), quiet=True))

    def __enter__(self) -> "Tracker":
        """Open TensorBoard and W&B, and show the live lines.

        Not earlier: a start that is refused should not leave a run on a server.
        """
        tracking = self._config.tracking
        if self._directory is not None and tracking.tensorboard_log_dir is not None:
            first = self._resumed_from + 1
            board = self._try(TENSORBOARD, sinks.TensorBoard, tracking.tensorboard_log_dir, first)
            if board is not None:
                self._sinks[TENSORBOARD] = board
        if self._directory is not None and tracking.wandb:
            wandb = self._try(WANDB, sinks.WeightsAndBiases, self._config, self._run_id)
            if wandb is not None:
                self._sinks[WANDB] = wandb
                self.say(f"W&B: {wandb.place}")
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Leave the live lines as they are, and close the sinks."""
        self._live.stop()
        for name, sink in self._sinks.items():
            self._try(name, sink.close, kind is not None)

    def say(self, text: str) -> None:
        """Print a line, and keep it in the log."""
        text = printable(text)
        # What looks like rich's markup, `[bold]`, may be part of a path.
        self._print(escape(text))
        self._keep(text)

    def warn(self, text: str) -> None:
        """Print a warning, and keep it in the log."""
        text = printable(text)
        self._print(f"[yellow]warning:[/] {escape(text)}")
        self._keep(f"warning: {text}")

    def watch(self, model: nn.Module) -> None:
        """Let W&B watch weights and gradients, if that is asked for; within the `with` block."""
        wandb = self._sinks.get(WANDB)
        if self._config.tracking.wandb_watch and isinstance(wandb, sinks.WeightsAndBiases):
            self._try(WANDB, wandb.watch, model)

    def watch_plateau(self, watch: PlateauWatch) -> None:
        """From now on say when training leaves the plateau, or does not."""
        self._plateau = watch

    def rewind(self, step: int, *, evaluation_due: bool = False) -> int:
        """Continue after an update, or with its evaluation: drop the later lines of metrics.

        Returns:
            How many lines were dropped.
        """
        self._resumed_from = step
        if self._directory is None:
            return 0
        dropped = {
            name: self._try(
                name, sinks.drop_metrics_after, step, self._directory / name, evaluation_due
            )
            for name in (GUESSES, METRICS)
        }
        return dropped[METRICS] or 0

    def progress(self, step: int) -> None:
        """Move the live line to an update."""
        if self._first_done is None:
            self._first_done = step, time.perf_counter()
        self._live.show(step, self._left(step))

    def evaluating(self, done: int, total: int) -> None:
        """Show how many batches of an evaluation are done."""
        if self._live.live.is_started:
            self._live.evaluating(done, total)
            return
        now = time.perf_counter()
        if done == 0:
            self._evaluation = self._latest_news = now
        elif now - self._latest_news >= NEWS_EVERY:
            self._latest_news = now
            left = display.duration((now - self._evaluation) / done * (total - done))
            self.say(f"evaluating: {done:,} of {total:,} batches, {left} left")

    def guessed(self, step: int, guesses: Sequence[Guess]) -> None:
        """Keep what the model guessed for masked words, and show it."""
        if self._directory is not None and guesses:
            self._try(GUESSES, sinks.append, self._directory / GUESSES, lines_of(step, guesses))
        for each in guesses:
            self.say(f"  {each}")

    def log(self, step: int, metrics: sinks.Metrics) -> None:
        """Send metrics to all sinks, and show them.

        On a terminal only validations stay as lines; training is in the live lines and the log.
        """
        if self._directory is not None:
            line = sinks.metrics_line(step, metrics)
            self._try(METRICS, sinks.append, self._directory / METRICS, line)
        for name, sink in self._sinks.items():
            self._try(name, sink.log, step, metrics)
        # Training and validation come separately; the live lines show the latest of both.
        self._latest.update(metrics)
        self._live.numbers = display.learning_now(self._latest), display.speed(self._latest)
        self.progress(step)
        # Without data wait and memory, to fit into 80 columns. Validation has no speed.
        speed = display.speed(metrics, brief=True)
        parts = display.learning(metrics), speed, self._left(step) if speed else ""
        line = f"update {step}: " + "  ".join(part for part in parts if part)
        if self._console.is_terminal and "valid/bits" not in metrics:
            self._keep(line)
        else:
            self.say(line)
        pace = self._seconds_per_update(step)
        if pace is not None and not self._said_finish:
            self._said_finish = True
            self.say(display.finish_line(self._total - step, pace))
        if self._plateau is not None and "train/bits" in metrics:
            message = self._plateau.look(step, metrics["train/bits"])
            if message is not None:
                self.say(message)

    def _try(
        self, name: str, action: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T | None:
        """Do what may fail; warn the first time it does."""
        # A broad `except`: libraries, networks and disks raise anything, and no run depends on it.
        try:
            return action(*args, **kwargs)
        except Exception as error:
            if name not in self._failed:
                self._failed.add(name)
                reason = " ".join(str(error).split()) or type(error).__name__
                self.warn(f"{name} failed: {reason[:200]}; training continues without it")
            return None

    def _seconds_per_update(self, step: int) -> float | None:
        """Return the mean since this process's first update; None if too early, or at the end.

        Evaluations and checkpoints included. The first update is not: kernels are compiled in it.
        """
        if self._first_done is None or not self._first_done[0] < step < self._total:
            return None
        first, then = self._first_done
        return (time.perf_counter() - then) / (step - first)

    def _left(self, step: int) -> str:
        pace = self._seconds_per_update(step)
        return "" if pace is None else f"{display.duration(pace * (self._total - step))} left"

    def _print(self, marked_up: str) -> None:
        # A terminal gets lines broken between words; a file gets them whole, for grep.
        whole = not self._console.is_terminal
        try:
            self._console.print(marked_up, highlight=False, soft_wrap=whole)
        # A closed file is a ValueError; rich answers a broken pipe with SystemExit.
        except (OSError, ValueError, SystemExit):
            self._console.quiet = True
            self._keep("warning: the output is closed; the run continues without it")

    def _keep(self, text: str) -> None:
        """Append a line to the log."""
        if self._directory is not None:
            moment = datetime.now().isoformat(timespec="seconds")
            self._try(LOG, sinks.append, self._directory / LOG, f"{moment} {text}\n")


def nats_to_bits(nats: float) -> float:
    """Convert a loss from nats to bits.

    >>> round(nats_to_bits(math.log(8192)), 6)
    13.0
    """
    return nats / math.log(2)
