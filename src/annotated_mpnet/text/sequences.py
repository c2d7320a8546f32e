"""The table of packed sequences: what packing writes and everybody else reads.

A sequence is an array of token ids, `<s>` first and `</s>` last. The operating system maps the file
into memory: opening it takes a moment, whatever its size, and reading a sequence costs a look at
one page of it. So a shuffle over the whole text costs nothing. Arrow keeps sequences of different
lengths as two flat arrays, all values and where each sequence begins:

    values     0 11 12 2   0 13 2   0 14 15 16 2        four bytes each
    offsets    0           4        7             12    sequence i: values[offsets[i]:offsets[i+1]]

>>> import tempfile
>>> report = PackingReport(Counts(documents=3), "none", 0, 6, rows=3, fill=0.8, unknown=0, words=6)
>>> with tempfile.TemporaryDirectory() as folder:
...     path = Path(folder, "0123abcd.arrow")
...     with path.open("wb") as file:
...         writer = SequenceWriter(file)
...         writer.write(np.array([0, 11, 12, 2, 0, 13, 2], np.int32), np.array([4, 3]))
...         writer.write(np.array([0, 14, 15, 16, 2], np.int32), np.array([5]))
...         writer.finish(report)
...     seal(path, path.stem)
...     sequences = PackedSequences(path)
>>> [each.tolist() for each in sequences.take(np.array([2, 0, 2]))]
[[0, 14, 15, 16, 2], [0, 11, 12, 2], [0, 14, 15, 16, 2]]
>>> len(sequences), sequences.lengths(), sequences.fingerprint
(3, array([4, 3, 5]), '0123abcd')
>>> print(sequences.report)
3 documents: 6 tokens in 3 sequences, 80.0% full, 2.0 words each

The file is written in batches, each a pair of such arrays; a binary search finds the batch of a
sequence. Processes that map the same file share its memory.

**Damage.** A cache lies on a disk for months, and a flipped bit in it would be trained on: ids are
as good as any others. So its last 16 bytes are a checksum (XXH3) of its name and all other bytes,
which is compared each time the file is opened. That reads it once, at the speed of the disk, or at
about 12 GB a second if it is in memory; the text itself is hashed at 2 GB a second to find the
name of the file.

    N sequences   T max_tokens
"""

import dataclasses
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from annotated_mpnet.mpnet.collator import Ids
from annotated_mpnet.mpnet.config import Packing
from annotated_mpnet.text.counts import Counts

CHECKSUM_BYTES = 16

READ_AT_ONCE = 2**20
"""Bytes that are hashed together."""

MUCH_UNKNOWN = 0.05
"""From this share of unknown tokens on, the user is warned."""

FEW_WORDS = 5
"""With fewer words in a sequence, predicting whole words is predicting long stretches of text."""

SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32()))])


@dataclass(frozen=True)
class PackingReport:
    """What packing made of the text.

    Attributes:
        counts: what was read, and what was skipped.
        packing: how documents became sequences.
        dropped_documents: documents without a predictable token (only unknown characters).
        tokens: of text, without `<s>` and `</s>`.
        rows: N (the name is part of the cache's format).
        fill: share of the N x T places that hold a token.
        unknown: share of the tokens that are unknown, those of dropped documents included.
        words: as masking finds them.
    """

    counts: Counts
    packing: Packing
    dropped_documents: int
    tokens: int
    rows: int
    fill: float
    unknown: float
    words: int

    def __str__(self) -> str:
        """One line, with what is unusual at the end."""
        read, *unusual = str(self.counts).split("; ")
        if self.dropped_documents:
            unusual.append(
                f"{self.dropped_documents:,} documents without a predictable token dropped"
            )
        packed = f"{self.tokens:,} tokens in {self.rows:,} sequences, {self.fill:.1%} full"
        packed += f", {self.words / self.rows:,.1f} words each"
        if self.unknown:
            packed += (
                f", {self.unknown:.1%} unknown" if self.unknown > 0.0005 else ", <0.1% unknown"
            )
        return "; ".join([f"{read}: {packed}", *unusual])

    def warnings(self, whole_word_mask: bool) -> Iterator[str]:
        """Yield what makes this text a bad one to train on, if anything."""
        if self.unknown >= MUCH_UNKNOWN:
            yield (
                f"warning: {self.unknown:.0%} of the tokens are unknown, and nothing is learned "
                "from them; does --tokenizer-name suit the text? (train-mpnet-tokenizer makes one)"
            )
        elif whole_word_mask and self.words < FEW_WORDS * self.rows:
            yield (
                f"warning: a sequence has {self.words / self.rows:.1f} words as this tokenizer "
                "marks them, too few to predict whole words; give --no-whole-word-mask"
            )

    def found_by(self, skipped_files: int) -> "PackingReport":
        """Return the report of a search that skipped so many files.

        Everything else in it belongs to the contents, which name the cache.
        """
        counts = dataclasses.replace(self.counts, skipped_files=skipped_files)
        return dataclasses.replace(self, counts=counts)

    def to_json(self) -> str:
        """Serialise, for a later start that does not read the text."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, written: bytes) -> "PackingReport":
        """Read what `to_json` wrote."""
        values = json.loads(written)
        try:
            return cls(**{**values, "counts": Counts(**values["counts"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"the report of another version: {error}") from error


class SequenceWriter:
    """Writes a table batch by batch, and the report at the end.

    Attributes:
        sequences: how many were written so far.
        tokens: in them, `<s>` and `</s>` included.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._writer = pa.ipc.new_file(file, SCHEMA)
        self.sequences = 0
        self.tokens = 0

    def write(self, values: Ids, lengths: npt.NDArray[np.int64]) -> None:
        """Add sequences, whose tokens follow one another in `values`."""
        self.sequences += len(lengths)
        self.tokens += len(values)
        self._writer.write_batch(_batch(values, lengths))

    def finish(self, report: PackingReport) -> None:
        """Add the report as metadata of an empty batch, and close the table.

        The schema cannot hold it: it is written before the first sequence.
        """
        nothing = _batch(np.empty(0, np.int32), np.empty(0, np.int64))
        self._writer.write_batch(nothing, custom_metadata={"report": report.to_json()})
        self._writer.close()


def seal(path: Path, name: str) -> None:
    """Append the checksum to a finished table, for the name that it will have."""
    with path.open("r+b") as file:
        checksum = _checksum(file, name, path.stat().st_size)
        file.write(checksum)
        # A rename may reach the disk before the data.
        file.flush()
        os.fsync(file.fileno())


def _checksum(file: BinaryIO, name: str, size: int) -> bytes:
    """Hash a name and the next `size` bytes of a file."""
    checksum = xxhash.xxh3_128(name.encode())
    while size > 0 and (part := file.read(min(size, READ_AT_ONCE))):
        checksum.update(part)
        size -= len(part)
    return checksum.digest()


def _batch(values: Ids, lengths: npt.NDArray[np.int64]) -> pa.RecordBatch:
    # Offsets have 32 bits: up to two billion tokens a batch, any number of batches.
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.record_batch([pa.ListArray.from_arrays(offsets, values)], schema=SCHEMA)


class PackedSequences:
    """Sequences in a memory-mapped Arrow file.

    Attributes:
        fingerprint: equal fingerprints mean equal sequences.
        report: what packing made of the text.
    """

    def __init__(self, path: Path) -> None:
        """Map a file that `pack_sequences` wrote.

        Raises:
            ValueError: it is damaged, or was written before there were checksums.
            OSError: it cannot be read.
        """
        with path.open("rb") as file:
            size = max(0, path.stat().st_size - CHECKSUM_BYTES)
            expected, found = _checksum(file, path.stem, size), file.read()
        if found != expected:
            is_older = found.endswith(b"ARROW1")  # as Arrow's files end
            raise ValueError("an older version wrote it" if is_older else "its checksum is wrong")
        mapped = pa.memory_map(str(path)).read_buffer()
        table = pa.ipc.open_file(pa.BufferReader(mapped.slice(0, size)))
        _, metadata = table.get_batch_with_custom_metadata(table.num_record_batches - 1)
        self.fingerprint = path.stem
        self.report = PackingReport.from_json(metadata[b"report"])
        # Views, a pair for each batch of the file: no sequence is copied before it is collated.
        columns = [table.get_batch(i).column(0) for i in range(table.num_record_batches)]
        self._offsets = [column.offsets.to_numpy() for column in columns]
        self._values: list[Ids] = [column.values.to_numpy() for column in columns]
        self._first_rows = np.cumsum([0] + [len(column) for column in columns])

    def __len__(self) -> int:
        """Return N."""
        return int(self._first_rows[-1])

    def lengths(self) -> npt.NDArray[np.int64]:
        """Return how many tokens each sequence has, (N,)."""
        return np.concatenate([np.diff(offsets) for offsets in self._offsets]).astype(np.int64)

    def sample(self, first: int, last: int) -> list[Ids]:
        """Return some sequences, as they come."""
        return self.take(np.arange(first, last))

    def take(self, indices: npt.NDArray[np.int64]) -> list[Ids]:
        """Return sequences by their index, each an array of at most T token ids.

        Raises:
            IndexError: an index is not in 0..N-1 (numpy would take -1 for the last).
        """
        if len(indices) and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(f"sequences {indices.min()}..{indices.max()} of {len(self)}")
        batches = np.searchsorted(self._first_rows, indices, side="right") - 1
        return [
            self._values[batch][self._offsets[batch][place] : self._offsets[batch][place + 1]]
            for batch, place in zip(batches, indices - self._first_rows[batches], strict=True)
        ]
