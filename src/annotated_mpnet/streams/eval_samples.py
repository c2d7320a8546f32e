"""Documents of a stream that training never sees: --eval-samples.

Nobody wants to read a terabyte for five hundred documents. So only the beginning of a stream is
looked at: of its first documents, 16 times as many as are wanted, those with the lowest hashes are
held out. The choice is as good as random, and all copies of a document go with it, wherever in the
stream they come. One half is for validation, the other for the test:

    documents     a    b    c    d    e    d    f    g
    hash          .5   .2   .9   .1   .7   .1   .3   .8
    validation                   d
    test               b
    training      a         c         e         f    g

The order of shards is fixed for this, whatever the seed, so each rank and each run on the same
dataset holds out the same documents, and the losses of two runs can be compared.

Why 16 times: the first documents alone would all come from one file. With the default of 500
samples, 16,000 documents are read before the run begins.

HF: `take` and `skip` hold out no copies, and with shuffled shards other documents each time.
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
"""Documents that are looked at for each that is held out."""


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
        """Yield and count the documents."""
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


def choose_eval_samples(
    reader: ShardReader, eval_samples: int, min_text_length: int
) -> EvalSamples:
    """Choose documents from the beginning of a stream; copies count once.

    Args:
        reader: of the dataset; its seed, rank and number of ranks do not matter.
        eval_samples: N for validation and N for the test.
        min_text_length: shorter documents (characters) are skipped.

    Raises:
        DataError: the dataset cannot be read, or half of its documents would be held out.
    """
    wanted = 2 * eval_samples
    seen: set[int] = set()
    lowest: dict[int, str] = {}
    for texts in _beginning(reader, LOOKED_AT * wanted, min_text_length):
        lowest.update((text_hash(text), text) for text in texts)
        seen.update(lowest)
        # Not all texts fit into memory.
        if len(lowest) > 2 * wanted:
            lowest = dict(sorted(lowest.items())[:wanted])
    if wanted and 2 * wanted >= len(seen):
        raise DataError(
            f"--eval-samples {eval_samples} would hold out {wanted:,} documents, of the "
            f"{len(seen):,} different ones of at least {min_text_length} characters in "
            f"{reader.shards.fingerprint}; lower it to less than {max(1, len(seen) // 4):,}, "
            "or to 0 and give --valid-file"
        )
    chosen = tuple(text for _, text in sorted(lowest.items())[:wanted])
    return EvalSamples(Samples(chosen[:eval_samples]), Samples(chosen[eval_samples:]))


def _beginning(reader: ShardReader, most: int, min_text_length: int) -> Iterator[list[str]]:
    """Yield the documents at the beginning of a dataset, `most` or a few more."""
    looked_at = 0
    # One process and the seed 0, whatever the run has.
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
