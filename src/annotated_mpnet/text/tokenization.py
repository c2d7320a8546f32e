"""Text to tokens: documents of any length, in pieces, by several processes if wanted.

    text.arrow     pieces of documents, each with the number of its document
    tokens.arrow   the tokens of each piece, likewise

**Pieces.** A tokenizer takes a hundred bytes and more for each token while it works, so that a line
of 50 MB would need gigabytes. Long documents are therefore handed to it in pieces of 16,384
characters at the most, and their tokens are joined again. A piece ends at a space between two
characters that are none, and the space goes with what follows: there, WordPiece, byte-level BPE
and SentencePiece all begin a new piece of a word by themselves, so that the tokens are the same as
those of the whole.

>>> pieces("to be or not", longest=8)
['to be', ' or not']

Why not at any space? "be  or" holds two, and a tokenizer for source code may have a piece for two
spaces; cut between them, it would never see it.

Where no such space is in reach (Chinese; a base64 image), the cut is made where the piece is full.
Nothing is lost, and at most one word in 16,384 characters is cut in two.

>>> pieces("to be--ornot", longest=8), pieces("obladioblada", longest=8)
(['to', ' be--orn', 'ot'], ['obladiob', 'lada'])

A tokenizer that puts a space of its own in front of any text (Llama's `Prepend`) puts one in front
of each piece: one spare token in 16,384 characters.

**Text is only text.** A web page about transformers says `<mask>` and `</s>`. A tokenizer takes
these for the special tokens, unless told otherwise (`encode_special_tokens`); and if its vocabulary
holds them as ordinary pieces too, as SentencePiece's does, even then. So whatever special token
comes out of text becomes the unknown token. annotated-mpnet reads them as the real ones.

>>> from tokenizers import models, pre_tokenizers
>>> words = ["<s>", "<pad>", "</s>", "<unk>", "to", "be", "or", "not", "<mask>"]
>>> whole_words = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
>>> backend = Tokenizer(whole_words)
>>> backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
>>> tokenizer = PreTrainedTokenizerFast(
...     tokenizer_object=backend, cls_token="<s>", pad_token="<pad>", sep_token="</s>",
...     unk_token="<unk>", mask_token="<mask>")
>>> tokenizer("to <mask> be", add_special_tokens=False).input_ids  # the mask, which has the id 8
[4, 8, 5]
>>> table = pa.table({"text": ["to <mask> be", "??? </s>", "or not"], "document": [0, 1, 2]})
>>> Tokenise(tokenizer)(table).to_pydict()
{'input_ids': [[4, 3, 5], [6, 7]], 'document': [0, 2]}

A piece of which nothing is left but unknown tokens holds nothing to predict, and is left out: of
the three above, the second one.

**Processes.** The tokenizers library is written in Rust and has threads of its own, for the texts
of one call. Several processes gain what those threads cannot: the time that Python spends on lists
around the calls. They cost a start of some seconds each, and a copy of the tokenizer. Each takes a
contiguous share of the pieces, and their tokens are put behind one another again: so neither the
number of processes nor who is the fastest can change a row.

Next: `text/cutting.py`.

    N pieces, or documents   V vocabulary
"""

import os
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from annotated_mpnet.mpnet.collator import Ids
from annotated_mpnet.text.cutting import Ragged
from annotated_mpnet.text.tokenizer import vocabulary_of

LONGEST_PIECE = 2**14
"""Characters of a document that are tokenised together. A few pages: nearly all documents of a web
crawl are one piece, and a call costs nothing against the work in it."""

READ_AT_ONCE = 4 * 2**20
"""Characters of text that are held before they are written."""

TOKENISED_AT_ONCE = 256
"""Pieces that a process tokenises in one call; the library spreads them over its threads. At their
longest these are 4 million characters, so that a call takes some hundred megabytes at most."""

WORTH_PROCESSES = 64 * 2**20
"""Bytes of text from which several processes are worth their start: the tokenizers library has
threads of its own, so that what they gain is the time that Python spends around it."""


def pieces(document: str, longest: int = LONGEST_PIECE) -> list[str]:
    """Cut a document at spaces into pieces of at most `longest` characters.

    Joined, they are the document again: no character is lost, none is added.

    >>> "".join(pieces("to be  or not to be", longest=4))
    'to be  or not to be'
    """
    found = []
    start = 0
    while len(document) - start > longest:
        end = _last_seam(document, start + 1, start + longest)
        found.append(document[start:end])
        start = end
    found.append(document[start:])
    return found


def write_text(documents: Iterable[str], target: Path) -> None:
    """Write documents to an Arrow file, in pieces.

    Args:
        documents: in any number; a few megabytes of them are held at a time.
        target: the file, made here, with the columns "text" and "document", the number of the
            document that a piece belongs to.
    """
    schema = pa.schema([("text", pa.string()), ("document", pa.int64())])
    with target.open("wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for texts, numbers in _in_batches(documents):
            writer.write_batch(pa.record_batch([texts, numbers], schema=schema))


def tokenise(
    text: Path, target: Path, tokenizer: PreTrainedTokenizerFast, num_workers: int
) -> pa.Table:
    """Return the tokens of each piece, in order, memory-mapped from the target.

    Args:
        text: what `write_text` wrote.
        target: an Arrow file, made here.
        tokenizer: left as it is.
        num_workers: processes; 0 for as many as are worth it.

    Returns:
        The columns "input_ids", a list of int32 for each piece, and "document".
    """
    dataset = datasets.Dataset.from_file(str(text))
    # Said beforehand, so that it is not the first batch of each process that decides it. 32 bits:
    # half of what a tokenizer of transformers returns, and enough for any vocabulary.
    features = {"input_ids": datasets.List(datasets.Value("int32"))}
    features |= {"document": datasets.Value("int64")}
    # A fingerprint of our own, because `datasets` would compute one by pickling the tokenizer, to
    # look for the result in its cache; but our cache is that of the packed rows.
    tokens = dataset.with_format("arrow").map(
        Tokenise(tokenizer),
        batched=True,
        batch_size=TOKENISED_AT_ONCE,
        remove_columns=["text"],
        features=datasets.Features(features),
        num_proc=_processes(num_workers, text.stat().st_size, len(dataset)),
        cache_file_name=str(target),
        new_fingerprint="tokens",
        desc="Tokenising",
    )
    return tokens.data.table


def count_documents(tokens: pa.Table) -> int:
    """Return how many documents have tokens; those without are nowhere in the table."""
    return int(pa.compute.count_distinct(tokens.column("document")).as_py())


def count_tokens(tokens: pa.Table) -> int:
    """Return how many tokens there are."""
    return int(pa.compute.sum(pa.compute.list_value_length(tokens.column("input_ids"))).as_py())


def windows_of(tokens: pa.Table, at_least: int) -> Iterator[Ragged]:
    """Join the pieces again and yield whole documents, `at_least` so many tokens at a time.

    A window ends with the first document with which it is full: where, depends on the documents
    alone, not on the portions that the table is made of. Four pieces, of documents 0, 0, 2 and 3:

    >>> pieces = pa.array([[4, 5], [6, 7], [4], [5, 5]], pa.list_(pa.int32()))
    >>> tokens = pa.table({"input_ids": pieces, "document": [0, 0, 2, 3]})
    >>> for at_least in (1, 3, 5):
    ...     print([[document.tolist() for document in w] for w in windows_of(tokens, at_least)])
    [[[4, 5, 6, 7]], [[4]], [[5, 5]]]
    [[[4, 5, 6, 7]], [[4], [5, 5]]]
    [[[4, 5, 6, 7], [4]], [[5, 5]]]

    Args:
        tokens: from `tokenise`.
        at_least: tokens of a window, but for the last one, which may have fewer.
    """
    held: list[tuple[Ids, Ids, Ids]] = []
    # The table is in portions, and memory-mapped: what is looked at here is read from the disk
    # here, and what has become a window is let go.
    for batch in tokens.to_batches():
        column = batch.column("input_ids")
        lengths = np.diff(column.offsets.to_numpy())
        held.append((column.flatten().to_numpy(), lengths, batch.column("document").to_numpy()))
        if sum(len(values) for values, *_ in held) >= at_least:
            values, lengths, numbers = map(np.concatenate, zip(*held, strict=True))
            # The last document may go on in the next portion.
            *windows, rest = _split(_join(values, lengths, numbers), at_least, keep=1)
            yield from windows
            # What is held on to must be in pieces again, as the next portion is: as many from the
            # end as have the tokens of the rest together.
            of_rest = len(rest.values)
            first = len(numbers) - int(np.searchsorted(np.cumsum(lengths[::-1]), of_rest)) - 1
            held = [(rest.values, lengths[first:], numbers[first:])]
    if held:
        values, lengths, numbers = map(np.concatenate, zip(*held, strict=True))
        yield from _split(_join(values, lengths, numbers), at_least, keep=0)


def _join(values: Ids, lengths: Ids, numbers: Ids) -> Ragged:
    """Return documents, given pieces in order. The tokens stay where they are: they are neighbours.

    >>> _join(np.arange(6), lengths=np.array([2, 1, 3]), numbers=np.array([0, 0, 2])).lengths_N
    array([3, 3])

    Args:
        values: tokens of all pieces.
        lengths: of each piece.
        numbers: for each piece, that of its document.
    """
    firsts = np.flatnonzero(np.diff(numbers, prepend=-1))
    return Ragged(values, np.add.reduceat(lengths, firsts, dtype=np.int64))


def _split(documents: Ragged, at_least: int, keep: int) -> Iterator[Ragged]:
    """Yield windows, and what is left, which holds the last `keep` documents in any case.

    >>> documents = Ragged.of([[1, 2], [3], [4, 5, 6]])
    >>> [[each.tolist() for each in window] for window in _split(documents, at_least=2, keep=1)]
    [[[1, 2]], [[3], [4, 5, 6]]]
    """
    ends_N = documents.ends_N
    first = start = 0
    while True:
        last = int(np.searchsorted(ends_N, start + at_least)) + 1
        if last > len(documents) - keep:
            break
        yield Ragged(documents.values[start : ends_N[last - 1]], documents.lengths_N[first:last])
        first, start = last, int(ends_N[last - 1])
    if first < len(documents):
        yield Ragged(documents.values[start:], documents.lengths_N[first:])


class Tokenise:
    """Makes tokens of text that is only text, in whatever process.

    A class and not a closure, because `datasets.map` pickles it for its processes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        vocabulary = vocabulary_of(tokenizer)
        # A copy, because what is switched on below would also change how the caller's tokenizer
        # reads a `<mask>` that is meant as one.
        self.backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self.is_special_V = vocabulary.is_special_V
        self.unk_id = vocabulary.unk_id

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Tokenise a table of pieces: what `datasets.map` runs.

        Args:
            batch: with the columns "text" and "document".

        Returns:
            A table with the columns "input_ids" and "document", without the pieces that hold
            nothing to predict.
        """
        tokens, kept = self._encode(batch.column("text").to_pylist())
        offsets = np.concatenate([[0], tokens.ends_N]).astype(np.int32)
        return pa.table(
            {
                "input_ids": pa.ListArray.from_arrays(offsets, tokens.values),
                "document": batch.column("document").filter(pa.array(kept)),
            }
        )

    def _encode(self, texts: list[str]) -> tuple[Ragged, npt.NDArray[np.bool_]]:
        """Return the tokens of the pieces that hold a predictable one, and which these are."""
        # Here and not above, because the switch is not pickled along to another process.
        self.backend.encode_special_tokens = True
        # Fast, because it leaves out where in the text each token stands: nobody asks.
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        # One flat array instead of a list of lists: a Python list takes eight bytes for each token
        # and one call to `numpy` for each piece.
        lengths = np.array([len(encoding) for encoding in encodings], dtype=np.int64)
        ids = np.fromiter(
            chain.from_iterable(encoding.ids for encoding in encodings),
            dtype=np.int32,
            count=int(lengths.sum()),
        )
        # The unknown token is special too: where it stood, it stands again, and counts as nothing
        # to predict.
        special = self.is_special_V[ids]
        ids[special] = self.unk_id
        kept = _any_in_each(~special, lengths)
        return Ragged(ids[np.repeat(kept, lengths)], lengths[kept]), kept


def _any_in_each(
    flags: npt.NDArray[np.bool_], lengths_N: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Tell of each sequence, of which some may be empty, whether it has a flag that is set.

    >>> _any_in_each(np.array([False, True, False]), np.array([2, 0, 1]))
    array([ True, False, False])
    """
    # Not `np.logical_or.reduceat`, whose answer for an empty sequence is that of its neighbour.
    set_before = np.concatenate([[0], np.cumsum(flags)])
    ends_N = np.cumsum(lengths_N)
    return np.asarray(set_before[ends_N] > set_before[ends_N - lengths_N])


def _last_seam(text: str, start: int, end: int) -> int:
    """Return the last place of a space between two characters that are none; else the end.

    >>> text = "to be  or"
    >>> _last_seam(text, 1, 8), _last_seam(text, 3, 8)  # at 2; between 3 and 8 are only double ones
    (2, 8)
    """
    space = text.rfind(" ", start, end)
    while space > 0:
        if not text[space - 1].isspace() and not text[space + 1].isspace():
            return space
        space = text.rfind(" ", start, space)
    return end


def _in_batches(documents: Iterable[str]) -> Iterator[tuple[list[str], list[int]]]:
    """Group pieces and the numbers of their documents into lists of a bounded size in memory."""
    texts: list[str] = []
    numbers: list[int] = []
    characters = 0
    for number, document in enumerate(documents):
        for piece in pieces(document):
            texts.append(piece)
            numbers.append(number)
            characters += len(piece)
            if characters >= READ_AT_ONCE:
                yield texts, numbers
                texts, numbers, characters = [], [], 0
    if texts:
        yield texts, numbers


def _processes(num_workers: int, text_bytes: int, items: int) -> int | None:
    """Return how many processes tokenise; None for this one alone.

    >>> _processes(0, text_bytes=2**20, items=500), _processes(4, text_bytes=100, items=3)
    (None, 3)
    """
    wanted = num_workers
    if wanted == 0:
        wanted = (os.cpu_count() or 1) if text_bytes >= WORTH_PROCESSES else 1
    wanted = min(wanted, items)
    return wanted if wanted > 1 else None
