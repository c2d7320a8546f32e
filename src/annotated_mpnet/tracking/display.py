"""What a run shows: live lines on a terminal, metrics and durations in words.

On a terminal, three live lines of at most 80 columns stay at the bottom: how far, how good, how
fast. Everything else is printed above them.

    update 320/1000 ━━━━━━━━━━━━━━━                                  12 min left
    train 8.51 bits  valid 8.60 bits  acc 0.124  lr 0.00183
    21.5k tok/s  3.0k predicted/s  data wait 1%  0.9 GB

In a file or a pipe a bar that redraws itself would be pages of noise; there the metrics are
printed, one line at a time.

During an evaluation the first line says how far it is: `evaluating 12/51`.

The display has only what one acts on. Bits and accuracy show whether the run learns. Tokens per
second and MFU show whether the machine is used; if not, `data wait` above a few per cent means that
the text is read too slowly, and memory whether a larger micro-batch fits.
"""

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timedelta

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text


class LiveLines(Progress):
    """The bar and two lines under it. rich redraws them in a thread, so updating them is free.

    Attributes:
        numbers: the lines under the bar.
    """

    numbers: tuple[str, ...] = ()

    def __init__(self, total: int, console: Console) -> None:
        # rich's own column of the time left looks back half a minute only: too optimistic between
        # two evaluations, too pessimistic after one.
        super().__init__(
            TextColumn("update"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[left]}"),
            console=console,
            expand=True,
            disable=not console.is_terminal,
        )
        self._task = self.add_task("", total=total, left="")

    def show(self, step: int, left: str) -> None:
        """Move the bar."""
        self.update(self._task, completed=step, left=left)

    def evaluating(self, done: int, total: int) -> None:
        """Say how far an evaluation is; the next `show` takes it away."""
        self.update(self._task, left=f"evaluating {done}/{total}")

    def get_renderables(self) -> Iterable[RenderableType]:
        """Return the lines, cut off at the edge: wrapped, they would jump."""
        yield self.make_tasks_table(self.tasks)
        for line in self.numbers:
            yield Text(line, no_wrap=True, overflow="ellipsis")


def finish_line(updates_left: int, seconds_per_update: float, now: datetime | None = None) -> str:
    """Say when a run will be done at its present speed.

    >>> finish_line(9500, 1.25, now=datetime(2026, 3, 1, 14, 30))
    'finishes at about 17:47 (in 3 h 17 min) at this speed'
    >>> finish_line(95000, 1.25, now=datetime(2026, 3, 1, 14, 30))
    'finishes at about 23:29 on 2026-03-02 (in 1 d 8 h) at this speed'
    """
    now = now or datetime.now()
    seconds = updates_left * seconds_per_update
    end = now + timedelta(seconds=seconds)
    day = "" if end.date() == now.date() else f" on {end:%Y-%m-%d}"
    return f"finishes at about {end:%H:%M}{day} (in {duration(seconds)}) at this speed"


def duration(seconds: float) -> str:
    """Say how long something takes, in at most two units.

    >>> [duration(seconds) for seconds in (4.2, 75, 725, 12000, 190000)]
    ['4 s', '1 min 15 s', '12 min', '3 h 20 min', '2 d 4 h']
    """
    whole = round(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    if minutes >= 10:
        return f"{minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def took(seconds: float) -> str:
    """Say how long something took, also where it was short.

    >>> [took(seconds) for seconds in (0.0042, 0.35, 4.2, 140)]
    ['4 ms', '0.35 s', '4.2 s', '2 min 20 s']
    """
    if seconds < 0.1:
        return f"{1000 * seconds:.0f} ms"
    return duration(seconds) if seconds >= 10 else f"{seconds:.{1 + (seconds < 1)}f} s"


def size(amount: float) -> str:
    """Say how many bytes something has; a GB has 10^9.

    >>> [size(amount) for amount in (35_400, 27_340_000, 1.75e9, 143.7e9)]
    ['35 kB', '27 MB', '1.8 GB', '144 GB']
    """
    if amount >= 1e9:
        return f"{amount / 1e9:.1f} GB" if amount < 10e9 else f"{amount / 1e9:.0f} GB"
    return f"{amount / 1e6:.0f} MB" if amount >= 1e6 else f"{amount / 1e3:.0f} kB"


Formats = Mapping[str, Callable[[float], str]]
"""By the names in `metrics.jsonl`, in the order in which they are shown."""

LEARNING: Formats = {
    "train/bits": "train {:.2f} bits".format,
    "valid/bits": "valid {:.2f} bits".format,
    "valid/accuracy": "acc {:.3f}".format,
}
RATE: Formats = {"train/learning_rate": "lr {:.3g}".format}
BRIEF: Formats = {
    "perf/tokens_per_second": lambda value: f"{_thousands(value)} tok/s",
    "perf/predicted_per_second": lambda value: f"{_thousands(value)} predicted/s",
    "perf/mfu": "mfu {:.0%}".format,
}
FULL: Formats = {
    **BRIEF,
    "perf/data_wait": "data wait {:.0%}".format,
    "memory/peak_gb": "{:.1f} GB".format,
}


def learning(metrics: Mapping[str, float]) -> str:
    """Say how good the model is.

    >>> learning({"train/bits": 8.514, "train/loss": 5.9, "train/gradient_norm": 0.8134})
    'train 8.51 bits'
    """
    return _in_words(LEARNING, metrics)


def learning_now(metrics: Mapping[str, float]) -> str:
    """Say the same and the learning rate, for the live lines.

    >>> learning_now({"train/bits": 8.514, "valid/bits": 8.6, "train/learning_rate": 0.00182724})
    'train 8.51 bits  valid 8.60 bits  lr 0.00183'
    """
    return _in_words({**LEARNING, **RATE}, metrics)


def speed(metrics: Mapping[str, float], brief: bool = False) -> str:
    """Say how fast training is, and unless in brief, what limits it.

    >>> rates = {"perf/tokens_per_second": 1.05e6, "perf/predicted_per_second": 157020.0}
    >>> speed({**rates, "perf/mfu": 0.418, "perf/data_wait": 0.012, "memory/peak_gb": 61.25})
    '1.05M tok/s  157.0k predicted/s  mfu 42%  data wait 1%  61.2 GB'
    >>> speed({"perf/tokens_per_second": 21480.0, "perf/data_wait": 0.01}, brief=True)
    '21.5k tok/s'
    """
    return _in_words(BRIEF if brief else FULL, metrics)


def _in_words(formats: Formats, metrics: Mapping[str, float]) -> str:
    # What was not measured is left out: no MFU on a CPU.
    return "  ".join(say(metrics[name]) for name, say in formats.items() if name in metrics)


def _thousands(value: float) -> str:
    """Return a rate in about three digits.

    >>> [_thousands(value) for value in (45.2, 3020.0, 21480.0, 1.05e6)]
    ['45', '3.0k', '21.5k', '1.05M']
    """
    if value < 1000:
        return f"{value:.0f}"
    return f"{value / 1000:.1f}k" if value < 1e6 else f"{value / 1e6:.2f}M"
