"""Documents of a stream that training never sees: --eval-samples.

A stream is too long to read in full just to choose five hundred documents. So we look at its first
documents only, 16 times as many as we need, and hold out those with the lowest hashes. The hash is
a function of the text (`text/hold_out.py`), so the choice is as good as random and covers copies:
training drops every document with one of these hashes, wherever it comes. Half of the samples are
for validation during the run, half for the test at its end:

    documents     a    b    c    d    e    d    f    g
    hash          .5   .2   .9   .1   .7   .1   .3   .8
    validation                   d
    test               b
    training      a         c         e         f    g

The choice does not depend on the run's seed or rank: two runs over one dataset hold out the same
documents, and their losses can be compared.

Why not simply the first documents? They come from one file, perhaps one day or one site. With the
default of 500 samples, 1000 in all, each rank reads 16,000 documents before the run begins.
"""

import hashlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

from annotated_mpnet.errors import DataError
from annotated_mpnet.streams.shards import Position, ShardReader
from annotated_mpnet.text.counts import Counts
from annotated_mpnet.text.hold_out import text_hash

LOOKED_AT = 16
"""Documents read for each one that is held out."""


@dataclass(frozen=True)
class Samples:
    """A few documents in memory, as a source of documents.

    >>> samples, counts = Samples(("one", "two")), Counts()
    >>> list(samples.documents(counts)), counts.documents
    (['one', 'two'], 2)
    """

    texts: tuple[str, ...]
    skipped_files = 0  # not of a search

    @property
    def fingerprint(self) -> str:
        """Name the documents."""
        hashes = [text_hash(text) for text in self.texts]
        return hashlib.sha256(repr(hashes).encode()).hexdigest()

    def documents(self, counts: Counts) -> Iterator[str]:
        """Yield and count the documents."""
        for text in self.texts:
            counts.documents += 1
            yield text


@dataclass(frozen=True)
class EvalSamples:
    """The documents held out of a stream."""

    valid: Samples
    test: Samples

    @property
    def hashes(self) -> frozenset[int]:
        """The hashes of the documents that training drops."""
        return frozenset(map(text_hash, (*self.valid.texts, *self.test.texts)))


def choose_eval_samples(
    reader: ShardReader, eval_samples: int, min_text_length: int
) -> EvalSamples:
    """Choose `eval_samples` documents for validation and as many for the test.

    Texts shorter than `min_text_length` characters are skipped, and copies count once.

    Raises:
        DataError: the dataset cannot be read, or half of its documents would be held out.
    """
    wanted = 2 * eval_samples
    seen: set[int] = set()
    lowest: dict[int, str] = {}
    for texts in _beginning(reader, LOOKED_AT * wanted, min_text_length):
        lowest.update((text_hash(text), text) for text in texts)
        seen.update(lowest)
        # Keep only texts that may yet be among the lowest: all of them may not fit into memory.
        if len(lowest) > 2 * wanted:
            lowest = dict(sorted(lowest.items())[:wanted])
    if wanted and 2 * wanted >= len(seen):
        raise DataError(
            f"--eval-samples {eval_samples} would hold out {wanted:,} of the {len(seen):,} "
            f"different documents in {reader.shards.fingerprint} with at least {min_text_length} "
            f"characters; lower --min-text-length if the texts are short, or set it to less than "
            f"{max(1, len(seen) // 4):,}, or to 0 and give --valid-file"
        )
    chosen = tuple(text for _, text in sorted(lowest.items())[:wanted])
    return EvalSamples(Samples(chosen[:eval_samples]), Samples(chosen[eval_samples:]))


def _beginning(reader: ShardReader, most: int, min_text_length: int) -> Iterator[list[str]]:
    """Yield the first documents of a dataset, `most` or a few more, at most one epoch."""
    looked_at = 0
    # With seed 0 and one rank: all ranks and all runs choose among the same documents.
    everything = ShardReader(reader.shards, seed=0, sleep=reader.sleep)
    with closing(everything.read(Position())) as steps:
        while looked_at < most:
            values, position = next(steps)
            if position.epoch > 0:
                return
            texts = [text for text in values if isinstance(text, str) and text.strip()]
            long_enough = [text for text in texts if len(text) >= min_text_length]
            looked_at += len(long_enough)
            yield long_enough
