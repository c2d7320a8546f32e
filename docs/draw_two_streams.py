"""Draw who sees whom: `python docs/draw_two_streams.py > docs/two_streams.svg`.

The picture is read off the entries that training uses; only the words are given.
"""

from typing import NamedTuple

import torch

from annotated_mpnet.mpnet.two_stream import mpnet_entries

WORDS = ["the", "task", "is", "sentence", "labelling", "[M]"]
PREDICTED = [3, 1]  # "sentence" first, "task" second
CELL, GAP, LEFT, TOP = 34, 6, 170, 92

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


class Entry(NamedTuple):
    """What goes through the network: its kind, its position, what it reads and what it sees."""

    kind: str
    position: int
    word: str
    sees: list[bool]


def entries_of_example() -> list[Entry]:
    """Return the entries of the example: the masked sentence, then content, then queries."""
    order = torch.tensor([PREDICTED])
    masked = torch.arange(len(WORDS) - 1)[None].clone()
    masked[0, PREDICTED] = WORDS.index("[M]")
    entries = mpnet_entries(masked, predicted_positions=order, predicted_ids=order)
    length, num_predicted = masked.shape[1], order.shape[1]
    kinds = ["sentence"] * length + ["content"] * num_predicted + ["query"] * num_predicted
    sees: list[list[bool]] = []
    for block in entries.blocks:
        shape = block.query_positions.shape[1], block.key_positions.shape[1]
        all_seen = torch.ones(shape, dtype=torch.bool)
        sees += (block.visibility.matrix()[0] if block.visibility else all_seen).tolist()
    positions = entries.position_ids.expand_as(entries.input_ids)[0].tolist()
    words = [WORDS[token] for token in entries.input_ids[0].tolist()]
    return [Entry(*each) for each in zip(kinds, positions, words, sees, strict=True)]


def svg(entries: list[Entry]) -> str:
    """Return the picture: keys across the top, entries down the side, blue means "sees"."""
    keys = [entry for entry in entries if entry.kind != "query"]
    length = sum(entry.kind == "sentence" for entry in entries)
    width, height = LEFT + CELL * len(keys) + 160, TOP + CELL * len(entries) + 16
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        f"<style>{STYLE}</style>",
    ]

    def place(index: int) -> int:
        return CELL * index + GAP * (index >= length)

    def text(x: int, y: int, words: str, attributes: str = "") -> None:
        parts.append(f'<text x="{x}" y="{y}" {attributes}>{words}</text>')

    text(LEFT, 20, "keys: the masked sentence", 'class="small"')
    text(LEFT + place(length), 20, "content", 'class="small"')
    for column, key in enumerate(keys):
        x = LEFT + place(column) + CELL // 2
        text(x, TOP - 10, key.word, f'transform="rotate(-45 {x} {TOP - 10})"')
    for number, entry in enumerate(entries):
        y = TOP + place(number)
        text(8, y + 21, f"{entry.kind} {entry.position}", f'class="{entry.kind}"')
        text(LEFT - 10, y + 21, entry.word, 'text-anchor="end"')
        for column, seen in enumerate(entry.sees):
            parts.append(
                f'<rect class="{"seen" if seen else "hidden"}" x="{LEFT + place(column) + 3}" '
                f'y="{y + 3}" width="{CELL - 6}" height="{CELL - 6}" rx="5"/>'
            )
        if entry.kind == "query":
            x = LEFT + place(len(keys)) + 10
            text(x, y + 21, f"predicts “{WORDS[entry.position]}”")
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    print(svg(entries_of_example()), end="")
