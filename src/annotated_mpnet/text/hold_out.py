"""Text that training never sees: parts of a source, told apart by a hash of each document.

**The problem.** A model that has read a paragraph predicts it well, and says nothing about how it
reads others. To take every hundredth document for validation is not enough: text is full of copies,
and a copy among the other ninety-nine is the paragraph itself.

**The idea.** Whether a document is held out is decided by nothing but its own text. Read as a
number between 0 and 1, the hash of the text is as good as drawn at random, and alike for all
copies: they go to the same side together, in whatever file, shard or process they are met.

>>> "%.2f %.2f" % (text_hash("It was a dark night.") / 2**64, text_hash("It rained.") / 2**64)
'0.67 0.92'

With a fraction of 0.7 the first of these would be held out, the second not. And the fraction may
grow: what 0.7 holds out, 0.8 holds out too. Of a thousand texts, a tenth is 92:

>>> texts = [f"It rained for {n} days." for n in range(1000)]
>>> sum(is_held_out(text, 0.1) for text in texts)
92

Python's own `hash` would not do: it is another one in each process. Nor would a position in the
text, which changes for all that follows when a document is added. Short documents, such
as the heading "Chapter I", occur often; they are held out, or not, all together, so that the share
of what is held out is the fraction for *different* documents, and only about that for documents.

Where the held-out text comes in a file of its own, it is the other way about: the hashes of its
documents are known, and documents of the training text with one of these are left out
(`WithoutTexts`). Eight bytes identify a text: the chance that any two of a hundred million
documents share a hash by accident is one in 3700, and what it would cost is one document.

>>> round(2**64 / (10**8 * (10**8 - 1) / 2))
3689

A copy means: the same text to the letter. One with another space in it passes for another text.

Next: `text/packing.py`.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from annotated_mpnet.errors import DataError
from annotated_mpnet.text.counts import Counts
from annotated_mpnet.text.sources import DocumentSource


def text_hash(text: str) -> int:
    """Return a number of 64 bits that is equal for equal texts: on every machine, in any run.

    Of the text as it is read, before any tokenizer: with another one, the same documents are held
    out.
    """
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def is_held_out(text: str, fraction: float) -> bool:
    """Tell whether a document belongs to the held-out fraction of all texts."""
    return text_hash(text) < fraction * 2**64


@dataclass(frozen=True)
class PartByHash:
    """The documents of a source that are held out, or those that are not.

    The two parts are two sources, each of which reads all of the text and keeps its own: no list of
    what is held out has to be kept, nor does either have to wait for the other.

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

    def documents(self, counts: Counts) -> Iterator[str]:
        """Yield the documents of this part; the others are counted as left out.

        Raises:
            DataError: there is none, or the source cannot be read.
        """
        before = counts.documents, counts.left_out
        for document in self.source.documents(counts):
            # The source has counted the document before it handed it on; what goes to the other
            # part is taken off again.
            if is_held_out(document, self.fraction) == self.held_out:
                yield document
            else:
                _leave_out(counts)
        left_out = counts.left_out - before[1]
        if counts.documents == before[0] and left_out:
            # Few documents and a small fraction, or many copies of one: chance has left one part
            # empty.
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
    """The documents of a source, without those of certain texts and their copies.

    Attributes:
        source: all documents.
        hashes: hashes of the texts to leave out, from `hashes_of`.
    """

    source: DocumentSource
    hashes: frozenset[int]

    @property
    def fingerprint(self) -> str:
        """Name the documents that remain."""
        left_out = hashlib.sha256(repr(sorted(self.hashes)).encode()).hexdigest()
        return f"{self.source.fingerprint}, without {left_out}"

    def documents(self, counts: Counts) -> Iterator[str]:
        """Yield the documents that remain; the others are counted as left out.

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
                f"all {left_out:,} documents of the training text stand in --valid-file or "
                "--test-file too, and are left out of training; give other text to one of them"
            )


def split_by_hash(source: DocumentSource, fraction: float) -> tuple[PartByHash, PartByHash]:
    """Return (training, validation): what is not held out, and what is."""
    return PartByHash(source, fraction, held_out=False), PartByHash(source, fraction, held_out=True)


def hashes_of(source: DocumentSource) -> frozenset[int]:
    """Return the hashes of all documents of a source, each some 60 bytes of memory.

    Raises:
        DataError: the source cannot be read.
    """
    return frozenset(map(text_hash, source.documents(Counts())))


def _leave_out(counts: Counts) -> None:
    """Count the document that the source has just handed on, and counted, as left out."""
    counts.documents -= 1
    counts.left_out += 1
