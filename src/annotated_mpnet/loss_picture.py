"""`loss.png`: the curves of a run, as they stand in its `metrics.jsonl`.

On top the loss, in bits per predicted token: training as a thin line, validation as a line with
points, the unigram plateau of the validation text dashed. A dotted line marks the update at which
training left the plateau (`training/plateau.py`). How to read it:

    far above the plateau      nothing is learned yet, not even frequencies
    on the plateau, and flat   frequencies, but no context: here small runs die
    below, both falling        the network reads
    training falls on, while   it learns its text by heart: more text, more dropout, or an end; the
    validation rises           best checkpoint is the one of the lowest point
    a sudden rise of both      too high a learning rate, if it does not come back by itself

Training and validation are not to be compared to the hundredth of a bit: the former is measured
with dropout, while the weights change, and on other text.

Below it, tokens per second, on the same axis of updates: a gap is another program's load, a slow
fall is text that cannot be read fast enough.

matplotlib draws it, an extra; whoever has none gets a sentence in place of the picture. The file
has no date in it and no name: the same metrics give the same picture.

Next: `report.py`, whose page shows it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Records = Sequence[dict[str, float]]
"""Lines of metrics, each with its update under `step`."""


def draw(
    path: Path, records: Records, plateau_bits: float | None, left_plateau_at: int | None
) -> str | None:
    """Draw the picture; return what to say instead of it if that was not possible.

    Args:
        path: of the picture.
        records: the lines of metrics.
        plateau_bits: the unigram plateau of the validation text, if it is known.
        left_plateau_at: the update at which training left the plateau, if it did.

    Raises:
        OSError: it could not be written.
    """
    try:
        # Without pyplot: no window system is looked for, and no state is left behind.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return "(No picture: `pip install 'annotated-mpnet[plot]'` brings what draws it.)"
    # What is wrong with a picture is wrong with somebody's installation, a font or a version of
    # numpy, and can be anything; the page has the same numbers.
    try:
        figure = Figure(figsize=(8, 6), layout="constrained")
        FigureCanvasAgg(figure)
        # One axis of updates for both, so that a step in the speed is found in the loss.
        loss, speed = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        _draw_loss(loss, records, plateau_bits, left_plateau_at)
        _draw_speed(speed, records)
        figure.savefig(path, dpi=120, metadata={"Software": None})
    except OSError:
        raise
    except Exception as error:
        return f"(No picture: {' '.join(str(error).split())[:200]})"
    return None


def _draw_loss(
    axes: "Axes", records: Records, plateau_bits: float | None, left_plateau_at: int | None
) -> None:
    # Training is drawn thin: its points are many, each a mean over a few updates, and noise. Those
    # of validation are few, and each is worth a mark: between them nothing was measured.
    train, valid = _curve(records, "train/bits"), _curve(records, "valid/bits")
    if train[0]:
        axes.plot(*train, label="training", linewidth=0.8, color="tab:blue")
    if valid[0]:
        axes.plot(*valid, label="validation", marker="o", markersize=3, color="tab:orange")
    # The plateau is that of the validation text; the training's is a little lower as a rule,
    # since its frequencies are the very ones that are guessed by.
    if plateau_bits is not None:
        axes.axhline(plateau_bits, linestyle="--", color="gray", label="plateau (validation)")
    if left_plateau_at is not None:
        label = f"left the plateau, update {left_plateau_at:,}"
        axes.axvline(left_plateau_at, linestyle=":", color="tab:green", label=label)
    axes.set_ylabel("bits per predicted token")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()


def _draw_speed(axes: "Axes", records: Records) -> None:
    axes.plot(*_curve(records, "perf/tokens_per_second"), linewidth=0.8, color="tab:blue")
    # From zero: half the speed should look like half. A loss has no such zero.
    axes.set_ylim(bottom=0)
    axes.set_ylabel("tokens per second")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("updates")
    axes.grid(alpha=0.3)


def _curve(records: Records, key: str) -> tuple[list[float], list[float]]:
    """Return updates and values of the lines that have a metric.

    >>> _curve([{"step": 20, "a": 1.5}, {"step": 20, "b": 3.0}, {"step": 40, "a": 1.0}], "a")
    ([20, 40], [1.5, 1.0])
    """
    points = [(record["step"], record[key]) for record in records if key in record]
    return [step for step, _ in points], [value for _, value in points]
