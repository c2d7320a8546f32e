"""What a reader sees of a run: the live lines of a terminal, numbers in words, the time of its end.

Three live lines at the bottom of a terminal, each within 80 columns: how far, how good, how fast.
What is said goes above them and stays.

    update 320/1000 ━━━━━━━━━━━━━━━                                  12 min left
    train 8.51 bits  valid 8.60 bits  acc 0.124
    21.5k tok/s  3.0k predicted/s  data wait 1%  0.9 GB

Where nobody watches (a file, a pipe, a scheduler's log) a bar that redraws itself would be pages of
noise, and the lines of metrics are printed instead, one a line.

**What is worth a place there?** Of a dozen metrics, those that somebody acts upon. Bits and
accuracy say whether it learns. Tokens per second and MFU say whether the machine is used, and the
two behind them, if not, why not: `data wait` above a few per cent means that the text is not read
fast enough, and memory says whether a larger micro-batch would fit. Learning rate and gradient norm
are looked at afterwards, in curves.

**When will it be done?** Updates left x seconds per update, where the latter come from the clock on
the wall: evaluations and checkpoints included, and whatever else the machine does. The first update
of a start is left out: kernels are chosen and compiled in it. It is said once, when the first line
of metrics comes, and the bar goes on saying how much is left.

>>> finish_line(9500, 1.25, now=datetime(2026, 3, 1, 14, 30))
'finishes at about 17:47 (in 3 h 17 min) at this speed'
>>> finish_line(95000, 1.25, now=datetime(2026, 3, 1, 14, 30))
'finishes at about 23:29 on 2026-03-02 (in 1 d 8 h) at this speed'

Next: `tracking/tracker.py`, which says all this.
"""

from collections.abc import Callable, Iterable
from datetime import datetime, timedelta

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from annotated_mpnet.tracking.sinks import Metrics


class LiveLines(Progress):
    """The bar, and under it what is learned and how fast: side by side they need more columns.

    rich redraws them ten times a second from a thread of its own, whatever the loop does, so that
    to change them costs the loop nothing.

    Attributes:
        numbers: the lines under the bar, in words.
    """

    numbers: tuple[str, ...] = ()

    def __init__(self, total: int, console: Console) -> None:
        # rich has a column for the time left too, which knows the last half minute only: between
        # two evaluations it is too hopeful, and after one too gloomy. The tracker knows better.
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
        """Show how far it is, and how long it will take."""
        self.update(self._task, completed=step, left=left)

    def get_renderables(self) -> Iterable[RenderableType]:
        """Return the lines."""
        yield self.make_tasks_table(self.tasks)
        # Cut off at the edge, not wrapped: a line more or less would make the rest jump.
        for line in self.numbers:
            yield Text(line, no_wrap=True, overflow="ellipsis")


def finish_line(updates_left: int, seconds_per_update: float, now: datetime | None = None) -> str:
    """Say when a run will be done, if it goes on as it does.

    Args:
        updates_left: how many are still to be done.
        seconds_per_update: on the clock on the wall.
        now: from when to count; from this moment if not given.
    """
    now = now or datetime.now()
    seconds = updates_left * seconds_per_update
    end = now + timedelta(seconds=seconds)
    day = "" if end.date() == now.date() else f" on {end:%Y-%m-%d}"
    return f"finishes at about {end:%H:%M}{day} (in {duration(seconds)}) at this speed"


def duration(seconds: float) -> str:
    """Say how long something takes, as exactly as one wants to know.

    >>> [duration(seconds) for seconds in (4.2, 75, 725, 12000, 190000)]
    ['4 s', '1 min 15 s', '12 min', '3 h 20 min', '2 d 4 h']
    """
    # Two units at the most, and only one where the smaller one changes while one is reading.
    whole = round(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    if minutes >= 10:
        return f"{minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


Format = Callable[[float], str]

# In the order in which they are shown, by the names that they have in `metrics.jsonl`.

LEARNING: dict[str, Format] = {
    "train/bits": lambda value: f"train {value:.2f} bits",
    "valid/bits": lambda value: f"valid {value:.2f} bits",
    "valid/accuracy": lambda value: f"acc {value:.3f}",
}
BRIEF: dict[str, Format] = {
    "perf/tokens_per_second": lambda value: f"{_thousands(value)} tok/s",
    "perf/predicted_per_second": lambda value: f"{_thousands(value)} predicted/s",
    "perf/mfu": lambda value: f"mfu {value:.0%}",
}
FULL: dict[str, Format] = {
    **BRIEF,
    "perf/data_wait": lambda value: f"data wait {value:.0%}",
    "memory/peak_gb": lambda value: f"{value:.1f} GB",
}


def learning(metrics: Metrics) -> str:
    """Say how good it is.

    >>> learning({"train/bits": 8.514, "train/loss": 5.9, "train/gradient_norm": 0.8134})
    'train 8.51 bits'
    """
    return _shown(LEARNING, metrics)


def speed(metrics: Metrics, brief: bool = False) -> str:
    """Say how fast it is; with what limits it, if there is room.

    >>> rates = {"perf/tokens_per_second": 1.05e6, "perf/predicted_per_second": 157020.0}
    >>> speed({**rates, "perf/mfu": 0.418, "perf/data_wait": 0.012, "memory/peak_gb": 61.25})
    '1.05M tok/s  157.0k predicted/s  mfu 42%  data wait 1%  61.2 GB'
    >>> speed({"perf/tokens_per_second": 21480.0, "perf/data_wait": 0.01}, brief=True)
    '21.5k tok/s'
    """
    return _shown(BRIEF if brief else FULL, metrics)


def _shown(formats: dict[str, Format], metrics: Metrics) -> str:
    # What was not measured is left out: no MFU on a CPU, no validation without text for it.
    return "  ".join(say(metrics[name]) for name, say in formats.items() if name in metrics)


def _thousands(value: float) -> str:
    """Return a rate in three digits or so.

    >>> [_thousands(value) for value in (45.2, 3020.0, 21480.0, 1.05e6)]
    ['45', '3.0k', '21.5k', '1.05M']
    """
    if value < 1000:
        return f"{value:.0f}"
    return f"{value / 1000:.1f}k" if value < 1e6 else f"{value / 1e6:.2f}M"
