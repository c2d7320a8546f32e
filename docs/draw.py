"""Draw the pictures of the documentation: `python docs/draw.py` writes them all.

Each is read off functions that training uses; the paper's permuted form is that of the oracle in
the tests. `docs/plateau.svg` is a measurement and comes from `benchmarks/end_to_end.py`.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import torch

from annotated_mpnet.explain.explanation import objective_of
from annotated_mpnet.mpnet.batch import Batch
from annotated_mpnet.mpnet.config import OptimizationConfig
from annotated_mpnet.mpnet.local_start import PREFERRED_OFFSETS, local_bias
from annotated_mpnet.mpnet.optimizer import learning_rate
from annotated_mpnet.mpnet.positions import relative_position_bucket

DOCS = Path(__file__).parent
sys.path.append(str(DOCS.parent / "tests" / "mpnet"))

from oracle import lay_out  # noqa: E402

WORDS = ["the", "task", "is", "sentence", "labelling", "[M]"]
MASK = WORDS.index("[M]")
PREDICTED = [3, 1]  # "sentence" first, "task" second
CELL, GAP, LEFT, TOP = 34, 6, 170, 92

STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.small, .sentence { font-size: 11px; fill: #59636e }
.seen { fill: #4c8bf5 } .mask { fill: #d4a72c } .hidden { fill: #d9dee5 }
.content { fill: #2da44e } .query { fill: #d1242f }
.axis { stroke: #d9dee5; fill: none } .line { fill: none; stroke-width: 2 }
.a { stroke: #4c8bf5 } .b { stroke: #d1242f } .c { stroke: #2da44e }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .small, .sentence { fill: #9198a1 } .hidden { fill: #30363d }
  .mask { fill: #bb8009 } .content { fill: #3fb950 } .query { fill: #f85149 }
  .axis { stroke: #30363d } .b { stroke: #f85149 } .c { stroke: #3fb950 }
}
"""


class Entry(NamedTuple):
    """What goes through the network: its kind, its position, what it reads and which keys it sees.

    There are fewer keys where the scores of the last ones are not even computed.
    """

    kind: str
    position: int
    word: str
    sees: Sequence[bool]


class Picture:
    """The parts of an SVG, which follows the reader's light or dark mode."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def text(self, x: float, y: float, words: str, attributes: str = "") -> None:
        """Write words."""
        self.parts.append(f'<text x="{x:g}" y="{y:g}" {attributes}>{words}</text>')

    def cell(self, x: float, y: float, kind: str) -> None:
        """Fill a square of a matrix."""
        size = f'width="{CELL - 6}" height="{CELL - 6}" rx="5"'
        self.parts.append(f'<rect class="{kind}" x="{x + 3:g}" y="{y + 3:g}" {size}/>')

    def line(self, points: Iterable[tuple[float, float]], kind: str) -> None:
        """Join points."""
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polyline class="{kind}" points="{joined}"/>')

    def svg(self, width: float, height: float) -> str:
        """Return the whole file."""
        box = f'viewBox="0 0 {width:g} {height:g}" role="img"'
        head = [f'<svg xmlns="http://www.w3.org/2000/svg" {box}>', f"<style>{STYLE}</style>"]
        return "\n".join([*head, *self.parts, "</svg>"]) + "\n"


def example() -> Batch:
    """Return the five words as a batch."""
    order = torch.tensor([PREDICTED])
    length = len(WORDS) - 1
    masked = torch.arange(length)[None].index_fill(1, order[0], MASK)
    return Batch(masked, order, order, None, length, len(PREDICTED))


def natural_form() -> list[Entry]:
    """Return the entries of the example in natural order, as `explain-mpnet` draws them."""
    objective = objective_of("mpnet", example(), WORDS.__getitem__, MASK)
    return [Entry(each.group, each.position, each.reads, each.sees) for each in objective.entries]


def permuted_form() -> list[Entry]:
    """Return the paper's entries: the content stream, permuted, then the queries."""
    paper = lay_out(example(), 0, "mpnet", MASK)
    kinds = ["sentence"] * 3 + ["content"] * 2 + ["sentence"] * 2 + ["query"] * 2
    return [
        Entry(kind, position, WORDS[token], [bool(seen) for seen in sees])
        for kind, position, token, sees in zip(
            kinds,
            paper.content_positions + paper.query_positions,
            paper.content_ids + paper.query_ids,
            paper.content_sees + paper.query_sees,
            strict=True,
        )
    ]


def who_sees_whom(
    picture: Picture, left: float, entries: Sequence[Entry], seen_mask: str
) -> tuple[list[float], list[float]]:
    """Draw the keys across the top and the entries down the side.

    Returns:
        Where the columns and the lines begin.
    """
    keys = [entry for entry in entries if entry.kind != "query"]
    columns, lines = _places(left + LEFT, keys), _places(TOP, entries)
    for x, key in zip(columns, keys, strict=True):
        middle = x + CELL // 2
        tilted = f'transform="rotate(-45 {middle:g} {TOP - 10})"'
        picture.text(middle, TOP - 10, key.word, tilted)
    for y, entry in zip(lines, entries, strict=True):
        name = f"{entry.kind} {entry.position}"
        picture.text(left + 8, y + 21, name, f'class="{entry.kind}"')
        picture.text(left + LEFT - 10, y + 21, entry.word, 'text-anchor="end"')
        for x, key, sees in zip(columns, keys, entry.sees, strict=False):
            seen = seen_mask if key.word == "[M]" else "seen"
            picture.cell(x, y, seen if sees else "hidden")
    return columns, lines


def _places(start: float, entries: Sequence[Entry]) -> list[float]:
    """Return where each entry begins; there is a gap between kinds."""
    gaps = [GAP * (before.kind != after.kind) for before, after in pairwise(entries)]
    return list(accumulate(gaps, lambda place, gap: place + CELL + gap, initial=start))


def two_streams() -> str:
    """Draw the example."""
    picture = Picture()
    columns, lines = who_sees_whom(picture, 0, natural_form(), seen_mask="seen")
    picture.text(columns[0], 20, "keys: the masked sentence", 'class="small"')
    picture.text(columns[-len(PREDICTED)], 20, "content", 'class="small"')
    for y, position in zip(lines[-len(PREDICTED) :], PREDICTED, strict=True):
        picture.text(columns[-1] + CELL + 10, y + 21, f"predicts “{WORDS[position]}”")
    return picture.svg(columns[-1] + CELL + 172, lines[-1] + CELL + 16)


def permutation() -> str:
    """Draw the paper's permuted form beside the natural order; yellow: a mask is seen."""
    picture, right = Picture(), 0.0
    for title, entries in (
        ("the paper: permuted", permuted_form()),
        ("this project: natural order", natural_form()),
    ):
        picture.text(right + LEFT, 16, title)
        columns, lines = who_sees_whom(picture, right, entries, seen_mask="mask")
        right = columns[-1] + CELL + 30
    return picture.svg(right, lines[-1] + CELL + 16)


def relative_bias() -> str:
    """Draw the bucket of each distance, and what the local start adds to two heads' scores."""
    picture = Picture()
    distances = torch.arange(-140, 141)
    buckets = relative_position_bucket(distances, num_buckets=32, max_distance=128)
    ticks = (-128, -64, 0, 64, 128), (0, 16, 31)
    draw = _chart(picture, 40, "bucket of a distance", (-140, 140), (0, 31), ticks)
    draw(zip(distances.tolist(), buckets.tolist(), strict=True), "a", "")

    near = torch.arange(-16, 17)
    bias_NH = local_bias(32, 128, len(PREFERRED_OFFSETS))[relative_position_bucket(near, 32, 128)]
    ticks = (-16, -8, -1, 1, 8, 16), (-8, 0)
    draw = _chart(picture, 440, "local start", (-16, 16), (-9, 0), ticks)
    for head, kind in ((0, "a"), (1, "b")):
        draw(zip(near.tolist(), bias_NH[:, head].tolist(), strict=True), kind, f"head {head}")
    return picture.svg(800, 260)


def schedules() -> str:
    """Draw the learning rate of each schedule over a run."""
    picture = Picture()
    ticks = (0, 20, 160, 200), (0, 1)
    draw = _chart(picture, 40, "learning rate", (0, 200), (0, 1), ticks, width=640)
    for schedule, kind in (("polynomial", "a"), ("cosine", "b"), ("wsd", "c")):
        config = OptimizationConfig(total_updates=200, lr=1.0, schedule=schedule)
        rates = [learning_rate(update, config) for update in range(config.total_updates + 1)]
        draw(enumerate(rates), kind, schedule)
    return picture.svg(720, 260)


def _chart(
    picture: Picture,
    left: int,
    title: str,
    xs: tuple[float, float],
    ys: tuple[float, float],
    ticks: tuple[Sequence[float], Sequence[float]],
    width: int = 320,
) -> Callable[[Iterable[tuple[float, float]], str, str], None]:
    """Draw axes; return what draws a curve in them, and its name beside the title."""
    top, bottom = 36, 220

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            left + width * (x - xs[0]) / (xs[1] - xs[0]),
            bottom - (bottom - top) * (y - ys[0]) / (ys[1] - ys[0]),
        )

    picture.text(left, 18, title)
    for tick in ticks[0]:
        x, _ = at(tick, ys[0])
        picture.line([(x, top), (x, bottom)], "axis")
        picture.text(x, bottom + 18, f"{tick:g}", 'class="small" text-anchor="middle"')
    for tick in ticks[1]:
        _, y = at(xs[0], tick)
        picture.line([(left, y), (left + width, y)], "axis")
        picture.text(left - 6, y + 4, f"{tick:g}", 'class="small" text-anchor="end"')
    named = 0

    def draw(points: Iterable[tuple[float, float]], kind: str, name: str) -> None:
        nonlocal named
        picture.line([at(*point) for point in points], f"line {kind}")
        if name:
            x = left + 7 * len(title) + 24 + 90 * named
            picture.line([(x, 14), (x + 16, 14)], f"line {kind}")
            picture.text(x + 20, 18, name, 'class="small"')
            named += 1

    return draw


PICTURES = {
    "two_streams.svg": two_streams,
    "permutation.svg": permutation,
    "relative_bias.svg": relative_bias,
    "schedules.svg": schedules,
}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (DOCS / name).write_text(draw(), encoding="utf-8")
