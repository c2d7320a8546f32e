"""Draw who sees whom with matplotlib (the extra `plot`), as a PNG.

Keys are across the top, entries down the side; blue means "sees".
"""

import importlib.util
import io
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from annotated_mpnet.errors import ConfigError
from annotated_mpnet.explain.explanation import Entry, Explanation
from annotated_mpnet.explain.terminal import escaped

LARGEST_PNG = 4000
"""Pixels of its longer side, at most."""

CELL, GAP = 0.34, 0.2
"""Inches of a square with its margin; the space between groups, in squares."""

SEEN, HIDDEN = "#4c8bf5", "#d9dee5"
COLOURS = {"sentence": "#59636e", "content": "#2da44e", "query": "#d1242f"}


def require_matplotlib() -> None:
    """Raise a `ConfigError` if it is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "--png needs matplotlib, which is not installed: pip install 'annotated-mpnet[plot]'; "
            "--html needs nothing"
        )


def png(explanation: Explanation) -> tuple[bytes, str]:
    """Draw the objective that was asked for; return the file and what is to be said of it."""
    file = io.BytesIO()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure = draw(explanation)
        box = figure.get_tightbbox()
        figure.savefig(
            file,
            format="png",
            dpi=min(150, LARGEST_PNG / (max(box.width, box.height) + 0.2)),
            bbox_inches="tight",
            facecolor="white",
            metadata={"Software": "explain-mpnet"},
        )
    lacking = any("missing from" in str(each.message) for each in caught)
    note = " (boxes: letters that matplotlib's font lacks; --html has them)" if lacking else ""
    return file.getvalue(), note


def draw(explanation: Explanation) -> Any:
    """Return the picture of the objective that was asked for, a `Figure` of matplotlib."""
    # Not pyplot, which looks for a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import PatchCollection
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    objective = explanation.shown
    keys, entries = objective.keys, objective.entries
    columns, lines = _places(keys), _places(entries)
    figure = Figure(figsize=(CELL * (columns[-1] + 1), CELL * (lines[-1] + 1)))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.5, columns[-1] + 0.5), ylim=(lines[-1] + 0.5, -0.5), frame_on=False)
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=8.5)
    # A token may have a $ in it, which is not the beginning of a formula.
    tilted: dict[str, Any] = {
        "rotation": 45,
        "rotation_mode": "anchor",
        "ha": "left",
        "parse_math": False,
    }
    axes.set_xticks(columns, [_short(key.reads) for key in keys], **tilted)
    names = [f"{entry.group} {entry.position}   {_short(entry.reads)}" for entry in entries]
    axes.set_yticks(lines, names, parse_math=False)
    for label, entry in zip(axes.get_yticklabels(), entries, strict=True):
        label.set_color(COLOURS[entry.group])
    squares = []
    colours = []
    for y, entry in zip(lines, entries, strict=True):
        for x, sees in zip(columns, entry.sees, strict=False):
            squares.append(Rectangle((x - 0.41, y - 0.41), 0.82, 0.82))
            colours.append(SEEN if sees else HIDDEN)
    axes.add_collection(PatchCollection(squares, facecolors=colours, linewidths=0))
    words: dict[str, Any] = {"size": 8.5, "va": "center_baseline", "parse_math": False}
    for each in objective.predictions:
        says = f"predicts “{_short(each.token)}”"
        axes.text(columns[-1] + 0.7, lines[each.entry], says, **words)
    for number, key in enumerate(keys):
        if number == 0 or key.group != keys[number - 1].group:
            group: str = "the masked sentence" if key.group == "sentence" else key.group
            name = group if number else f"keys: {group}"
            axes.text(columns[number] - 0.4, lines[-1] + 0.7, name, size=7, va="top")
    heading = _short(f"{objective.name}: {explanation.sentence}", 25 + 4 * len(keys))
    axes.set_title(heading, loc="left", size=9, weight="bold", parse_math=False)
    return figure


def _places(entries: Sequence[Entry]) -> list[float]:
    """Return where each entry is drawn, in squares; there is a gap between groups."""
    places = [0.0]
    for before, entry in pairwise(entries):
        places.append(places[-1] + 1 + GAP * (before.group != entry.group))
    return places


def _short(text: str, most: int = 20) -> str:
    text = escaped(text)
    return text if len(text) <= most else f"{text[: most - 1]}…"
