"""What a run says while it runs: one record for programs, one for people.

`metrics.jsonl` has an object a line and is the truth: whatever else shows numbers (the console, the
report, and what later reads them) takes them from the same dictionaries, under the same names.

    step                        updates done train/loss, train/bits      mean cross-entropy per
    predicted token since the line before, in nats
                                and in bits (nats / ln 2)
    train/learning_rate, train/gradient_norm      of the last update
    valid/bits, valid/accuracy  over the whole validation text, with the same masks each time
    perf/tokens_per_second      input tokens, padding not counted, per second of training
    perf/predicted_per_second   predicted tokens per second of training
    perf/data_wait              share of that time in which training waited for a batch

Time of evaluations and checkpoints is not training time. Bits are shown because they can be judged:
13 bits is guessing evenly among 8192 tokens, and each bit less halves the candidates.

`log.txt` keeps, with the time of day, each line that the console said. On a terminal the console
also shows a live line at its bottom; where nobody watches, it prints a line now and then instead.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from types import TracebackType

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

Metrics = Mapping[str, float]


def nats_to_bits(nats: float) -> float:
    """Convert a loss from nats to bits.

    >>> round(nats_to_bits(math.log(8192)), 6)
    13.0
    """
    return nats / math.log(2)


class Tracker:
    """Records of one run; a context manager, within which the live line is shown."""

    def __init__(self, directory: Path, total_updates: int, console: Console) -> None:
        self._console = console
        self._metrics_path = directory / "metrics.jsonl"
        self._log_path = directory / "log.txt"
        self._live = _TwoLines(
            TextColumn("update"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            expand=True,
            disable=not console.is_terminal,
        )
        self._task = self._live.add_task("", total=total_updates)
        self._latest: dict[str, float] = {}

    def __enter__(self) -> "Tracker":
        """Show the live line."""
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the live line as it is and give the terminal back."""
        self._live.stop()

    def say(self, text: str) -> None:
        """Print a line for the reader, and keep it in the log."""
        self._print(escape(text))
        self._keep(text)

    def warn(self, text: str) -> None:
        """Print a line that the reader should not miss, and keep it in the log."""
        self._print(f"[yellow]warning:[/] {escape(text)}")
        self._keep(f"warning: {text}")

    def progress(self, step: int) -> None:
        """Move the live line to an update. Costs microseconds: rich redraws at its own pace."""
        self._live.update(self._task, completed=step)

    def log(self, step: int, metrics: Metrics) -> None:
        """Append a line of metrics, and show it."""
        # Opened and closed each time, so that whoever follows the file sees whole lines, and a run
        # that is killed has lost none.
        record = {"step": step, **metrics}
        with self._metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        # Training and validation come at different times; the live line shows the latest of both.
        self._latest.update(metrics)
        self._live.numbers = _shown(self._latest)
        self.progress(step)
        line = f"update {step}: {_shown(metrics)}"
        if not self._console.is_terminal or "valid/bits" in metrics:
            self.say(line)
        else:
            self._keep(line)

    def rewind(self, step: int) -> int:
        """Drop lines of metrics behind a resumed update, which will be written again.

        A run that was killed has logged updates that no checkpoint has. Its resume repeats them,
        to the same numbers; twice in the file, they would bend every curve drawn from it.

        Returns:
            How many were dropped.
        """
        if not self._metrics_path.exists():
            return 0
        lines = self._metrics_path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if _step_of(line) <= step]
        self._metrics_path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        return len(lines) - len(kept)

    def _print(self, marked_up: str) -> None:
        # A terminal gets lines broken between words; a file gets them whole, for grep.
        whole = not self._console.is_terminal
        self._console.print(marked_up, highlight=False, soft_wrap=whole)

    def _keep(self, text: str) -> None:
        moment = datetime.now().isoformat(timespec="seconds")
        with self._log_path.open("a", encoding="utf-8") as file:
            file.write(f"{moment} {text}\n")


class Stopwatch:
    """Measures the time spent in training itself, and the part of it spent waiting for data.

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


class _TwoLines(Progress):
    """The bar, and under it the latest numbers: side by side they need more than 80 columns."""

    numbers = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        """Return the two lines."""
        yield self.make_tasks_table(self.tasks)
        yield Text(self.numbers, no_wrap=True, overflow="ellipsis")


def _shown(metrics: Metrics) -> str:
    """Say the numbers that a reader watches, in fewer than 80 characters.

    >>> speed = {"perf/tokens_per_second": 21480.0, "perf/predicted_per_second": 3020.0}
    >>> _shown({"train/bits": 8.514, "train/loss": 5.9, **speed})
    'train 8.51 bits  21.5k tok/s  3.0k predicted/s'
    >>> len(_shown({"train/bits": 8.5, **speed, "valid/bits": 8.6, "valid/accuracy": 0.124}))
    74
    """
    formats: dict[str, Callable[[float], str]] = {
        "train/bits": lambda value: f"train {value:.2f} bits",
        "valid/bits": lambda value: f"valid {value:.2f} bits",
        "valid/accuracy": lambda value: f"acc {value:.3f}",
        "perf/tokens_per_second": lambda value: f"{_thousands(value)} tok/s",
        "perf/predicted_per_second": lambda value: f"{_thousands(value)} predicted/s",
    }
    return "  ".join(say(metrics[name]) for name, say in formats.items() if name in metrics)


def _thousands(value: float) -> str:
    return f"{value / 1000:.1f}k" if value < 1e6 else f"{value / 1e6:.2f}M"


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1  # a line that a killed process left half-written stays where it is, and says so
