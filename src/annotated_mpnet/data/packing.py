"""Documents to rows of tokens, once, into a table that every later start just maps into memory.

**The problem.** Documents have all lengths, the network wants rows of one length. Cutting what is
too long throws text away; padding what is too short throws computation away: on the paragraphs of
a novel half of a batch can be padding.

**The idea** (section 3.1 of the paper: "full sentences", after RoBERTa). The documents are one
endless stream, with a separator between two of them, and rows are cut from it as they come. With
documents of 2, 5 and 1 tokens and rows of 6, of which `<s>` and `</s>` take two:

    documents   a b | c d e f g | h
    stream      a b </s> c d e f g </s> h
    rows        <s> a b </s> c </s>
                <s> d e f g </s>
                <s> </s> h </s>                        the last row is as short as it comes out

>>> stream = np.array([10, 11, 2, 12, 13, 14, 15, 16, 2, 17])
>>> for row in cut_rows(stream, max_tokens=6, cls_id=0, sep_id=2):
...     print(row)
[ 0 10 11  2 12  2]
[ 0 13 14 15 16  2]
[ 0  2 17  2]

Nothing is thrown away and nothing is repeated: a document longer than a row goes on in the next
one. Documents that share a row see each other, as in the original; what does not belong together
the network learns to tell from the `</s>` between.

**Once.** Tokenising is slow and always gives the same, so it is done once. The rows go to an Arrow
file whose name is a hash of all that they depend on: the files' contents, the tokenizer, the row
length. A second start finds the file and maps it into memory: any row at once, without reading the
others, and with no more memory used than the rows that are looked at. Three steps:

    text.arrow     documents, as they are read                     (deleted at the end)
    tokens.arrow   their tokens, each with a `</s>` behind it      (deleted at the end)
    HASH.arrow     rows

The middle one is `datasets.map`, in several processes if wanted; documents keep their order, so the
rows do not depend on how many. All is written under another name and renamed when it is complete:
what an interruption leaves behind is never taken for rows.

**Text is only text.** A web page about transformers says `<mask>` and `</s>`. A tokenizer takes
these for the special tokens, unless told otherwise (`encode_special_tokens`); and if its vocabulary
holds them as ordinary pieces too, as SentencePiece's does, even then. So whatever special token
comes out of text becomes the unknown token. annotated-mpnet reads them as the real ones.

Next: `masking.py`, which hides tokens of these rows; or `loader.py`, which orders them.

    N rows of the table   T max_tokens
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from filelock import FileLock
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from annotated_mpnet.data.rows import Ids, PackedRows, PackingReport
from annotated_mpnet.data.sources import Counts, fingerprint_files, read_documents, shown
from annotated_mpnet.data.tokenizer import Vocabulary, tokenizer_hash
from annotated_mpnet.errors import DataError, WriteError

FORMAT = 1
"""Part of every cache's name; to be raised when the same input shall give other rows."""

READ_AT_ONCE = 4 * 2**20
"""Characters of text that are held before they are written."""

TOKENISED_AT_ONCE = 256
"""Documents that a process tokenises in one call; the library spreads them over its threads."""

CUT_AT_ONCE = 2**20
"""Tokens of the stream that are cut into rows, and written, in one go."""

WORTH_PROCESSES = 64 * 2**20
"""Bytes of text from which several processes are worth their start. The tokenizers library has
threads of its own, so that what they gain is the quarter of the time that Python spends around
it."""


def pack_rows(
    paths: Sequence[Path],
    tokenizer: PreTrainedTokenizerFast,
    max_tokens: int,
    *,
    num_workers: int = 0,
    cache_dir: Path | None = None,
) -> PackedRows:
    """Return the rows of text files, from the cache where they were packed before.

    Args:
        paths: text files, in the order of their documents.
        tokenizer: from `load_tokenizer`.
        max_tokens: T, the longest row, `<s>` and `</s>` included.
        num_workers: processes that tokenise; 0 for as many as are worth it.
        cache_dir: where packed rows are kept. Default: `annotated-mpnet` in the cache of `datasets`
            (HF_DATASETS_CACHE).

    Raises:
        DataError: a file cannot be read, is no UTF-8 text or changes meanwhile, or all of them
            together hold nothing to predict.
        WriteError: the cache cannot be written.
    """
    if cache_dir is None:
        cache_dir = Path(datasets.config.HF_DATASETS_CACHE) / "annotated-mpnet"
    text_fingerprint = fingerprint_files(paths)
    depends_on = [FORMAT, "full", text_fingerprint, tokenizer_hash(tokenizer), max_tokens]
    key = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()
    packed = cache_dir / f"{key}.arrow"
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        # Whoever comes second, another run or another rank, waits and finds the rows made. It also
        # makes what lies in the scratch directory a leftover, never somebody's work.
        with FileLock(cache_dir / f"{key}.lock"):
            if not _is_readable(packed):
                _pack_anew(packed, paths, tokenizer, max_tokens, num_workers, text_fingerprint)
            return PackedRows(packed)
    except OSError as error:
        raise WriteError(
            f"the cache of packed text in {str(cache_dir)!r} cannot be written: "
            f"{error.strerror or error}; make room, or set HF_DATASETS_CACHE to another directory"
        ) from error


def cut_rows(stream: Ids, max_tokens: int, cls_id: int, sep_id: int) -> list[Ids]:
    """Cut a stream into rows of max_tokens, `<s>` and `</s>` included; the last may be shorter."""
    content = max_tokens - 2
    full = len(stream) // content
    rows_NT = np.empty((full, max_tokens), stream.dtype)
    rows_NT[:, 0] = cls_id
    rows_NT[:, 1:-1] = stream[: full * content].reshape(full, content)
    rows_NT[:, -1] = sep_id
    rest = stream[full * content :]
    last = [np.concatenate([[cls_id], rest, [sep_id]]).astype(stream.dtype)] if len(rest) else []
    return [*rows_NT, *last]


def _pack_anew(
    packed: Path,
    paths: Sequence[Path],
    tokenizer: PreTrainedTokenizerFast,
    max_tokens: int,
    num_workers: int,
    text_fingerprint: str,
) -> None:
    """Write a table under its name, complete or not at all."""
    scratch = packed.with_suffix(".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        _pack(paths, tokenizer, max_tokens, num_workers, scratch)
        if fingerprint_files(paths) != text_fingerprint:
            raise DataError(
                f"the text in {shown(paths[0])} or its neighbours changed while it was read; start "
                "again when it is complete"
            )
        (scratch / "rows.arrow").replace(packed)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _pack(
    paths: Sequence[Path],
    tokenizer: PreTrainedTokenizerFast,
    max_tokens: int,
    num_workers: int,
    scratch: Path,
) -> None:
    """Write `rows.arrow` to the scratch directory, with a report in its metadata."""
    counts, empty_files = _write_text(paths, scratch / "text.arrow")
    if counts.documents == 0:
        others = f" and {len(paths) - 1} more files" if len(paths) > 1 else ""
        raise DataError(
            f"no text in {shown(paths[0])}{others}: nothing, or nothing but blank lines; expected "
            "one document per line"
        )
    vocabulary = Vocabulary.of(tokenizer)
    tokenise = _Tokenise(tokenizer, vocabulary)
    documents = _tokenised(tokenise, scratch, _processes(num_workers, paths, counts.documents))
    if len(documents) == 0:
        raise DataError(
            f"nothing to predict in the {counts.documents} documents of {shown(paths[0])}: the "
            "tokenizer knows none of their words; does --tokenizer-name suit the text?"
        )
    # The last document's separator is not counted: the end of the row stands there anyway.
    stream_length = sum(len(chunk.flatten()) for chunk in documents.iterchunks()) - 1
    rows = -(-stream_length // (max_tokens - 2))
    report = PackingReport(
        files=len(paths),
        empty_files=empty_files,
        documents=counts.documents,
        blank_lines=counts.blank_lines,
        dropped_documents=counts.documents - len(documents),
        tokens=stream_length + 1 - len(documents),
        rows=rows,
        fill=(stream_length + 2 * rows) / (rows * max_tokens),
    )
    _write_rows(documents, vocabulary, max_tokens, report, scratch / "rows.arrow")


def _tokenised(tokenise: "_Tokenise", scratch: Path, processes: int | None) -> pa.ChunkedArray:
    """Return the tokens of each document in `text.arrow`, in order, memory-mapped."""
    tokens = datasets.Dataset.from_file(str(scratch / "text.arrow")).map(
        tokenise,
        batched=True,
        batch_size=TOKENISED_AT_ONCE,
        remove_columns=["text"],
        features=datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))}),
        num_proc=processes,
        cache_file_name=str(scratch / "tokens.arrow"),
        new_fingerprint="tokens",
        desc="Tokenising",
    )
    return tokens.data.column("input_ids")


class _Tokenise:
    """What `datasets.map` runs on each batch of documents, in whatever process."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, vocabulary: Vocabulary) -> None:
        # A copy, because what is switched on below would also change how the caller's tokenizer
        # reads a `<mask>` that is meant as one.
        self.backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self.is_special_V = vocabulary.is_special_V
        self.sep_id = vocabulary.sep_id
        self.unk_id = vocabulary.unk_id

    def __call__(self, batch: dict[str, list[str]]) -> dict[str, list[Ids]]:
        """Return the tokens of each document and a separator; documents without any are left
        out."""
        # Here and not above, because the switch is not pickled along to another process.
        self.backend.encode_special_tokens = True
        encodings = self.backend.encode_batch_fast(batch["text"], add_special_tokens=False)
        documents: list[Ids] = []
        for encoding in encodings:
            ids = np.array([*encoding.ids, self.sep_id], dtype=np.int32)
            text = ids[:-1]
            special = self.is_special_V[text]
            text[special] = self.unk_id
            if not special.all():
                documents.append(ids)
        return {"input_ids": documents}


def _write_text(paths: Sequence[Path], target: Path) -> tuple[Counts, int]:
    """Write all documents to an Arrow file; return what was met, and how many files had none."""
    counts = Counts()
    empty_files = 0
    schema = pa.schema([("text", pa.string())])
    with target.open("wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for path in paths:
            before = counts.documents
            for texts in _in_batches(read_documents(path, counts)):
                writer.write_batch(pa.record_batch([texts], schema=schema))
            empty_files += counts.documents == before
    return counts, empty_files


def _in_batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Group documents into lists of a bounded size in memory."""
    held: list[str] = []
    characters = 0
    for document in documents:
        held.append(document)
        characters += len(document)
        if characters >= READ_AT_ONCE:
            yield held
            held, characters = [], 0
    if held:
        yield held


def _write_rows(
    documents: pa.ChunkedArray,
    vocabulary: Vocabulary,
    max_tokens: int,
    report: PackingReport,
    target: Path,
) -> None:
    """Cut the stream that the documents and their separators are; write the rows, and the
    report."""
    schema = pa.schema(
        [("input_ids", pa.list_(pa.int32()))],
        metadata={"report": json.dumps(dataclasses.asdict(report))},
    )
    content = max_tokens - 2
    held: list[Ids] = []
    with target.open("wb") as file:
        with pa.ipc.new_file(file, schema) as writer:
            for chunk in documents.iterchunks():
                held.append(chunk.flatten().to_numpy())
                if sum(map(len, held)) >= CUT_AT_ONCE:
                    stream = np.concatenate(held)
                    # At least one token is held back: the last one of all is to be left out.
                    full = (len(stream) - 1) // content * content
                    writer.write_batch(_batch(stream[:full], vocabulary, max_tokens, schema))
                    held = [stream[full:]]
            stream = np.concatenate(held)[:-1]
            writer.write_batch(_batch(stream, vocabulary, max_tokens, schema))
        # A rename may reach the disk before the data does; after a power cut, a complete name
        # would stand on an empty file.
        file.flush()
        os.fsync(file.fileno())


def _batch(
    stream: Ids, vocabulary: Vocabulary, max_tokens: int, schema: pa.Schema
) -> pa.RecordBatch:
    rows = cut_rows(stream, max_tokens, vocabulary.cls_id, vocabulary.sep_id)
    offsets = np.cumsum([0] + [len(row) for row in rows], dtype=np.int32)
    values = np.concatenate(rows) if rows else stream
    return pa.record_batch([pa.ListArray.from_arrays(offsets, values)], schema=schema)


def _processes(num_workers: int, paths: Sequence[Path], documents: int) -> int | None:
    """Return how many processes tokenise; None for this one alone."""
    wanted = num_workers
    if wanted == 0:
        large = sum(path.stat().st_size for path in paths) >= WORTH_PROCESSES
        wanted = (os.cpu_count() or 1) if large else 1
    wanted = min(wanted, documents)
    return wanted if wanted > 1 else None


def _is_readable(packed: Path) -> bool:
    """Tell whether a file is there and complete: its last bytes are written last."""
    try:
        pa.ipc.open_file(pa.memory_map(str(packed)))
    except (FileNotFoundError, pa.ArrowInvalid):
        return False
    return True
