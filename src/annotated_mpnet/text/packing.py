r"""Documents to packed sequences, once, in a table that every later start maps into memory.

Cutting what is too long throws text away, and padding what is too short throws computation away. So
sequences are filled (`text/cutting.py` shows the three ways). Here the second document holds no
word that the tokenizer knows; of the nine tokens that remain none is lost, and only the last
sequence is not full:

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
...     packed = pack_sequences([text], tokenizer, max_tokens=6, cache_dir=Path(folder))
...     for sequence in packed.take(np.arange(len(packed))):
...         print(" ".join(words[token] for token in sequence))
<s> to be or not </s>
<s> to be </s> not </s>
<s> to be </s>
>>> print(str(packed.report).replace("; ", "\n"))
3 documents in 1 file: 9 tokens in 3 sequences, 88.9% full, 3.0 words each, 10.0% unknown
1 documents without a predictable token dropped

The table's name is a hash of everything that it depends on: documents, tokenizer, length, packing.
It is made in three steps, none of which holds more than a portion of the text in memory:

    text.arrow     documents as they are read      `text/sources.py`        (deleted at the end)
    tokens.arrow   their tokens                    `text/tokenization.py`   (deleted at the end)
    HASH.arrow     sequences                       `text/cutting.py`

Everything is written in a scratch directory and renamed when complete, so an interruption leaves
nothing that could be taken for a table. A table that is damaged, or that an older version wrote
without a checksum, is packed again, and the user is told. 99 novels, 63 MB and 15 million tokens,
take 12 seconds on two cores (`docs/log.md`). A token takes four bytes on the disk.

Order and masks are not in the table: they are drawn in each epoch, so one table serves all seeds,
batch sizes and masking rates.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from filelock import FileLock
from transformers import PreTrainedTokenizerFast

from annotated_mpnet.errors import DataError, WriteError
from annotated_mpnet.mpnet.collator import Ids, Vocabulary
from annotated_mpnet.mpnet.config import Packing
from annotated_mpnet.mpnet.masking import find_words
from annotated_mpnet.text.cutting import cut_sequences
from annotated_mpnet.text.sequences import PackedSequences, PackingReport, SequenceWriter, seal
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
"""Part of every cache's name. Raise it when the same input gives other sequences."""

PACKED_AT_ONCE = 2**20
"""Tokens in a window. With `documents`, sequences do not cross windows, so changing it needs a new
`FORMAT`."""


@dataclass(frozen=True)
class _Job:
    """The arguments of `pack_sequences`."""

    source: DocumentSource
    tokenizer: PreTrainedTokenizerFast
    max_tokens: int
    packing: Packing
    num_workers: int

    @property
    def key(self) -> str:
        """Hash everything that the sequences depend on.

        Whatever is missing here would let a run train on the sequences of another setting.
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
    """Return the packed sequences of a text, from the cache if they were packed before.

    Args:
        source: the documents, or files in the order of their documents.
        tokenizer: from `load_tokenizer`.
        max_tokens: T, `<s>` and `</s>` included.
        packing: see `text/cutting.py`.
        num_workers: processes that tokenise; 0 for as many as are worth it.
        cache_dir: of the tables. Default: `annotated-mpnet` in the cache of `datasets`
            (HF_DATASETS_CACHE).

    Raises:
        DataError: the text cannot be read, changes while it is read, or holds nothing to predict.
        WriteError: the cache cannot be written.
    """
    if cache_dir is None:
        cache_dir = Path(datasets.config.HF_DATASETS_CACHE) / "annotated-mpnet"
    if isinstance(source, Sequence):
        source = LocalFiles(source)
    job = _Job(source, tokenizer, max_tokens, packing, num_workers)
    # Reads all files, at about 2 GB a second: sizes and dates would miss some edits.
    key = job.key
    packed = cache_dir / f"{key}.arrow"
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        # Another run or rank waits here and finds the table. Under the lock, a scratch directory is
        # always a leftover.
        with FileLock(cache_dir / f"{key}.lock"):
            sequences = _packed_before(packed)
            if sequences is None:
                _pack_anew(packed, job)
                sequences = PackedSequences(packed)
            sequences.report = sequences.report.found_by(source.skipped_files)
            return sequences
    # Problems of the text are DataErrors by now; this is the cache.
    except OSError as error:
        raise WriteError(
            f"cannot read or write the cache of packed text in {str(cache_dir)!r}: "
            f"{error.strerror or error}; free some space, or set HF_DATASETS_CACHE to another "
            "directory"
        ) from error


def _packed_before(packed: Path) -> PackedSequences | None:
    """Open a table; None if there is none, or a damaged one."""
    try:
        sequences = PackedSequences(packed)
    except FileNotFoundError:
        log.debug("%s: to be packed", packed)
        return None
    except ValueError as error:
        # On standard error, and not in the plan, which rank 0 prints: any rank may find it.
        log.warning("packing the text again, since %r cannot be used: %s", str(packed), error)
        return None
    log.debug("%s: packed before", packed)
    return sequences


def _pack_anew(packed: Path, job: _Job) -> None:
    """Write a table under its name, complete or not at all.

    The scratch directory is beside it, because a rename is atomic only within a file system.
    """
    scratch = packed.with_suffix(".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        _pack(job, scratch)
        seal(scratch / "rows.arrow", packed.stem)
        (scratch / "rows.arrow").replace(packed)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _pack(job: _Job, scratch: Path) -> None:
    """Write `rows.arrow` to the scratch directory, with a report at its end.

    Raises:
        DataError: there is no text, or nothing to predict in it.
    """
    # Copied first, because several processes read it, each from its own place.
    text = scratch / "text.arrow"
    counts = Counts()
    write_text(job.source.documents(counts), text)
    if counts.documents == 0:
        raise DataError(f"no text in it: {counts}; expected one document per line or row")
    tokens, dropped = tokenise(text, scratch / "tokens.arrow", job.tokenizer, job.num_workers)
    text.unlink()
    # A Chinese corpus and an English vocabulary, for example.
    if len(tokens) == 0:
        raise DataError(
            f"nothing to predict in the {counts.documents:,} documents that were read: the "
            "tokenizer knows none of their words; does --tokenizer-name suit the text?"
        )
    _write_sequences(job, tokens, dropped, counts, scratch / "rows.arrow")


def _write_sequences(
    job: _Job, tokens: pa.Table, dropped: int, counts: Counts, target: Path
) -> None:
    """Cut tokens into sequences and write them window by window, then the report."""
    vocabulary = vocabulary_of(job.tokenizer)
    special_ids = vocabulary.cls_id, vocabulary.sep_id
    windows = windows_of(tokens, PACKED_AT_ONCE)
    unknown, words = dropped, 0
    with target.open("wb") as file:
        writer = SequenceWriter(file)
        for cut in cut_sequences(windows, job.packing, job.max_tokens, *special_ids):
            writer.write(cut.values, cut.lengths_N)
            unknown += int((cut.values == vocabulary.unk_id).sum())
            words += _count_words(cut.values, vocabulary)
        # In the table, so a second start reports the same without reading the text.
        report = PackingReport(
            counts=counts,
            packing=job.packing,
            dropped_documents=counts.documents - count_documents(tokens),
            tokens=count_tokens(tokens),
            rows=writer.sequences,
            fill=writer.tokens / (writer.sequences * job.max_tokens),
            unknown=unknown / (count_tokens(tokens) + dropped),
            words=words,
        )
        writer.finish(report)


def _count_words(values: Ids, vocabulary: Vocabulary) -> int:
    """Count the words in sequences, one after the other, as masking finds them."""
    ids_BL = values[None]
    word_BL = find_words(vocabulary.begins_word(ids_BL), ~vocabulary.is_special_V[ids_BL])
    return int((word_BL == np.arange(len(values))).sum())
