"""Text to tokens: documents of any length, in pieces, by several processes if wanted.

**Pieces.** A tokenizer takes a hundred bytes and more per token while it works, so a line of 50 MB
would need gigabytes. Long documents are cut into pieces of at most 16,384 characters, and their
tokens are joined again. Pieces are cut at single spaces, and the space stays with what follows:
there, WordPiece, byte-level BPE and SentencePiece begin a new piece anyway, so the tokens are those
of the whole document.

>>> pieces("to be or not", longest=8)
['to be', ' or not']

Not at double spaces: a tokenizer for source code may have a piece for them. Where no single space
is in reach (Chinese; a base64 image), the cut is made where the piece is full, and at most one word
in 16,384 characters is split.

>>> pieces("to be--ornot", longest=8), pieces("obladioblada", longest=8)
(['to', ' be--orn', 'ot'], ['obladiob', 'lada'])

**Text is only text.** A web page about transformers says `<mask>` and `</s>`, and a tokenizer would
take these for the special tokens. So whatever special token comes out of text becomes the unknown
token. (annotated-mpnet reads them as the real ones.)

>>> from tokenizers import Tokenizer, models, pre_tokenizers
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

A piece of unknown tokens alone holds nothing to predict and is dropped: above, the second one.

**Processes** gain what the threads of the tokenizers library cannot: the time that Python spends
around its calls. Each takes a contiguous share of the pieces and writes its tokens to a file of its
own, so the result does not depend on their number. There is no queue and no lock that a killed
process could leave locked. Only the parent obeys signals. It ends the others, and the run if one of
them was killed; they end by themselves if the parent was.

    N pieces, or documents   V vocabulary
"""

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, pairwise
from multiprocessing.connection import Connection, wait
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute
from datasets.utils import tqdm
from transformers import PreTrainedTokenizerFast

from annotated_mpnet.errors import OutOfMemoryError
from annotated_mpnet.mpnet.collator import Ids
from annotated_mpnet.signals import Stopped, StopRequest, end_with_parent, listening
from annotated_mpnet.text.cutting import Ragged
from annotated_mpnet.text.tokenizer import reader_of_text, vocabulary_of

LONGEST_PIECE = 2**14
"""Characters of a document that are tokenised together: nearly all documents of a web crawl are one
piece."""

READ_AT_ONCE = 4 * 2**20
"""Characters of text in memory before they are written."""

TOKENISED_AT_ONCE = 256
"""Pieces per call, at most 4 million characters and some hundred megabytes."""

WORTH_PROCESSES = 64 * 2**20
"""Bytes of text for which several processes are worth their start."""

MOST_PROCESSES = 64
"""Unless there are more CPUs: each takes memory and open files, and gains nothing without a CPU."""

TOKENS = pa.schema([("input_ids", pa.list_(pa.int32())), ("document", pa.int64())])


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

    The columns are "text" and "document", the number of the document that a piece belongs to.
    """
    schema = pa.schema([("text", pa.string()), ("document", pa.int64())])
    with target.open("wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for texts, numbers in _in_batches(documents):
            writer.write_batch(pa.record_batch([texts, numbers], schema=schema))


def tokenise(
    text: Path, target: Path, tokenizer: PreTrainedTokenizerFast, num_workers: int
) -> tuple[pa.Table, int]:
    """Write the tokens of each piece to files, in order, and return them memory-mapped.

    Args:
        text: from `write_text`.
        target: the name of the files, to which the number of a process is added.
        tokenizer: from `load_tokenizer`.
        num_workers: processes; 0 for as many as are worth it.

    Returns:
        The columns "input_ids", a list of int32 for each piece, and "document"; and the number of
        tokens in pieces that were dropped.

    Raises:
        OutOfMemoryError: a process was killed.
        Stopped: by a signal, after all processes have ended.
    """
    source = pa.ipc.open_stream(pa.memory_map(str(text))).read_all()
    processes = _processes(num_workers, text.stat().st_size, len(source))
    ends = [len(source) * each // processes for each in range(processes + 1)]
    shares = [
        (source.slice(start, end - start), target.with_name(f"{target.name}.{number}"))
        for number, (start, end) in enumerate(pairwise(ends))
    ]
    to_tokens = Tokenise(tokenizer)
    with tqdm(total=len(source), desc="Tokenising", unit=" pieces") as bar:
        if processes == 1:
            for done in _write_share(*shares[0], to_tokens):
                bar.update(done)
            dropped = to_tokens.dropped
        else:
            dropped = _in_processes(shares, to_tokens, bar.update)
    written = [pa.ipc.open_stream(pa.memory_map(str(file))).read_all() for _, file in shares]
    return pa.concat_tables(written), dropped


def count_documents(tokens: pa.Table) -> int:
    """Return how many documents have tokens."""
    return int(pa.compute.count_distinct(tokens.column("document")).as_py())


def count_tokens(tokens: pa.Table) -> int:
    """Return the number of tokens."""
    return int(pa.compute.sum(pa.compute.list_value_length(tokens.column("input_ids"))).as_py())


def windows_of(tokens: pa.Table, at_least: int) -> Iterator[Ragged]:
    """Join the pieces again and yield whole documents, at least so many tokens at a time.

    A window ends with the document that fills it, whatever batches the table consists of. Four
    pieces, of documents 0, 0, 2 and 3:

    >>> pieces = pa.array([[4, 5], [6, 7], [4], [5, 5]], pa.list_(pa.int32()))
    >>> tokens = pa.table({"input_ids": pieces, "document": [0, 0, 2, 3]})
    >>> for at_least in (1, 3, 5):
    ...     print([[document.tolist() for document in w] for w in windows_of(tokens, at_least)])
    [[[4, 5, 6, 7]], [[4]], [[5, 5]]]
    [[[4, 5, 6, 7]], [[4], [5, 5]]]
    [[[4, 5, 6, 7], [4]], [[5, 5]]]
    """
    held: list[tuple[Ids, Ids, Ids]] = []
    for batch in tokens.to_batches():
        column = batch.column("input_ids")
        lengths = np.diff(column.offsets.to_numpy())
        held.append((column.flatten().to_numpy(), lengths, batch.column("document").to_numpy()))
        if sum(len(values) for values, *_ in held) >= at_least:
            values, lengths, numbers = map(np.concatenate, zip(*held, strict=True))
            # The last document may continue in the next batch.
            *windows, rest = _split(_join(values, lengths, numbers), at_least, keep=1)
            yield from windows
            held = [(rest.values, rest.lengths_N, np.unique(numbers)[-len(rest) :])]
    if held:
        values, lengths, numbers = map(np.concatenate, zip(*held, strict=True))
        yield from _split(_join(values, lengths, numbers), at_least, keep=0)


def _join(values: Ids, lengths: Ids, numbers: Ids) -> Ragged:
    """Return documents, given pieces in order.

    >>> _join(np.arange(6), lengths=np.array([2, 1, 3]), numbers=np.array([0, 0, 2])).lengths_N
    array([3, 3])
    """
    firsts = np.flatnonzero(np.diff(numbers, prepend=-1))
    return Ragged(values, np.add.reduceat(lengths, firsts, dtype=np.int64))


def _split(documents: Ragged, at_least: int, keep: int) -> Iterator[Ragged]:
    """Yield windows, then the rest, which holds at least the last `keep` documents.

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
    """Makes tokens of text.

    Attributes:
        dropped: tokens so far in pieces that were dropped, all of them unknown.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        vocabulary = vocabulary_of(tokenizer)
        # A copy, because `encode_special_tokens` below would change the caller's tokenizer.
        self.backend = reader_of_text(tokenizer)
        self.backend.encode_special_tokens = True
        self.dropped = 0
        self.is_special_V = vocabulary.is_special_V
        self.unk_id = vocabulary.unk_id

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Turn the column "text" into "input_ids", without pieces that have no tokens."""
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
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        lengths = np.array([len(encoding) for encoding in encodings], dtype=np.int64)
        ids = np.fromiter(
            chain.from_iterable(encoding.ids for encoding in encodings),
            dtype=np.int32,
            count=int(lengths.sum()),
        )
        special = self.is_special_V[ids]
        ids[special] = self.unk_id
        piece = np.repeat(np.arange(len(lengths)), lengths)  # of each token
        kept = np.bincount(piece[~special], minlength=len(lengths)) > 0
        self.dropped += int(lengths[~kept].sum())
        return Ragged(ids[kept[piece]], lengths[kept]), kept


def _write_share(source: pa.Table, target: Path, to_tokens: Tokenise) -> Iterator[int]:
    """Write the tokens of pieces; yield how many pieces are done with each batch."""
    with target.open("wb") as file, pa.ipc.new_stream(file, TOKENS) as writer:
        for batch in source.to_batches(max_chunksize=TOKENISED_AT_ONCE):
            writer.write_table(to_tokens(pa.Table.from_batches([batch])))
            yield len(batch)


def _in_processes(
    shares: Sequence[tuple[pa.Table, Path]], to_tokens: Tokenise, report: Callable[[int], object]
) -> int:
    """Write each share in a process of its own; return how many tokens were dropped.

    Args:
        shares: the arguments of `_write_share`.
        to_tokens: its last argument.
        report: called with the number of pieces that were done.
    """
    # Forked: nothing is pickled, and nothing is imported again.
    context = multiprocessing.get_context("fork")
    workers: dict[Connection, multiprocessing.process.BaseProcess] = {}
    dropped = {}
    # Signals are only noted, here and in the workers, which inherit the handlers and never look.
    with listening(request := StopRequest()):
        try:
            for share in shares:
                receiver, sender = context.Pipe(duplex=False)
                worker = context.Process(
                    target=_work, args=(*share, to_tokens, sender, os.getpid())
                )
                worker.start()
                sender.close()  # the worker's is the last one, so the pipe ends when it dies
                workers[receiver] = worker
            waiting = set(workers)
            while waiting and request.number is None:
                ready = wait(waiting, timeout=0.1)  # which a signal does not end
                for receiver in waiting.intersection(ready):
                    said = _receive(receiver)
                    if said is None:
                        waiting.remove(receiver)
                        _check_end(workers[receiver])
                    else:
                        done, dropped[receiver] = said
                        report(done)
        finally:
            for each in workers.values():
                each.kill()
            for receiver, each in workers.items():
                each.join()
                receiver.close()
    if request.number is not None:
        signal.raise_signal(request.number)  # for the handler from before
        raise Stopped(request.number)
    return sum(dropped.values())


def _work(
    source: pa.Table,
    target: Path,
    to_tokens: Tokenise,
    sender: Connection,
    parent: int,
) -> None:
    """Tokenise a share. Sends what is done, or an error, to the parent."""
    # The processes are the threads.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    end_with_parent(parent)
    try:
        for done in _write_share(source, target, to_tokens):
            sender.send((done, to_tokens.dropped))
    except BaseException as error:
        error.add_note(traceback.format_exc())
        sender.send(error)


def _receive(receiver: Connection) -> tuple[int, int] | None:
    """Return the next message of a worker, None if it has ended; raise the error that it met."""
    try:
        said = receiver.recv()
    except (EOFError, OSError):  # after the last message, or within one
        return None
    if isinstance(said, BaseException):
        raise said
    return said[0], said[1]


def _check_end(worker: multiprocessing.process.BaseProcess) -> None:
    """Raise an error if a worker did not end by itself."""
    worker.join()
    if worker.exitcode:
        raise OutOfMemoryError(
            f"a process that tokenises text was killed (exit code {worker.exitcode}), as happens "
            "when memory runs out; start again with fewer processes, as with --num-workers 1"
        )


def _last_seam(text: str, start: int, end: int) -> int:
    """Return the place of the last single space; the end if there is none.

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
    """Group pieces and the numbers of their documents into lists of bounded size."""
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


def _processes(num_workers: int, text_bytes: int, items: int) -> int:
    """Return how many processes tokenise; with 1, it is this one.

    >>> _processes(0, text_bytes=2**20, items=500), _processes(4, text_bytes=100, items=3)
    (1, 3)
    """
    if multiprocessing.current_process().daemon:
        return 1  # Python lets it have no children
    cpus = os.cpu_count() or 1
    wanted = num_workers or (cpus if text_bytes >= WORTH_PROCESSES else 1)
    return max(1, min(wanted, items, max(cpus, MOST_PROCESSES)))
