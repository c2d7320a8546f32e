"""Documents to sequences of at most T tokens, in three ways.

Three documents, of 2, 5 and 1 tokens, and T = 6:

>>> documents = Ragged.of([[11, 12], [21, 22, 23, 24, 25], [31]])
>>> def show(packing: Packing) -> None:
...     spell = {0: "<s>", 2: "</s>"}
...     for sequences in cut_sequences([documents], packing, max_tokens=6, cls_id=0, sep_id=2):
...         for sequence in sequences:
...             print(" ".join(spell.get(token, str(token)) for token in sequence.tolist()))

**full** (paper, section 3.1: "full sentences", after RoBERTa). The documents are one stream with a
`</s>` between two of them, and sequences are cut from it. No place is lost; but a sequence begins
and ends in the middle of a sentence, and its documents see each other.

>>> show("full")
<s> 11 12 </s> 21 </s>
<s> 22 23 24 25 </s>
<s> </s> 31 </s>

**none**. One document per sequence; a long one continues in further sequences. It costs padding,
unless sequences of similar length are batched together (`training/loader.py`).

>>> show("none")
<s> 11 12 </s>
<s> 21 22 23 24 </s>
<s> 25 </s>
<s> 31 </s>

**documents**. The sequences of `none` share sequences of at most T. Each document keeps its own
`<s>` and `</s>`; attention and masking stay inside it, so it is treated as if it were alone.

>>> show("documents")
<s> 11 12 </s>
<s> 21 22 23 24 </s>
<s> 25 </s> <s> 31 </s>

Which documents share a sequence is bin packing by decreasing best fit: the longest first, each into
the fullest sequence that still has room. On real text a percent or less is lost. Here the 3 goes to
the 7 and not to the 6, which has more room:

>>> best_fit(np.array([3, 6, 7, 4]), capacity=10)
array([0, 1, 0, 1])

A corpus is packed in windows of a fixed number of tokens, so memory does not grow with it. On 99
novels, a paragraph per document and 512 tokens (`docs/log.md`), `full` makes 29,956 sequences,
`documents` 30,288, and `none` 222,089.

    N items (documents, pieces of them, sequences)   F sequences
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from annotated_mpnet.mpnet.collator import Ids
from annotated_mpnet.mpnet.config import Packing

Lengths = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Ragged:
    """Sequences of tokens of different lengths, one after the other in a flat array.

    All of them are handled in one call to numpy:

    >>> documents = Ragged.of([[1, 2], [3]])
    >>> documents.take(np.array([1, 0]))
    Ragged(values=array([3, 1, 2], dtype=int32), lengths_N=array([1, 2]))

    Attributes:
        values: all tokens.
        lengths_N: of each sequence.
    """

    values: Ids
    lengths_N: Lengths

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]]) -> "Ragged":
        """Concatenate sequences."""
        values = np.array([each for sequence in sequences for each in sequence], dtype=np.int32)
        return cls(values, np.array([len(sequence) for sequence in sequences], dtype=np.int64))

    def __len__(self) -> int:
        """Return N."""
        return len(self.lengths_N)

    def __iter__(self) -> Iterator[Ids]:
        """Yield the sequences."""
        return iter(np.split(self.values, self.ends_N[:-1]) if len(self) else [])

    @property
    def ends_N(self) -> Lengths:  # noqa: N802  (a shape suffix)
        """Where each sequence ends in `values`."""
        return np.cumsum(self.lengths_N)

    def take(self, order_N: Lengths) -> "Ragged":
        """Return the sequences in another order."""
        lengths_N = self.lengths_N[order_N]
        # Each token moves as far as the beginning of its sequence does.
        moves_N = (self.ends_N - self.lengths_N)[order_N] - (np.cumsum(lengths_N) - lengths_N)
        return Ragged(
            self.values[np.repeat(moves_N, lengths_N) + np.arange(len(self.values))], lengths_N
        )


def cut_sequences(
    windows: Iterable[Ragged], packing: Packing, max_tokens: int, cls_id: int, sep_id: int
) -> Iterator[Ragged]:
    """Yield sequences of at most `max_tokens`, `<s>` and `</s>` included.

    Args:
        windows: the documents' tokens; with `documents`, sequences do not cross windows.
        packing: which of the three ways.
        max_tokens: T.
        cls_id: `<s>`.
        sep_id: `</s>`.
    """
    content = max_tokens - 2
    if packing == "full":
        windows = _streams(windows, content, sep_id)
    for window in windows:
        cut = framed(_cut(window, content), cls_id, sep_id)
        yield _put_together(cut, max_tokens) if packing == "documents" else cut


def framed(texts: Ragged, cls_id: int, sep_id: int) -> Ragged:
    """Put `<s>` before and `</s>` after each sequence.

    >>> framed(Ragged.of([[11, 12], [13]]), cls_id=0, sep_id=2).values
    array([ 0, 11, 12,  2,  0, 13,  2], dtype=int32)
    """
    lengths_N = texts.lengths_N + 2
    ends_N = np.cumsum(lengths_N)
    values = np.empty(int(lengths_N.sum()), texts.values.dtype)
    is_text = np.ones(len(values), dtype=np.bool_)
    is_text[ends_N - lengths_N] = is_text[ends_N - 1] = False
    values[is_text] = texts.values
    values[ends_N - lengths_N] = cls_id
    values[ends_N - 1] = sep_id
    return Ragged(values, lengths_N)


def best_fit(lengths_N: Lengths, capacity: int) -> Lengths:
    """Return which bin each item goes to, bins numbered by their first item.

    Args:
        lengths_N: of the items, none larger than the capacity.
        capacity: of a bin.
    """
    bin_of_N = np.empty_like(lengths_N)
    # The bins that have each amount of free space; and the amounts that occur, as the bits of an
    # integer, where "the least space of at least n" is three operations.
    bins_with: list[list[int]] = [[] for _ in range(capacity + 1)]
    spaces = 0
    bins = 0
    order = np.argsort(-lengths_N, kind="stable")
    for item, length in zip(order.tolist(), lengths_N[order].tolist(), strict=True):
        # Bit i of `fitting`: there is a bin with a space of length + i. The lowest set bit, x & -x,
        # is the best fit.
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            chosen = bins_with[space].pop()
            if not bins_with[space]:
                spaces ^= 1 << space
        else:
            space, chosen = capacity, bins
            bins += 1
        bins_with[space - length].append(chosen)
        spaces |= 1 << (space - length)
        bin_of_N[item] = chosen
    # So far bins are numbered by their longest items. By their first item, they are in text order.
    first_F = np.full(bins, len(lengths_N))
    np.minimum.at(first_F, bin_of_N, np.arange(len(lengths_N)))
    renumbered_F = np.argsort(np.argsort(first_F))
    return np.asarray(renumbered_F[bin_of_N])


def _put_together(items: Ragged, max_tokens: int) -> Ragged:
    """Let items share sequences, in text order within each."""
    bin_of_N = best_fit(items.lengths_N, max_tokens)
    together = items.take(np.argsort(bin_of_N, kind="stable"))
    lengths_F = np.bincount(bin_of_N, weights=items.lengths_N).astype(np.int64)
    return Ragged(together.values, lengths_F)


def _cut(documents: Ragged, content: int) -> Ragged:
    """Cut what is longer than `content` into pieces, all full but the last; only lengths change.

    >>> _cut(Ragged.of([[1, 2, 3, 4, 5], [6]]), content=2).lengths_N
    array([2, 2, 1, 1])
    """
    pieces_N = -(-documents.lengths_N // content)
    lengths = np.full(int(pieces_N.sum()), content, dtype=np.int64)
    lengths[np.cumsum(pieces_N) - 1] = documents.lengths_N - (pieces_N - 1) * content
    return Ragged(documents.values, lengths)


def _streams(windows: Iterable[Ragged], content: int, sep_id: int) -> Iterator[Ragged]:
    """Yield the stream of documents and separators, in portions of whole sequences.

    What does not fill a sequence waits for the next window, so windows leave no trace:

    >>> windows = [Ragged.of([[11, 12], [13, 14, 15]]), Ragged.of([[16]])]
    >>> [portion.values.tolist() for portion in _streams(windows, content=3, sep_id=2)]
    [[11, 12, 2, 13, 14, 15], [2, 16]]
    """
    held: Ids = np.empty(0, dtype=np.int32)
    for window in windows:
        held = np.concatenate([held, np.insert(window.values, window.ends_N, sep_id)])
        # One token is held back: the very last separator is dropped, `</s>` is there anyway.
        whole = (len(held) - 1) // content * content
        if whole:
            yield Ragged(held[:whole], np.array([whole]))
        held = held[whole:]
    if len(held) > 1:
        yield Ragged(held[:-1], np.array([len(held) - 1]))
