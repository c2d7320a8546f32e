"""Documents of a stream that training never sees: --eval-samples.

A stream has no end at which one could look back and take a part for evaluation, and nobody wants to
read a terabyte for five hundred documents. So only the beginning is looked at: of its first
documents, 16 times as many as are wanted, those with the lowest hashes are held out. A hash is a
function of the text (`text/hold_out.py`), so the choice is as good as random, and all copies of a
document go with it: training drops whatever has one of these hashes, wherever in the stream it
comes. One half of the samples is for validation during the run, one for the test at its end:

    documents     a    b    c    d    e    d    f    g
    hash          .5   .2   .9   .1   .7   .1   .3   .8
    validation                   d
    test               b
    training      a         c         e         f    g

Everything is looked at before the stream is split among ranks, and in an order of shards of its
own, whatever the seed of the run is: each rank, and each run with the same dataset, holds out the
same documents, so that the losses of two runs can be compared.

**Why 16 times.** Held out are the lowest hashes of the documents that were looked at, one in 16.
Were it the first documents themselves, they would all come from one file, which may be one day or
one site. Looking at more makes the choice better and the start slower: with the 500 samples of the
default, 1000 in all, 16,000 documents are read, by each rank, before the run begins.

HF: `take` and `skip` cut the stream at a number. That holds out no copies, and with the shards
shuffled it is another set of documents each time. annotated-mpnet does it so.

Next: `text/packing.py`, which makes rows of the samples, as of any other documents.
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
"""Documents that are looked at, for each that is held out."""


@dataclass(frozen=True)
class Samples:
    """A few documents, as a source of documents.

    >>> samples, counts = Samples(("one", "two")), Counts()
    >>> list(samples.documents(counts)), counts.documents
    (['one', 'two'], 2)
    >>> samples.fingerprint == Samples(("two", "one")).fingerprint
    False

    Attributes:
        texts: the documents.
    """

    texts: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """Name the documents."""
        hashes = [text_hash(text) for text in self.texts]
        return hashlib.sha256(repr(hashes).encode()).hexdigest()

    def documents(self, counts: Counts) -> Iterator[str]:
        """Yield the documents, and count them."""
        for text in self.texts:
            counts.documents += 1
            yield text


@dataclass(frozen=True)
class EvalSamples:
    """What is held out of a stream.

    Attributes:
        valid: documents for validation during the run.
        test: as many for the test at its end.
    """

    valid: Samples
    test: Samples

    @property
    def hashes(self) -> frozenset[int]:
        """What training drops."""
        return frozenset(map(text_hash, (*self.valid.texts, *self.test.texts)))


def choose_eval_samples(
    reader: ShardReader, eval_samples: int, min_text_length: int
) -> EvalSamples:
    """Choose documents from the beginning of a stream.

    Copies count once, however many are met: they have one hash. Which half a document goes to is
    decided by its hash too, so that validation and test are as alike as two draws can be.

    Args:
        reader: of the dataset; its seed, rank and number of ranks do not matter.
        eval_samples: N: so many for validation, and so many for the test.
        min_text_length: shorter documents (characters) are passed over.

    Raises:
        DataError: the dataset cannot be read, or N is too many for it: half of its different
            documents or more would be held out.
    """
    # `seen` holds hashes only, 16 bytes and some for each; of the texts themselves, only those are
    # kept that may yet be among the lowest.
    wanted = 2 * eval_samples
    seen: set[int] = set()
    lowest: dict[int, str] = {}
    for texts in _beginning(reader, LOOKED_AT * wanted, min_text_length):
        lowest.update((text_hash(text), text) for text in texts)
        seen.update(lowest)
        # Now and then all but the lowest are dropped: there may be no memory for all the texts.
        if len(lowest) > 2 * wanted:
            lowest = dict(sorted(lowest.items())[:wanted])
    # A dataset that ends before that many were met is small. Half of it for evaluation would leave
    # a run that evaluates well what it hardly trains.
    if wanted and 2 * wanted >= len(seen):
        raise DataError(
            f"--eval-samples {eval_samples} would hold out {wanted:,} documents, of the "
            f"{len(seen):,} different ones that {reader.shards.fingerprint} has from "
            f"{min_text_length} characters on; lower it to less than {max(1, len(seen) // 4):,}, "
            "or to 0 and give --valid-file"
        )
    chosen = tuple(text for _, text in sorted(lowest.items())[:wanted])
    return EvalSamples(Samples(chosen[:eval_samples]), Samples(chosen[eval_samples:]))


def _beginning(reader: ShardReader, most: int, min_text_length: int) -> Iterator[list[str]]:
    """Yield the documents at the beginning of a dataset, `most` or a few more.

    What is passed over here, blank and short texts, training passes over too: held out is a share
    of what would be trained on.
    """
    looked_at = 0
    # As if there were one process and the seed 0, whatever there is.
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
