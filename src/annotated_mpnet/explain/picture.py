"""Draw who sees whom: as an SVG, or with matplotlib (the extra `plot`) as a PNG.

Both are the same shapes: keys across the top, entries down the side, blue means "sees".
"""

import html
import importlib.util
import io
import warnings
from itertools import pairwise
from typing import NamedTuple

from annotated_mpnet.errors import ConfigError
from annotated_mpnet.explain.explanation import Explanation, Objective
from annotated_mpnet.explain.terminal import NAMES, escaped

CELL, GAP, LETTER = 34, 6, 8
"""In pixels. The words' width is estimated: fonts differ."""

LARGEST_PNG = 4000
"""Pixels of its longer side, at most."""

LIGHT = {
    "text": "#1f2328",
    "small": "#59636e",
    "sentence": "#59636e",
    "content": "#2da44e",
    "query": "#d1242f",
    "seen": "#4c8bf5",
    "hidden": "#d9dee5",
}
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.small, .sentence { font-size: 11px; fill: #59636e }
.seen { fill: #4c8bf5 } .hidden { fill: #d9dee5 }
.content { fill: #2da44e } .query { fill: #d1242f }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .small, .sentence { fill: #9198a1 } .hidden { fill: #30363d }
  .content { fill: #3fb950 } .query { fill: #f85149 }
}
"""


class Words(NamedTuple):
    """A text that begins at (x, y), or ends there (`end`); a tilted one rises to the right."""

    x: int
    y: int
    text: str
    kind: str = "text"
    end: bool = False
    tilted: bool = False


class Square(NamedTuple):
    """A square of side CELL - 6 with its upper left corner at (x, y)."""

    x: int
    y: int
    kind: str


class Picture(NamedTuple):
    """Shapes on a canvas."""

    width: int
    height: int
    shapes: list[Words | Square]


def picture(objective: Objective) -> Picture:
    """Return the picture of an objective."""
    keys, predicts = objective.keys, {each.entry: each.token for each in objective.predictions}
    words = [_short(entry.reads) for entry in objective.entries]
    answers = [f"predicts “{_short(token)}”" for token in predicts.values()]
    left = max(170, 90 + LETTER * max(map(len, words)))
    top = max(92, 41 + int(0.7 * LETTER * max(map(len, words[: len(keys)]))))

    def place(index: int, of_keys: bool = False) -> int:
        entries = objective.entries[: index + 1]
        gaps = sum(a.group != b.group for a, b in pairwise(entries))
        return CELL * index + GAP * gaps + (left if of_keys else top)

    shapes: list[Words | Square] = []
    for column, key in enumerate(keys):
        x = place(column, of_keys=True)
        if column == 0 or key.group != keys[column - 1].group:
            shapes.append(Words(x, 20, _group(key.group, first=column == 0), "small"))
        shapes.append(Words(x + CELL // 2, top - 10, words[column], tilted=True))
    for row, entry in enumerate(objective.entries):
        y = place(row)
        shapes.append(Words(8, y + 21, f"{entry.group} {entry.position}", entry.group))
        shapes.append(Words(left - 10, y + 21, words[row], end=True))
        shapes += [
            Square(place(column, of_keys=True) + 3, y + 3, "seen" if sees else "hidden")
            for column, sees in enumerate(entry.sees)
        ]
        if row in predicts:
            x = place(len(keys) - 1, of_keys=True) + CELL + 10
            shapes.append(Words(x, y + 21, f"predicts “{_short(predicts[row])}”"))
    right = 20 + LETTER * max(map(len, answers))
    width = place(len(keys) - 1, of_keys=True) + CELL + max(160, right)
    return Picture(width, place(len(objective.entries) - 1) + CELL + 16, shapes)


def _group(group: str, first: bool) -> str:
    name = "the masked sentence" if group == "sentence" else group
    return f"keys: {name}" if first else name


def _short(text: str, most: int = 20) -> str:
    text = escaped(text)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def svg(drawn: Picture) -> str:
    """Return a picture as SVG, which follows the reader's light or dark mode."""
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" '
        f'viewBox="0 0 {drawn.width} {drawn.height}" role="img">',
        f"<style>{STYLE}</style>",
    ]
    for each in drawn.shapes:
        at = f'x="{each.x}" y="{each.y}"'
        if isinstance(each, Square):
            size = f'width="{CELL - 6}" height="{CELL - 6}" rx="5"'
            parts.append(f'<rect class="{each.kind}" {at} {size}/>')
        else:
            how = f' class="{each.kind}"' * (each.kind != "text")
            how += ' text-anchor="end"' * each.end
            how += f' transform="rotate(-45 {each.x} {each.y})"' * each.tilted
            parts.append(f"<text {at}{how}>{html.escape(each.text, quote=False)}</text>")
    return "\n".join([*parts, "</svg>"]) + "\n"


def require_matplotlib() -> None:
    """Raise a `ConfigError` if it is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "--png needs matplotlib, which is not installed: pip install 'annotated-mpnet[plot]'; "
            "--html needs nothing"
        )


def png(explanation: Explanation) -> tuple[bytes, str]:
    """Draw the objective that was asked for; return the file and what is to be said of it."""
    # Not pyplot, which looks for a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import PatchCollection
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    drawn = picture(explanation.shown)
    title = 30
    longest = max(drawn.width, drawn.height + title)
    figure = Figure(
        figsize=(drawn.width / 100, (drawn.height + title) / 100),
        dpi=min(150, 100 * LARGEST_PNG / longest),
    )
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, drawn.width), ylim=(drawn.height, -title))
    axes.axis("off")
    # A token may have a $ in it, which is not the beginning of a formula.
    heading = _short(f"{NAMES[explanation.input_mode]}: {explanation.sentence}", drawn.width // 8)
    axes.text(8, -10, heading, size=9, weight="bold", parse_math=False)
    squares = [each for each in drawn.shapes if isinstance(each, Square)]
    boxes = [Rectangle((each.x, each.y), CELL - 6, CELL - 6) for each in squares]
    colours = [LIGHT[each.kind] for each in squares]
    axes.add_collection(PatchCollection(boxes, facecolors=colours, linewidths=0))
    for each in drawn.shapes:
        if isinstance(each, Words):
            axes.text(
                each.x,
                each.y,
                each.text,
                size=7 if each.kind != "text" else 8.5,
                color=LIGHT[each.kind],
                ha="right" if each.end else "left",
                rotation=45 if each.tilted else 0,
                rotation_mode="anchor",
                parse_math=False,
            )
    file = io.BytesIO()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure.savefig(
            file, format="png", facecolor="white", metadata={"Software": "explain-mpnet"}
        )
    lacking = any("missing from" in str(each.message) for each in caught)
    note = " (boxes: letters that matplotlib's font lacks; --html has them)" if lacking else ""
    return file.getvalue(), note
