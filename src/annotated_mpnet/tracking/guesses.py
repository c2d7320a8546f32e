"""What a model guesses for masked words of the validation text, at each evaluation.

`guesses.jsonl` has a line for each word, which a resumed run continues like `metrics.jsonl`; the
report shows the words beside each other:

>>> guess = Guess(
...     before="grandson of the", word="second", after="Sir Walter.", probability=0.002,
...     best=[("same", 0.078), ("whole", 0.026), ("other", 0.023)])
>>> print(guess)
grandson of the [second] Sir Walter.: same 8%, whole 3%, other 2%; second 0.2%
>>> for line in guess_table([(100, guess), (200, guess)]):
...     print(line)
| update | ... grandson of the **second** Sir Walter. ... |
|---:|---|
| 100 | same 8%, whole 3%, other 2%; second 0.2% |
| 200 | same 8%, whole 3%, other 2%; second 0.2% |
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from annotated_mpnet.errors import printable

ROWS = 12
"""Evaluations in the report: the first, the last, and some between them."""


@dataclass(frozen=True)
class Guess:
    """A masked word and what the model takes it for.

    Attributes:
        before: the text before it.
        word: that was masked.
        after: the text after it.
        probability: of the word.
        best: the likeliest tokens, with their probabilities.
    """

    before: str
    word: str
    after: str
    probability: float
    best: Sequence[tuple[str, float]]

    def __str__(self) -> str:
        return f"{self.before} [{self.word}] {self.after}: {self.answer}"

    @property
    def answer(self) -> str:
        """The guesses, and where the word itself is not among them, its probability."""
        said = ", ".join(f"{_quoted(word)} {_percent(each)}" for word, each in self.best)
        if self.word in [word for word, _ in self.best]:
            return said
        return f"{said}; {_quoted(self.word)} {_percent(self.probability)}"


def _quoted(word: str) -> str:
    # A comma in a list of words would not be seen.
    return word if word.isalnum() else f'"{word}"'


def _percent(probability: float) -> str:
    """Return a probability with one digit at least.

    >>> [_percent(each) for each in (0.078, 0.0021, 0.00001, 0.9996)]
    ['8%', '0.2%', '<0.1%', '100%']
    """
    if probability < 0.001:
        return "<0.1%"
    return f"{probability:.1%}" if probability < 0.01 else f"{probability:.0%}"


def lines_of(step: int, guesses: Sequence[Guess]) -> str:
    """Return the lines of `guesses.jsonl`."""
    return "".join(
        json.dumps({"step": step, **dataclasses.asdict(each)}, ensure_ascii=False) + "\n"
        for each in guesses
    )


def read_guesses(path: Path) -> list[tuple[int, Guess]]:
    """Return the guesses with their updates, without lines that are broken."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = json.loads(line)
            step = int(values.pop("step"))
            best = [(str(word), float(probability)) for word, probability in values.pop("best")]
            found.append((step, Guess(**values, best=best)))
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
    return found


def guess_table(guesses: Sequence[tuple[int, Guess]]) -> Iterator[str]:
    """Yield a table in Markdown: a column for each sentence, a row for each evaluation."""
    rows: dict[int, dict[tuple[str, str, str], str]] = {}
    for step, each in guesses:
        sentence = each.before, each.word, each.after
        rows.setdefault(step, {})[sentence] = _cell(each.answer)
    if not rows:
        return
    sentences = list(dict.fromkeys(sentence for row in rows.values() for sentence in row))
    titles = [f"... {_cell(b)} **{_cell(word)}** {_cell(a)} ..." for b, word, a in sentences]
    yield f"| update | {' | '.join(titles)} |"
    yield "|---:|" + "---|" * len(sentences)
    steps = sorted(rows)
    shown = {steps[place * (len(steps) - 1) // (ROWS - 1)] for place in range(ROWS)}
    for step in sorted(shown):
        cells = [rows[step].get(sentence, "") for sentence in sentences]
        yield f"| {step:,} | {' | '.join(cells)} |"


def _cell(text: str) -> str:
    r"""Return a text that a table shows as it is.

    >>> print(_cell("a | b *c*"))
    a \| b \*c\*
    """
    return "".join(f"\\{each}" if each in "\\`*_|<>[]" else each for each in printable(text))
