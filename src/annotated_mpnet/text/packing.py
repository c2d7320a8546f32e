r"""Documents to rows of tokens, once, into a table that every later start just maps into memory.

**The problem.** Documents have all lengths, the network wants rows of one length. Cutting what is
too long throws text away; padding what is too short throws computation away: on the paragraphs of
a novel half of a batch can be padding.

**The idea.** Fill the rows, and throw nothing away. There are three ways to do it, and
`text/cutting.py` draws them: rows are cut from an endless stream (`full`, the paper's), or hold one
document (`none`), or several that do not see each other (`documents`).

Three documents and rows of six; the second document holds no word that the tokenizer knows. Of the
nine tokens that remain none is lost, and the last row alone is not full:

>>> import tempfile
>>> import numpy as np
>>> from tokenizers import Tokenizer, models, pre_tokenizers
>>> words = ["<s>", "<pad>", "</s>", "<unk>", "to", "be", "or", "not", "<mask>"]
>>> whole_words = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
>>> backend = Tokenizer(whole_words)
>>> backend.pre_tokenizer = pre_tokenizers.Whitespace()
>>> tokenizer = PreTrainedTokenizerFast(
...     tokenizer_object=backend, cls_token="<s>", pad_token="<pad>", sep_token="</s>",
...     unk_token="<unk>", mask_token="<mask>")
>>> with tempfile.TemporaryDirectory() as folder:
...     text = Path(folder, "text.txt")
...     _ = text.write_text("to be or not to be\n???\nnot to be\n")
...     rows = pack_sequences([text], tokenizer, max_tokens=6, cache_dir=Path(folder))
...     for row in rows.take(np.arange(len(rows))):
...         print(" ".join(words[token] for token in row))
<s> to be or not </s>
<s> to be </s> not </s>
<s> to be </s>
>>> print(str(rows.report).replace("; ", "\n"))
3 documents in 1 file: 9 tokens in 3 rows, 88.9% full
1 documents without a predictable token dropped

**Once.** Tokenising is slow and always gives the same, so it is done once. The rows go to an Arrow
file whose name is a hash of all that they depend on: the documents, the tokenizer, the row length,
the way of packing. A second start finds the file and maps it into memory: any row at once, without
reading the others, and with no more memory used than the rows that are looked at. Three steps:

    text.arrow     documents, as they are read     `text/sources.py`        (deleted at the end)
    tokens.arrow   their tokens                    `text/tokenization.py`     (deleted at the end)
    HASH.arrow     rows                            `text/cutting.py`

The middle one is `datasets.map`, in several processes if wanted; documents keep their order, so the
rows do not depend on how many. All is written under another name and renamed when it is complete:
what an interruption leaves behind is never taken for rows. No step holds more than a portion of the
text in memory: it does not matter how large the corpus is.

**What it costs.** 99 novels, 63 MB of text and 15 million tokens, take 12 seconds on two cores
(`docs/log.md`), the second start two, most of which goes into imports. On the disk a token of the
table has four bytes, so a billion of them 4 GB, and while the table is made the scratch files need
that much again, and the text besides.

What stays random is not in the table: order (`training/loader.py`) and masks (`mpnet/masking.py`) are drawn anew
in each epoch. One table therefore serves runs with all seeds, all batch sizes, all masking rates.

Next: `mpnet/masking.py`, which hides tokens of these rows; or `training/loader.py`, which orders them.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow as pa
from filelock import FileLock
from transformers import PreTrainedTokenizerFast

from annotated_mpnet.errors import DataError, WriteError
from annotated_mpnet.mpnet.config import Packing
from annotated_mpnet.text.cutting import cut_sequences
from annotated_mpnet.text.sequences import PackedSequences, PackingReport, SequenceWriter
from annotated_mpnet.text.sources import Counts, DocumentSource, LocalFiles
from annotated_mpnet.text.tokenization import (
    count_documents,
    count_tokens,
    tokenise,
    windows_of,
    write_text,
)
from annotated_mpnet.text.tokenizer import tokenizer_hash, vocabulary_of

log = logging.getLogger(__name__)

FORMAT = 2
"""Part of every cache's name; to be raised when the same input shall give other rows. Forgotten,
the change would reach new texts only, and not those that were packed before it."""

PACKED_AT_ONCE = 2**20
"""Tokens of documents that are cut into rows, and written, in one go. In the mode `documents` it is
also the window among whose documents those that share a row are looked for: changing it changes
rows, so that `FORMAT` would have to be raised."""


@dataclass(frozen=True)
class _Job:
    """What rows are made of, and how; the arguments of `pack_sequences` under one name.

    Attributes:
        source: the documents.
        tokenizer: makes tokens of them.
        max_tokens: T, the longest row.
        packing: how documents become rows.
        num_workers: how fast; the only one of these that the rows do not depend on.
    """

    source: DocumentSource
    tokenizer: PreTrainedTokenizerFast
    max_tokens: int
    packing: Packing
    num_workers: int

    @property
    def key(self) -> str:
        """Hash all that the rows depend on.

        What is missing here and changes the rows would be a bug of the worst kind: the run would
        train on the rows of another setting, and nothing would say so. What is here without need
        (a path, a date, the number of processes) would only cost time, for packing again.
        """
        depends_on = [FORMAT, self.packing, self.source.fingerprint]
        depends_on += [tokenizer_hash(self.tokenizer), self.max_tokens]
        return hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()


def pack_sequences(
    source: DocumentSource | Sequence[Path],
    tokenizer: PreTrainedTokenizerFast,
    max_tokens: int,
    *,
    packing: Packing = "full",
    num_workers: int = 0,
    cache_dir: Path | None = None,
) -> PackedSequences:
    """Return the rows of a text, from the cache where they were packed before.

    Args:
        source: the documents, or files in the order of their documents.
        tokenizer: from `load_tokenizer`.
        max_tokens: T, the longest row, `<s>` and `</s>` included.
        packing: how documents become rows; see `text/cutting.py`.
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
    # The name is made of the contents of all files: they are read once here, at some 2 GB a second,
    # before it is known whether they are read at all. To trust sizes and dates would save that, and
    # miss an edit that leaves both alone.
    key = job.key
    packed = cache_dir / f"{key}.arrow"
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        # Whoever comes second, another run or another rank, waits and finds the rows made. It also
        # makes what lies in the scratch directory a leftover, never somebody's work.
        with FileLock(cache_dir / f"{key}.lock"):
            known = _is_readable(packed)
            log.debug("%s: %s", packed, "packed before" if known else "to be packed")
            if not known:
                _pack_anew(packed, job)
            return PackedSequences(packed)
    # What goes wrong with the text has become a DataError where it was read. What is left can only
    # be the cache: a full disk, a directory of somebody else's.
    except OSError as error:
        raise WriteError(
            f"the cache of packed text in {str(cache_dir)!r} cannot be written: "
            f"{error.strerror or error}; make room, or set HF_DATASETS_CACHE to another directory"
        ) from error


def _pack_anew(packed: Path, job: _Job) -> None:
    """Write a table under its name, complete or not at all.

    A rename within a file system happens as a whole: whoever looks for the name finds nothing or
    all of it. That is why the scratch directory lies beside the table and not where temporary files
    usually go, which may be another disk.
    """
    scratch = packed.with_suffix(".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    # However this ends, by an error or by Ctrl-C, gigabytes of scratch files do not stay behind; if
    # the power fails, the next start removes them, by the line above.
    try:
        _pack(job, scratch)
        (scratch / "rows.arrow").replace(packed)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _pack(job: _Job, scratch: Path) -> None:
    """Write `rows.arrow` to the scratch directory, with a report at its end.

    Raises:
        DataError: there is no text, or nothing to predict in it.
    """
    # The text is copied before it is tokenised, because several processes are to read it, each from
    # its own place: which a file of lines does not allow, nor a `.gz`, nor a filtered source.
    text = scratch / "text.arrow"
    counts = Counts()
    write_text(job.source.documents(counts), text)
    if counts.documents == 0:
        raise DataError(f"no text in it: {counts}; expected one document per line or row")
    tokens = tokenise(text, scratch / "tokens.arrow", job.tokenizer, job.num_workers)
    text.unlink()
    # Text without a single known word: a Chinese corpus and an English vocabulary, say. To go on
    # would be to train on nothing, and to find out by a division by zero.
    if len(tokens) == 0:
        raise DataError(
            f"nothing to predict in the {counts.documents:,} documents that were read: the "
            "tokenizer knows none of their words; does --tokenizer-name suit the text?"
        )
    _write_rows(job, tokens, counts, scratch / "rows.arrow")


def _write_rows(job: _Job, tokens: pa.Table, counts: Counts, target: Path) -> None:
    """Cut tokens into rows and write them, window by window, with a report behind the last.

    Args:
        job: how.
        tokens: of all documents, from `tokenise`.
        counts: what was met while the text was read.
        target: the file.
    """
    vocabulary = vocabulary_of(job.tokenizer)
    special_ids = vocabulary.cls_id, vocabulary.sep_id
    windows = windows_of(tokens, PACKED_AT_ONCE)
    with target.open("wb") as file:
        writer = SequenceWriter(file)
        for rows in cut_sequences(windows, job.packing, job.max_tokens, *special_ids):
            writer.write(rows.values, rows.lengths_N)
        # Behind the rows, because only now is it known. It travels inside of the table: a second
        # start says about its text what the first one said, without reading it.
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
    """Tell whether a file is there and complete: its last bytes are written last.

    An Arrow file ends with a table of contents and a mark. A file that was cut off, by a copy that
    ran out of space or a disk that failed, has neither, and is packed again.
    """
    try:
        pa.ipc.open_file(pa.memory_map(str(packed)))
    except (FileNotFoundError, pa.ArrowInvalid):
        return False
    return True
