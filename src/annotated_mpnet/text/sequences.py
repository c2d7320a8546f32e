"""The table of rows: what packing writes and everybody else reads.

A row is an array of token ids, `<s>` first and `</s>` last. The table holds all of them in a file
that the operating system maps into memory: opening it takes a moment, whatever its size; reading a
row costs a look at a page of the file, which stays in the system's cache as long as there is room.
So the order of the rows may be any, and a shuffle over the whole text is as cheap as none.

Rows of different length cannot be a matrix. Arrow keeps them as two flat arrays: all values, and
where in them each row begins. Three rows are

    values     0 11 12 2   0 13 2   0 14 15 16 2        four bytes each
    offsets    0           4        7             12    row i is values[offsets[i]:offsets[i + 1]]

and written and read again, out of order and one of them twice:

>>> import tempfile
>>> report = PackingReport(Counts(documents=3), "none", 0, tokens=6, rows=3, fill=12 / 15)
>>> with tempfile.TemporaryDirectory() as folder:
...     path = Path(folder, "0123abcd.arrow")
...     with path.open("wb") as file:
...         writer = SequenceWriter(file)
...         writer.write(np.array([0, 11, 12, 2, 0, 13, 2], np.int32), np.array([4, 3]))
...         writer.write(np.array([0, 14, 15, 16, 2], np.int32), np.array([5]))
...         writer.finish(report)
...     rows = PackedSequences(path)
>>> [row.tolist() for row in rows.take(np.array([2, 0, 2]))]
[[0, 14, 15, 16, 2], [0, 11, 12, 2], [0, 14, 15, 16, 2]]
>>> len(rows), rows.lengths(), rows.fingerprint
(3, array([4, 3, 5]), '0123abcd')
>>> print(rows.report)
3 documents: 6 tokens in 3 rows, 80.0% full

The file is written in portions, so that memory is needed for one of them only; each is a pair of
such arrays, and to take a row is to find its portion by a binary search. Several processes that map
the same file share the memory that it takes.

HF: a `datasets.Dataset` is such a table too, and could be asked for rows. It would answer with
Python lists or copies, by way of features and formats. The arrays below it are all that is needed,
and views of them cost nothing: a row is not copied before the collator puts it into a batch.

Next: `text/packing.py`, which makes the table.

    N rows of the table   T max_tokens
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
    """What became of the text.

    Attributes:
        counts: what was read, and what was left out on the way.
        packing: how documents became rows.
        dropped_documents: documents without a predictable token (nothing but unknown characters),
            which are left out.
        tokens: tokens of text; not counted are `<s>` and `</s>`.
        rows: N.
        fill: share of the N x T places of the table that hold a token, `<s>` and `</s>` included.
    """

    counts: Counts
    packing: Packing
    dropped_documents: int
    tokens: int
    rows: int
    fill: float

    def __str__(self) -> str:
        """Say it in one line, what is unusual at the end."""
        # The counts begin with what was read, and go on with what is unusual about it.
        read, *unusual = str(self.counts).split("; ")
        if self.dropped_documents:
            unusual.append(
                f"{self.dropped_documents:,} documents without a predictable token dropped"
            )
        packed = f"{self.tokens:,} tokens in {self.rows:,} rows, {self.fill:.1%} full"
        return "; ".join([f"{read}: {packed}", *unusual])

    def to_json(self) -> str:
        """Write it down, so that a later start can say it without reading the text."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, written: bytes) -> "PackingReport":
        """Read what `to_json` wrote."""
        values = json.loads(written)
        return cls(**{**values, "counts": Counts(**values["counts"])})


class SequenceWriter:
    """Writes a table, portion by portion, and the report at the end.

    Attributes:
        rows: that were written so far.
        tokens: in them, `<s>` and `</s>` included.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._writer = pa.ipc.new_file(file, SCHEMA)
        self.rows = 0
        self.tokens = 0

    def write(self, values: Ids, lengths: npt.NDArray[np.int64]) -> None:
        """Add rows that stand one behind the other in `values`.

        Args:
            values: the tokens of all of them.
            lengths: of each.
        """
        self.rows += len(lengths)
        self.tokens += len(values)
        self._writer.write_batch(_batch(values, lengths))

    def finish(self, report: PackingReport) -> None:
        """Add the report, to an empty portion, and close the table.

        To the schema, where such things usually are, it cannot go: that stands at the beginning of
        the file, and is written before the first row.
        """
        nothing = _batch(np.empty(0, np.int32), np.empty(0, np.int64))
        self._writer.write_batch(nothing, custom_metadata={"report": report.to_json()})
        self._writer.close()


def _batch(values: Ids, lengths: npt.NDArray[np.int64]) -> pa.RecordBatch:
    """Return rows as Arrow has them.

    Its offsets have 32 bits: a portion may hold two billion tokens, a table any number of portions.
    """
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.record_batch([pa.ListArray.from_arrays(offsets, values)], schema=SCHEMA)


class PackedSequences:
    """Rows of tokens in a memory-mapped Arrow file: any of them at once, none in memory.

    Attributes:
        fingerprint: names the rows; equal fingerprints mean equal rows.
        report: what became of the text.
    """

    def __init__(self, path: Path) -> None:
        """Map a file that `pack_sequences` wrote."""
        table = pa.ipc.open_file(pa.memory_map(str(path)))
        _, metadata = table.get_batch_with_custom_metadata(table.num_record_batches - 1)
        self.fingerprint = path.stem
        self.report = PackingReport.from_json(metadata[b"report"])
        # Arrow keeps a list column as two flat arrays, all values and where each row starts among
        # them. Views of these, a pair for each batch of the file, and no row is ever copied twice.
        columns = [table.get_batch(i).column(0) for i in range(table.num_record_batches)]
        self._offsets = [column.offsets.to_numpy() for column in columns]
        self._values: list[Ids] = [column.values.to_numpy() for column in columns]
        self._first_rows = np.cumsum([0] + [len(column) for column in columns])

    def __len__(self) -> int:
        """Return N."""
        return int(self._first_rows[-1])

    def lengths(self) -> npt.NDArray[np.int64]:
        """Return how many tokens each row has, (N,)."""
        return np.concatenate([np.diff(offsets) for offsets in self._offsets]).astype(np.int64)

    def take(self, indices: npt.NDArray[np.int64]) -> list[Ids]:
        """Return rows by their index, each an array of at most T token ids.

        Args:
            indices: any of 0..N-1, in any order.

        Raises:
            IndexError: one of them is none of these; numpy would take -1 for the last.
        """
        if len(indices) and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(f"rows {indices.min()}..{indices.max()} of {len(self)}")
        batches = np.searchsorted(self._first_rows, indices, side="right") - 1
        return [
            self._values[batch][self._offsets[batch][place] : self._offsets[batch][place + 1]]
            for batch, place in zip(batches, indices - self._first_rows[batches], strict=True)
        ]
