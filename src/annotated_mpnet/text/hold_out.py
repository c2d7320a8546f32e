"""Text that training never sees: parts of a source, chosen by a hash of each document.

Taking every hundredth document for validation is not enough: text is full of copies, and a model
that has read a copy predicts the paragraph well. So a document's own text decides. Its hash, read
as a number between 0 and 1, is as good as random, and the same for all copies, in whatever file,
shard or process they are found:

>>> "%.2f %.2f" % (text_hash("It was a dark night.") / 2**64, text_hash("It rained.") / 2**64)
'0.67 0.92'

With a fraction of 0.7 the first of these is held out, the second is not. What 0.7 holds out, 0.8
holds out too. Of a thousand texts, a tenth is 92:

>>> texts = [f"It rained for {n} days." for n in range(1000)]
>>> sum(is_held_out(text, 0.1) for text in texts)
92

Short documents, such as the heading "Chapter I", occur often and go to one side together, so the
fraction is that of *different* documents.

Where the held-out text has a file of its own, training documents with the same hash are skipped
(`without_texts`). A hash has eight bytes: among a hundred million documents the chance of any two
sharing one is one in 3700, and it would cost one document. A copy is the same text to the letter.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from annotated_mpnet.errors import DataError
from annotated_mpnet.text.counts import Counts
from annotated_mpnet.text.sources import DocumentSource


def text_hash(text: str) -> int:
    """Return 64 bits that are equal for equal texts, on every machine and in every run."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def is_held_out(text: str, fraction: float) -> bool:
    """Tell whether a document belongs to the held-out fraction of all texts."""
    return text_hash(text) < fraction * 2**64


@dataclass(frozen=True)
class Part:
    """Some of the documents of a source. Each part reads all of the text and keeps its own.

    Attributes:
        source: all documents.
        keeps: tells whether a document is in this part.
        name: of the part, for the fingerprint.
        if_empty: the error if no document is in it, with `{}` for how many the source has.
    """

    source: DocumentSource
    keeps: Callable[[str], bool]
    name: str
    if_empty: str

    @property
    def fingerprint(self) -> str:
        """Name the documents of this part."""
        return f"{self.source.fingerprint}, {self.name}"

    @property
    def skipped_files(self) -> int:
        """As in the source."""
        return self.source.skipped_files

    def documents(self, counts: Counts) -> Iterator[str]:
        """Yield the documents of this part; count the others as left out.

        Raises:
            DataError: there is none, or the source cannot be read.
        """
        before = dataclasses.replace(counts)
        for document in self.source.documents(counts):
            if self.keeps(document):
                yield document
            else:
                # The source has counted the document before it passed it on.
                counts.documents -= 1
                counts.left_out += 1
        left_out = counts.left_out - before.left_out
        if counts.documents == before.documents and left_out:
            raise DataError(self.if_empty.format(f"{left_out:,}"))


def split_by_hash(source: DocumentSource, fraction: float) -> tuple[Part, Part]:
    """Return (training, validation): what is not held out, and what is.

    Args:
        source: all documents.
        fraction: share of the different documents that is held out, between 0 and 1.
    """
    holds = f"--valid-fraction {fraction:g} holds out"
    documents = "of the {} documents of the training text"
    name = f"{fraction!r} held out"
    return (
        Part(
            source,
            lambda text: not is_held_out(text, fraction),
            f"{name}: False",
            f"{holds} all {documents}; lower it",
        ),
        Part(
            source,
            lambda text: is_held_out(text, fraction),
            f"{name}: True",
            # Few documents and a small fraction, or many copies of one.
            f"{holds} none {documents}; raise it, or give --valid-file",
        ),
    )


def without_texts(source: DocumentSource, hashes: frozenset[int]) -> Part:
    """Return the documents of a source without those whose hash is in `hashes` (`hashes_of`)."""
    left_out = hashlib.sha256(repr(sorted(hashes)).encode()).hexdigest()
    return Part(
        source,
        lambda text: text_hash(text) not in hashes,
        f"without {left_out}",
        "all {} documents of the training text are also in --valid-file or --test-file, and are "
        "skipped in training; give one of them another text",
    )


def hashes_of(source: DocumentSource) -> frozenset[int]:
    """Return the hashes of all documents of a source, about 60 bytes of memory each."""
    return frozenset(map(text_hash, source.documents(Counts())))
