"""Draw an explanation on a terminal, with rich. Nothing is computed here.

Letters carry the meaning; colours repeat it, so a pipe and NO_COLOR lose nothing.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from heapq import nlargest
from operator import itemgetter

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from annotated_mpnet.explain.explanation import Entry, Explanation, Objective, Prediction

STYLES = {"sentence": "", "content": "green", "query": "red"}
JOINERS = "\u200c\u200d"
"""Invisible, but scripts and emoji need them."""
NOTHING = "--"
"""Drawn where a prediction knows nothing of a position."""

LEGEND = (
    "x: the entry on the left sees the key at this position. Dot: hidden. Blank: not",
    "computed. time: how many predictions the entry may know. ->: what it predicts.",
)


def escaped(text: str) -> str:
    r"""Return a text that cannot move the cursor or turn the direction of what follows.

    >>> print(escaped("caf\u00e9 \x1b[2J \u202e"))
    café \x1b[2J \u202e
    """
    return "".join(
        repr(each)[1:-1]
        if unicodedata.category(each) in ("Cc", "Cf", "Zl", "Zp") and each not in JOINERS
        else each
        for each in text
    )


def percent(share: float) -> str:
    """Return a share in per cent, with a digit more where it is small.

    >>> percent(0.834), percent(0.0123), percent(0.0001)
    ('83%', '1.2%', '<0.1%')
    """
    if 0 < share < 0.001:
        return "<0.1%"
    return f"{100 * share:.0f}%" if share >= 0.1 else f"{100 * share:.1f}%"


def show(explanation: Explanation, console: Console) -> None:
    """Print the whole explanation."""

    def say(text: str, style: str = "") -> None:
        # A `Text`, since brackets in a sentence are brackets.
        console.print(Text(escaped(text), style))

    def head(text: str) -> None:
        console.print()
        say(text, "bold")

    objective = explanation.shown
    say(explanation.sentence, "bold")
    for line in explanation.about:
        say(line)
    head("The sentence")
    console.print(_sentence(explanation))
    head(f"{objective.name}: what goes through the network, and who sees whom")
    lines = list(_picture(objective))
    width = max(cell_len(row.plain) for row in lines)
    if console.is_terminal and width > console.width:
        say(
            f"The picture needs {width} columns and the terminal has {console.width}; "
            "`--html FILE` draws it, and `| less -S` scrolls."
        )
    else:
        for row in lines:
            console.print(row, soft_wrap=True)
        for text in LEGEND:
            say(text, "dim")
    head("One prediction at a time")
    if explanation.buckets:
        say("bucket: the relative position bucket of a token, seen from the predicted one", "dim")
    for each in objective.predictions:
        for part in _prediction(explanation, each, console.width):
            console.print(part)
    head("The three objectives, on the same predicted tokens")
    console.print(_comparison(explanation))
    say(
        "Shares are means over the predictions, of all tokens of the sentence. A mask, or what is "
        "in place of one (marked with a ?), counts as a position and not as a token.",
        "dim",
    )


def _table(*columns: str, right: Sequence[str] = ()) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left")
    return table


def _sentence(explanation: Explanation) -> Table:
    headers = "position", "token", "word", "prediction", "the model reads"
    table = _table(*headers, right=["position", "word", "prediction"])
    words: dict[int, int] = {}
    for position, token in enumerate(explanation.tokens):
        number = words.setdefault(token.word, len(words) + 1) if token.word >= 0 else ""
        # In plm nothing is corrupted.
        kind = token.kind if explanation.input_mode != "plm" else ""
        said = {"random": "  (a random token)", "kept": "  (kept as it is)"}.get(kind, "")
        table.add_row(
            str(position),
            Text(escaped(token.text), style="red" if token.rank else ""),
            str(number),
            str(token.rank or ""),
            Text(escaped(token.reads if kind else token.text) + said),
        )
    return table


def _picture(objective: Objective) -> Iterator[Text]:
    """Yield the positions of the keys, digits below each other, and a line for each entry."""
    keys = objective.keys
    gaps = [i > 0 and keys[i].group != keys[i - 1].group for i in range(len(keys))]
    digits = len(str(max(key.position for key in keys)))
    for digit in range(digits):
        last = digit == digits - 1
        head = "entry     at  reads         time " if last else " " * 33
        numbers = [f"{key.position:>{digits}}"[digit] for key in keys]
        yield Text(head + _cells(numbers, gaps), style="dim")
    predicts = {each.entry: each.token for each in objective.predictions}
    for number, entry in enumerate(objective.entries):
        line = Text(f"{entry.group:<8}", style=STYLES[entry.group])
        reads = set_cell_size(escaped(entry.reads), 12)
        line.append(f" {entry.position:>3}  {reads}  {entry.time:>4} ", style="default")
        line.append(_cells(["x" if sees else "." for sees in entry.sees], gaps), style="blue")
        if number in predicts:
            missing = 2 * (len(keys) - len(entry.sees))
            line.append(f"{' ' * missing}   -> {escaped(predicts[number])}", style="default")
        yield line


def _cells(cells: Sequence[str], gaps: Sequence[bool]) -> str:
    return "".join(f"{'  ' * gap} {cell}" for cell, gap in zip(cells, gaps, strict=False))


def _prediction(explanation: Explanation, each: Prediction, width: int) -> Iterator[Text | Padding]:
    yield Text(
        f"{each.number}. To predict {_quoted(each.token)} ({each.position}), it sees "
        f"{each.tokens_seen} tokens and {each.positions_seen} positions of "
        f"{len(explanation.tokens)}:"
    )
    seen = explanation.shown.seen_by(each.entry)
    rows = [["sees  ", *_said(seen)]]
    if explanation.buckets:
        buckets = [
            NOTHING if key is None else str(explanation.bucket(each.position, key.position))
            for key in seen
        ]
        rows.append(["bucket", *buckets])
    lines = [["  "] * len(rows)]
    for cells in zip(*rows, strict=True):
        size = max(map(cell_len, cells)) + 1
        if cell_len(lines[-1][0]) + size > width:
            lines.append([" " * 9] * len(rows))
        pairs = zip(lines[-1], cells, strict=True)
        lines[-1] = [line + set_cell_size(cell, size) for line, cell in pairs]
    for pair in lines:
        for line, style in zip(pair, ("", "dim"), strict=False):
            yield Text(line.rstrip(), style)
    for line in _answer(explanation.shown, each):
        yield Padding(Text(line), (0, 0, 0, 2), expand=False)


def _said(seen: Sequence[Entry | None]) -> list[str]:
    """Return what a prediction sees at each position; a "?" marks a random or kept token."""
    return [NOTHING if key is None else escaped(key.seen_as) for key in seen]


def _answer(objective: Objective, each: Prediction) -> Iterator[str]:
    answer = each.answer
    if answer.bits is not None:
        guesses = ", ".join(f"{_quoted(g.token)} {percent(g.probability)}" for g in answer.guesses)
        right = f"{_quoted(each.token)} has {percent(2**-answer.bits)}: {answer.bits:.1f} bits"
        yield f"guesses: {guesses}; {right}"
    if answer.attention:
        heads = answer.attention[-1]
        weights = [sum(of_heads) / len(heads) / 1000 for of_heads in zip(*heads, strict=True)]
        best = nlargest(5, zip(weights, objective.keys, strict=True), key=itemgetter(0))
        told = ", ".join(
            f"{_quoted(key.reads)} ({key.position}) {percent(weight)}"
            for weight, key in best
            if weight > 0
        )
        yield f"attends in the last layer (mean of {len(heads)} heads) to: {told}"


def _quoted(token: str) -> str:
    return f"“{escaped(token)}”"


def _comparison(explanation: Explanation) -> Table:
    last = explanation.shown.predictions[-1]
    bits = ["bits"] * (explanation.shown.bits is not None)
    about = f"to predict {_quoted(last.token)}, the last one, it sees"
    numbers = ["tokens", "positions", *bits]
    table = _table("objective", *numbers, about, right=numbers)
    for mode, objective in explanation.objectives.items():
        table.add_row(
            Text(objective.name, style="bold" if mode == explanation.input_mode else ""),
            percent(objective.tokens),
            percent(objective.positions),
            *([f"{objective.bits:.2f}"] if objective.bits is not None else []),
            Text(" ".join(_said(objective.seen_by(objective.predictions[-1].entry)))),
        )
    return table
