"""The table of packed sequences: what packing writes and everybody else reads.

A sequence is an array of token ids, `<s>` first and `</s>` last. The operating system maps the file
into memory: opening it takes a moment, whatever its size, and reading a sequence costs a look at
one page of it. So a shuffle over the whole text costs nothing. Arrow keeps sequences of different
lengths as two flat arrays, all values and where each sequence begins:

    values     0 11 12 2   0 13 2   0 14 15 16 2        four bytes each
    offsets    0           4        7             12    sequence i: values[offsets[i]:offsets[i+1]]

>>> import tempfile
>>> report = PackingReport(Counts(documents=3), "none", 0, tokens=6, rows=3, fill=12 / 15)
>>> with tempfile.TemporaryDirectory() as folder:
...     path = Path(folder, "0123abcd.arrow")
...     with path.open("wb") as file:
...         writer = SequenceWriter(file)
...         writer.write(np.array([0, 11, 12, 2, 0, 13, 2], np.int32), np.array([4, 3]))
...         writer.write(np.array([0, 14, 15, 16, 2], np.int32), np.array([5]))
...         writer.finish(report)
...     sequences = PackedSequences(path)
>>> [each.tolist() for each in sequences.take(np.array([2, 0, 2]))]
[[0, 14, 15, 16, 2], [0, 11, 12, 2], [0, 14, 15, 16, 2]]
>>> len(sequences), sequences.lengths(), sequences.fingerprint
(3, array([4, 3, 5]), '0123abcd')
>>> print(sequences.report)
3 documents: 6 tokens in 3 sequences, 80.0% full

The file is written in batches, each a pair of such arrays; a binary search finds the batch of a
sequence. Processes that map the same file share its memory.

    N sequences   T max_tokens
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from annotated_mpnet.mpnet.collator import Ids
from annotated_mpnet.mpnet.config import Packing
from annotated_mpnet.text.counts import Counts

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
    """

    counts: Counts
    packing: Packing
    dropped_documents: int
    tokens: int
    rows: int
    fill: float

    def __str__(self) -> str:
        """One line, with what is unusual at the end."""
        read, *unusual = str(self.counts).split("; ")
        if self.dropped_documents:
            unusual.append(
                f"{self.dropped_documents:,} documents without a predictable token dropped"
            )
        packed = f"{self.tokens:,} tokens in {self.rows:,} sequences, {self.fill:.1%} full"
        return "; ".join([f"{read}: {packed}", *unusual])

    def to_json(self) -> str:
        """Serialise, for a later start that does not read the text."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, written: bytes) -> "PackingReport":
        """Read what `to_json` wrote."""
        values = json.loads(written)
        return cls(**{**values, "counts": Counts(**values["counts"])})


class SequenceWriter:
    """Writes a table batch by batch, and the report at the end.

    Attributes:
        rows: sequences written so far.
        tokens: in them, `<s>` and `</s>` included.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._writer = pa.ipc.new_file(file, SCHEMA)
        self.rows = 0
        self.tokens = 0

    def write(self, values: Ids, lengths: npt.NDArray[np.int64]) -> None:
        """Add sequences, whose tokens follow one another in `values`."""
        self.rows += len(lengths)
        self.tokens += len(values)
        self._writer.write_batch(_batch(values, lengths))

    def finish(self, report: PackingReport) -> None:
        """Add the report as metadata of an empty batch, and close the table.

        The schema cannot hold it: it is written before the first sequence.
        """
        nothing = _batch(np.empty(0, np.int32), np.empty(0, np.int64))
        self._writer.write_batch(nothing, custom_metadata={"report": report.to_json()})
        self._writer.close()


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
        """Map a file that `pack_sequences` wrote."""
        table = pa.ipc.open_file(pa.memory_map(str(path)))
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
