"""Documents to rows, in three ways: what shares a row, and where a document is cut.

Documents have all lengths, the network wants rows of at most T tokens, each between `<s>` and
`</s>`. Take three documents, of 2, 5 and 1 tokens, and T = 6:

>>> documents = Ragged.of([[11, 12], [21, 22, 23, 24, 25], [31]])
>>> def show(packing: Packing) -> None:
...     spell = {0: "<s>", 2: "</s>"}
...     for rows in cut_sequences([documents], packing, max_tokens=6, cls_id=0, sep_id=2):
...         for row in rows:
...             print(" ".join(spell.get(token, str(token)) for token in row.tolist()))

**full** (section 3.1 of the paper: "full sentences", after RoBERTa). The documents are one endless
stream, with a `</s>` between two of them, and rows are cut from it as they come. No place is lost;
but a row begins and ends in the middle of a sentence, and documents in a row see each other. What
does not belong together the network learns to tell from the `</s>` between.

>>> show("full")
<s> 11 12 </s> 21 </s>
<s> 22 23 24 25 </s>
<s> </s> 31 </s>

**none**. A document a row, and a long one goes on in further rows. Short ones make short rows:
what it costs is the padding, unless rows of similar length are put into a batch (`training/loader.py`).

>>> show("none")
<s> 11 12 </s>
<s> 21 22 23 24 </s>
<s> 25 </s>
<s> 31 </s>

**documents**. The rows of `none` are put together into rows of at most T. Each document keeps its
own `<s>` and `</s>`, so that number n of a row begins at the n-th `<s>`; attention and masking stay
inside (`mpnet/collator.py`, `mpnet/two_stream.py`), and a document that shares a row is treated as if
it were alone in it.

>>> show("documents")
<s> 11 12 </s>
<s> 21 22 23 24 </s>
<s> 25 </s> <s> 31 </s>

**Best fit.** Which documents share a row is bin packing, decreasing best fit: the longest first,
each into the fullest row that still has room for it, or into a new one. The rest of a row is lost,
which on real text is a percent or less. Here are documents for rows of 10; the 3 goes to the 7 and
not to the 6, which has more room:

>>> best_fit(np.array([3, 6, 7, 4]), capacity=10)
array([0, 1, 0, 1])

A corpus is packed window by window, each a fixed number of tokens: so the memory it takes does not
grow with the corpus, and rows stay near their neighbours in the text. The plan depends on the
documents alone, not on how many processes delivered them in what portions.

On 99 novels, a paragraph a document and 512 tokens a row (`docs/log.md`), `full` makes 29,956 rows
and `documents` 30,288, both full to the tenth of a percent; `none` makes 222,089, of which an
eighth would be tokens if all were padded to 512. Planning is no matter: 100,000 documents of random
length take about a tenth of a second, since each step is a look at the bits of one integer.

Others cut a document off at the end of the row (annotated-mpnet, most examples of HF) and throw the
rest away.

Next: `text/packing.py`, which does this to a whole corpus, once.

    N items (documents, pieces of them, rows)   F rows
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
    """Sequences of tokens of different lengths, one behind the other in a flat array.

    A list of arrays costs a Python object for each document, a hundred bytes and a call to numpy
    for everything that is done to it. Here all documents are handled in one call:

    >>> documents = Ragged.of([[1, 2], [3]])
    >>> documents.take(np.array([1, 0]))
    Ragged(values=array([3, 1, 2], dtype=int32), lengths_N=array([1, 2]))

    Attributes:
        values: all tokens.
        lengths_N: how many of them belong to each sequence.
    """

    values: Ids
    lengths_N: Lengths

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]]) -> "Ragged":
        """Put sequences behind one another."""
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
        # Where each token of the result is taken from, without a loop over the sequences: each
        # moves as far as the beginning of its sequence does.
        moves_N = (self.ends_N - self.lengths_N)[order_N] - (np.cumsum(lengths_N) - lengths_N)
        return Ragged(
            self.values[np.repeat(moves_N, lengths_N) + np.arange(len(self.values))], lengths_N
        )


def cut_sequences(
    windows: Iterable[Ragged], packing: Packing, max_tokens: int, cls_id: int, sep_id: int
) -> Iterator[Ragged]:
    """Yield rows of at most max_tokens, `<s>` and `</s>` included.

    Args:
        windows: the documents' tokens; rows of the mode `documents` never reach beyond a window.
        packing: which of the three ways.
        max_tokens: T.
        cls_id: `<s>`.
        sep_id: `</s>`.
    """
    content = max_tokens - 2
    if packing == "full":
        windows = _streams(windows, content, sep_id)
    for window in windows:
        rows = framed(_cut(window, content), cls_id, sep_id)
        yield _put_together(rows, max_tokens) if packing == "documents" else rows


def framed(texts: Ragged, cls_id: int, sep_id: int) -> Ragged:
    """Put `<s>` before and `</s>` behind each sequence.

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
    """Return which row each item goes to, rows numbered by their first item.

    Args:
        lengths_N: of the items, none larger than the capacity.
        capacity: of a row.
    """
    row_of_N = np.empty_like(lengths_N)
    # The rows that have each amount of free space; and the amounts for which there is any, as the
    # bits of an integer, so that "the least space of at least n" is three operations on it.
    rows_with: list[list[int]] = [[] for _ in range(capacity + 1)]
    spaces = 0
    rows = 0
    order = np.argsort(-lengths_N, kind="stable")
    for item, length in zip(order.tolist(), lengths_N[order].tolist(), strict=True):
        # Bit i of `fitting`: there is a row with a space of length + i. Its lowest set bit is the
        # best fit; `x & -x` is that bit alone.
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = rows_with[space].pop()
            if not rows_with[space]:
                spaces ^= 1 << space
        else:
            space, row = capacity, rows
            rows += 1
        rows_with[space - length].append(row)
        spaces |= 1 << (space - length)
        row_of_N[item] = row
    # Numbered so far in the order of their longest items. By their first item instead, rows come in
    # the order of the text, and a row of one document stands where it would stand unpacked.
    first_F = np.full(rows, len(lengths_N))
    np.minimum.at(first_F, row_of_N, np.arange(len(lengths_N)))
    renumbered_F = np.argsort(np.argsort(first_F))
    return np.asarray(renumbered_F[row_of_N])


def _put_together(items: Ragged, max_tokens: int) -> Ragged:
    """Let items share rows, those of a row in their order in the text."""
    row_of_N = best_fit(items.lengths_N, max_tokens)
    together = items.take(np.argsort(row_of_N, kind="stable"))
    lengths_F = np.bincount(row_of_N, weights=items.lengths_N).astype(np.int64)
    return Ragged(together.values, lengths_F)


def _cut(documents: Ragged, content: int) -> Ragged:
    """Cut what is longer than `content` into as few pieces as will do, all full but the last.

    Only lengths change. The tokens stay where they are:

    >>> _cut(Ragged.of([[1, 2, 3, 4, 5], [6]]), content=2).lengths_N
    array([2, 2, 1, 1])
    """
    pieces_N = -(-documents.lengths_N // content)
    lengths = np.full(int(pieces_N.sum()), content, dtype=np.int64)
    lengths[np.cumsum(pieces_N) - 1] = documents.lengths_N - (pieces_N - 1) * content
    return Ragged(documents.values, lengths)


def _streams(windows: Iterable[Ragged], content: int, sep_id: int) -> Iterator[Ragged]:
    """Yield the stream that the documents and their separators are, in portions of whole rows.

    What does not fill a row waits for the next window, so that windows leave no trace in the rows:

    >>> windows = [Ragged.of([[11, 12], [13, 14, 15]]), Ragged.of([[16]])]
    >>> [portion.values.tolist() for portion in _streams(windows, content=3, sep_id=2)]
    [[11, 12, 2, 13, 14, 15], [2, 16]]
    """
    held: Ids = np.empty(0, dtype=np.int32)
    for window in windows:
        held = np.concatenate([held, np.insert(window.values, window.ends_N, sep_id)])
        # At least one token is held back: the last one of all is to be left out, because the end of
        # the row stands there anyway.
        whole = (len(held) - 1) // content * content
        if whole:
            yield Ragged(held[:whole], np.array([whole]))
        held = held[whole:]
    if len(held) > 1:
        yield Ragged(held[:-1], np.array([len(held) - 1]))
