"""Documents to rows of tokens, once, into a table that every later start just maps into memory.

**The problem.** Documents have all lengths, the network wants rows of one length. Cutting what is
too long throws text away; padding what is too short throws computation away: on the paragraphs of
a novel half of a batch can be padding.

**The idea.** Fill the rows, and throw nothing away. There are three ways to do it, and
`row_cutting.py` draws them: rows are cut from an endless stream (`full`, the paper's), or hold one
document (`none`), or several that do not see each other (`documents`).

**Once.** Tokenising is slow and always gives the same, so it is done once. The rows go to an Arrow
file whose name is a hash of all that they depend on: the documents, the tokenizer, the row length,
the way of packing. A second start finds the file and maps it into memory: any row at once, without
reading the others, and with no more memory used than the rows that are looked at. Three steps:

    text.arrow     documents, as they are read     `sources.py`        (deleted at the end)
    tokens.arrow   their tokens                    `tokenising.py`     (deleted at the end)
    HASH.arrow     rows                            `row_cutting.py`

The middle one is `datasets.map`, in several processes if wanted; documents keep their order, so the
rows do not depend on how many. All is written under another name and renamed when it is complete:
what an interruption leaves behind is never taken for rows. No step holds more than a portion of the
text in memory: it does not matter how large the corpus is.

Next: `masking.py`, which hides tokens of these rows; or `loader.py`, which orders them.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow as pa
from filelock import FileLock
from transformers import PreTrainedTokenizerFast

from annotated_mpnet.config import Packing
from annotated_mpnet.data.row_cutting import cut_rows
from annotated_mpnet.data.rows import PackedRows, PackingReport, RowWriter
from annotated_mpnet.data.sources import Counts, DocumentSource, LocalFiles
from annotated_mpnet.data.tokenising import (
    count_documents,
    count_tokens,
    tokenise,
    windows_of,
    write_text,
)
from annotated_mpnet.data.tokenizer import Vocabulary, tokenizer_hash
from annotated_mpnet.errors import DataError, WriteError

FORMAT = 2
"""Part of every cache's name; to be raised when the same input shall give other rows."""

PACKED_AT_ONCE = 2**20
"""Tokens of documents that are cut into rows, and written, in one go."""


@dataclass(frozen=True)
class _Job:
    """What rows are made of, and how."""

    source: DocumentSource
    tokenizer: PreTrainedTokenizerFast
    max_tokens: int
    packing: Packing
    num_workers: int

    @property
    def key(self) -> str:
        """Hash all that the rows depend on."""
        depends_on = [FORMAT, self.packing, self.source.fingerprint]
        depends_on += [tokenizer_hash(self.tokenizer), self.max_tokens]
        return hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()


def pack_rows(
    source: DocumentSource | Sequence[Path],
    tokenizer: PreTrainedTokenizerFast,
    max_tokens: int,
    *,
    packing: Packing = "full",
    num_workers: int = 0,
    cache_dir: Path | None = None,
) -> PackedRows:
    """Return the rows of a text, from the cache where they were packed before.

    Args:
        source: the documents, or files in the order of their documents.
        tokenizer: from `load_tokenizer`.
        max_tokens: T, the longest row, `<s>` and `</s>` included.
        packing: how documents become rows; see `row_cutting.py`.
        num_workers: processes that tokenise; 0 for as many as are worth it.
        cache_dir: where packed rows are kept. Default: `annotated-mpnet` in the cache of `datasets`
            (HF_DATASETS_CACHE).

    Raises:
        DataError: the text cannot be read, changes meanwhile, or holds nothing to predict.
        WriteError: the cache cannot be written.
    """
    if cache_dir is None:
        cache_dir = Path(datasets.config.HF_DATASETS_CACHE) / "annotated-mpnet"
    if isinstance(source, Sequence):
        source = LocalFiles(source)
    job = _Job(source, tokenizer, max_tokens, packing, num_workers)
    key = job.key
    packed = cache_dir / f"{key}.arrow"
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        # Whoever comes second, another run or another rank, waits and finds the rows made. It also
        # makes what lies in the scratch directory a leftover, never somebody's work.
        with FileLock(cache_dir / f"{key}.lock"):
            if not _is_readable(packed):
                _pack_anew(packed, job)
            return PackedRows(packed)
    except OSError as error:
        raise WriteError(
            f"the cache of packed text in {str(cache_dir)!r} cannot be written: "
            f"{error.strerror or error}; make room, or set HF_DATASETS_CACHE to another directory"
        ) from error


def _pack_anew(packed: Path, job: _Job) -> None:
    """Write a table under its name, complete or not at all."""
    scratch = packed.with_suffix(".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        _pack(job, scratch)
        (scratch / "rows.arrow").replace(packed)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _pack(job: _Job, scratch: Path) -> None:
    """Write `rows.arrow` to the scratch directory, with a report at its end."""
    text = scratch / "text.arrow"
    counts = Counts()
    write_text(job.source.documents(counts), text)
    if counts.documents == 0:
        raise DataError(f"no text in it: {counts}; expected one document per line or row")
    tokens = tokenise(text, scratch / "tokens.arrow", job.tokenizer, job.num_workers)
    text.unlink()
    if len(tokens) == 0:
        raise DataError(
            f"nothing to predict in the {counts.documents:,} documents that were read: the "
            "tokenizer knows none of their words; does --tokenizer-name suit the text?"
        )
    _write_rows(job, tokens, counts, scratch / "rows.arrow")


def _write_rows(job: _Job, tokens: pa.Table, counts: Counts, target: Path) -> None:
    vocabulary = Vocabulary.of(job.tokenizer)
    special_ids = vocabulary.cls_id, vocabulary.sep_id
    windows = windows_of(tokens, PACKED_AT_ONCE)
    with target.open("wb") as file:
        writer = RowWriter(file)
        for rows in cut_rows(windows, job.packing, job.max_tokens, *special_ids):
            writer.write(rows.values, rows.lengths_N)
        report = PackingReport(
            counts=counts,
            packing=job.packing,
            dropped_documents=counts.documents - count_documents(tokens),
            tokens=count_tokens(tokens),
            rows=writer.rows,
            fill=writer.tokens / (writer.rows * job.max_tokens),
        )
        writer.finish(report)
        # A rename may reach the disk before the data does; after a power cut, a complete name
        # would stand on an empty file.
        file.flush()
        os.fsync(file.fileno())


def _is_readable(packed: Path) -> bool:
    """Tell whether a file is there and complete: its last bytes are written last."""
    try:
        pa.ipc.open_file(pa.memory_map(str(packed)))
    except (FileNotFoundError, pa.ArrowInvalid):
        return False
    return True
