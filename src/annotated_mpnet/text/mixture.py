"""A mixture of texts: what share of the training each text has, whatever its size.

Three parts of one text and one of another, `--train-dir a b --train-weights 3 1`. Like all else
(`training/loader.py`), the order is a function of (data, seed, position), so a run resumes from its
number alone. It goes in rounds. In each, a text has a fixed number of turns, in an order of its
own; here are rounds of 8 turns:

    round          0                  1
    position       0 1 2 3 4 5 6 7    8 9 ...
    text           a a b a a b a a    b a ...
    its turn       0 1 0 2 3 1 4 5    2 6 ...

The turns of a text count through its epochs, as the positions do where there is one text: turn 5 of
a text of four sequences is the second sequence of its second epoch.

>>> turns = turns_of((3.0, 1.0), 8)
>>> turns
(6, 2)
>>> [turn_at(position, turns, seed=12345) for position in (0, 7, 8, 9)]
[(0, 0), (0, 5), (1, 2), (0, 6)]
"""

import hashlib
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from annotated_mpnet.mpnet.collator import Ids
from annotated_mpnet.mpnet.randomness import fold_in
from annotated_mpnet.text.counts import Counts
from annotated_mpnet.text.sequences import PackedSequences, PackingReport

ROUND = 1000
"""Turns of a round. Weights count in thousandths, and a text has at least one turn."""


class Mixture(PackedSequences):
    """Several texts as one: their sequences are numbered through, the first text's first.

    Attributes:
        parts: the texts.
        turns: of each part in a round.
        first: the number of each part's first sequence.
    """

    def __init__(self, parts: Sequence[PackedSequences], weights: Sequence[float]) -> None:
        self.parts = list(parts)
        self.turns = turns_of(weights)
        self.first = np.cumsum([0, *map(len, parts)]).tolist()
        named = [(part.fingerprint, turns) for part, turns in zip(parts, self.turns, strict=True)]
        self.fingerprint = hashlib.sha256(repr(named).encode()).hexdigest()
        self.report = _sum_of([part.report for part in parts])

    def __len__(self) -> int:
        """Return N, of all parts."""
        return int(self.first[-1])

    def lengths(self) -> npt.NDArray[np.int64]:
        """Return how many tokens each sequence has, (N,)."""
        return np.concatenate([part.lengths() for part in self.parts])

    def take(self, indices: npt.NDArray[np.int64]) -> list[Ids]:
        """Return sequences by their number."""
        places = np.searchsorted(self.first, indices, side="right") - 1
        return [
            self.parts[part].take(np.array([index - self.first[part]]))[0]
            for part, index in zip(places.tolist(), indices.tolist(), strict=True)
        ]

    def sample(self, first: int, last: int) -> list[Ids]:
        """Return sequences in the proportions of the mixture."""
        numbers = []
        for position in range(first, last):
            part, turn = turn_at(position, self.turns, seed=0)
            numbers.append(self.first[part] + turn % len(self.parts[part]))
        return self.take(np.array(numbers, dtype=np.int64))


def turns_of(weights: Sequence[float], turns: int = ROUND) -> tuple[int, ...]:
    """Return how many turns of a round each weight gets, one at least.

    >>> turns_of((1, 1, 1)), turns_of((1e6, 1)), turns_of((6, 2)) == turns_of((3, 1))
    ((334, 333, 333), (999, 1), True)
    """
    shares = [turns * weight / sum(weights) for weight in weights]
    given = [max(1, int(share)) for share in shares]
    # What rounding leaves goes to those that lost most by it, what it took comes from the largest.
    while sum(given) != turns:
        more = sum(given) < turns
        lost = [share - each for share, each in zip(shares, given, strict=True)]
        place = lost.index(max(lost)) if more else given.index(max(given))
        given[place] += 1 if more else -1
    return tuple(given)


def turn_at(position: int, turns: tuple[int, ...], seed: int) -> tuple[int, int]:
    """Return whose turn it is at a position of the mixture, and which of its turns, from 0."""
    number, place = divmod(position, sum(turns))
    order = _round(number, turns, seed)
    part = int(order[place])
    return part, number * turns[part] + int((order[:place] == part).sum())


@lru_cache(maxsize=8)
def _round(number: int, turns: tuple[int, ...], seed: int) -> npt.NDArray[np.int64]:
    parts = np.repeat(np.arange(len(turns)), turns)
    return fold_in(seed, "mixture", number).permutation(parts)


def _sum_of(reports: Sequence[PackingReport]) -> PackingReport:
    """Return the report of all parts together."""
    counts = Counts()
    for each in fields(counts):
        total = sum(getattr(report.counts, each.name) for report in reports)
        setattr(counts, each.name, total)
    rows, tokens = (sum(getattr(each, name) for each in reports) for name in ("rows", "tokens"))
    return replace(
        reports[0],
        counts=counts,
        dropped_documents=sum(each.dropped_documents for each in reports),
        tokens=tokens,
        rows=rows,
        fill=sum(each.fill * each.rows for each in reports) / rows,
        unknown=sum(each.unknown * each.tokens for each in reports) / max(tokens, 1),
        words=sum(each.words for each in reports),
    )
