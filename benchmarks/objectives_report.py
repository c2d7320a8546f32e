"""What `objectives.py` has measured: a table and a picture."""

import argparse
import statistics

from common import Found, Results
from end_to_end import GRAY, LABELS, make_plain
from probe import TASKS, Scores, interval, line

LABELS_HERE = LABELS | {"plm": "PLM, local start"}


def of_seeds(
    arguments: argparse.Namespace, results: Results, name: str, updates: int
) -> list[list[Found]]:
    """Return the scores of each seed of a learner, in the order of its checkpoints."""
    return [
        [
            each
            for each in results.lines
            if each["kind"] == "scores"
            and (each["learner"], each["seed"], each["updates"]) == (name, seed, updates)
        ]
        for seed in arguments.seeds
    ]


def show_summary(
    title: str, arguments: argparse.Namespace, results: Results, updates: dict[str, int]
) -> None:
    """Print the scores at the end of the runs."""
    print(f"\n{title}, seeds {' '.join(map(str, arguments.seeds))}")
    print(f"{'':<28}" + "".join(f"{task:>7}{'':5}" for task in TASKS).rstrip())
    for name in arguments.learners:
        found = of_seeds(arguments, results, name, updates[name])
        ends = [seed[-1]["scores"] for seed in found]
        scores: Scores = {
            task: [statistics.mean(end[task]) for end in ends] for task in TASKS if task in ends[0]
        }
        seconds = statistics.mean(seed[-1]["seconds"] for seed in found)
        print(line(f"{name}, {updates[name]:,} updates, {seconds:.0f} s", scores))


def draw(
    arguments: argparse.Namespace,
    results: Results,
    by_time: dict[str, int],
    same: dict[str, int],
) -> None:
    """Draw each score over the time, and over the tokens."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    (first, *_), *_ = of_seeds(
        arguments, results, arguments.learners[0], same[arguments.learners[0]]
    )
    # Not `tuned`, which is asked at the end only.
    tasks = [task for task in TASKS if task in first["scores"]]
    figure = Figure(figsize=(7, 2.2 * len(tasks)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(tasks), 2, squeeze=False)
    for task, pair in zip(tasks, grid, strict=True):
        for axes, x, updates in zip(pair, ("seconds", "tokens"), (by_time, same), strict=True):
            for name in arguments.learners:
                seeds = of_seeds(arguments, results, name, updates[name])
                points = list(zip(*seeds, strict=True))
                at = [statistics.mean(each[x] for each in point) for point in points]
                values = [
                    [statistics.mean(each["scores"][task]) for each in point] for point in points
                ]
                middle = [interval(each)[0] for each in values]
                (drawn,) = axes.plot(at, middle, marker="o", markersize=3, label=LABELS_HERE[name])
                low, high = [min(each) for each in values], [max(each) for each in values]
                axes.fill_between(at, low, high, color=drawn.get_color(), alpha=0.2)
            make_plain(axes, f"{x} of training", task)
    grid[0][0].legend(labelcolor=GRAY, framealpha=0, fontsize=8)
    figure.savefig(arguments.picture, transparent=True, metadata={"Date": None})
