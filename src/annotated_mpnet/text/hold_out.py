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
(`WithoutTexts`). A hash has eight bytes: among a hundred million documents the chance of any two
sharing one is one in 3700, and it would cost one document. A copy is the same text to the letter.
"""

import hashlib
from collections.abc import Iterator
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
class PartByHash:
    """The documents of a source that are held out, or those that are not.

    Each part reads all of the text and keeps its own documents.

    Attributes:
        source: all documents.
        fraction: share of the different documents that is held out, between 0 and 1.
        held_out: which of the two parts this is.
    """

    source: DocumentSource
    fraction: float
    held_out: bool

    @property
    def fingerprint(self) -> str:
        """Name the documents of this part."""
        return f"{self.source.fingerprint}, {self.fraction!r} held out: {self.held_out}"

    @property
    def skipped_files(self) -> int:
        """As in the source."""
        return self.source.skipped_files

    def documents(self, counts: Counts) -> Iterator[str]:
        """Yield the documents of this part; count the others as left out.

        Raises:
            DataError: there is none, or the source cannot be read.
        """
        before = counts.documents, counts.left_out
        for document in self.source.documents(counts):
            if is_held_out(document, self.fraction) == self.held_out:
                yield document
            else:
                _leave_out(counts)
        left_out = counts.left_out - before[1]
        if counts.documents == before[0] and left_out:
            # Few documents and a small fraction, or many copies of one.
            problem, mend = (
                ("holds out none", "raise it, or give --valid-file")
                if self.held_out
                else ("holds out all", "lower it")
            )
            raise DataError(
                f"--valid-fraction {self.fraction:g} {problem} of the {left_out:,} documents of "
                f"the training text; {mend}"
            )


@dataclass(frozen=True)
class WithoutTexts:
    """The documents of a source without those whose hash is in `hashes` (from `hashes_of`)."""

    source: DocumentSource
    hashes: frozenset[int]

    @property
    def fingerprint(self) -> str:
        """Name the documents that remain."""
        left_out = hashlib.sha256(repr(sorted(self.hashes)).encode()).hexdigest()
        return f"{self.source.fingerprint}, without {left_out}"

    @property
    def skipped_files(self) -> int:
        """As in the source."""
        return self.source.skipped_files

    def documents(self, counts: Counts) -> Iterator[str]:
        """Yield the documents that remain; count the others as left out.

        Raises:
            DataError: none remains, or the source cannot be read.
        """
        before = counts.documents, counts.left_out
        for document in self.source.documents(counts):
            if text_hash(document) in self.hashes:
                _leave_out(counts)
            else:
                yield document
        left_out = counts.left_out - before[1]
        if counts.documents == before[0] and left_out:
            raise DataError(
                f"all {left_out:,} documents of the training text are also in --valid-file or "
                "--test-file, and are skipped in training; give one of them another text"
            )


def split_by_hash(source: DocumentSource, fraction: float) -> tuple[PartByHash, PartByHash]:
    """Return (training, validation): what is not held out, and what is."""
    return PartByHash(source, fraction, held_out=False), PartByHash(source, fraction, held_out=True)


def hashes_of(source: DocumentSource) -> frozenset[int]:
    """Return the hashes of all documents of a source, about 60 bytes of memory each."""
    return frozenset(map(text_hash, source.documents(Counts())))


def _leave_out(counts: Counts) -> None:
    # The source has counted the document before it passed it on.
    counts.documents -= 1
    counts.left_out += 1
