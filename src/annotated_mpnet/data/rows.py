"""The table of rows: what packing writes and everybody else reads.

A row is an array of token ids, `<s>` first and `</s>` last. The table holds all of them in a file
that the operating system maps into memory: opening it takes a moment, whatever its size; reading a
row costs a look at a page of the file, which stays in the system's cache as long as there is room.
So the order of the rows may be any, and a shuffle over the whole text is as cheap as none.

Next: `packing.py`, which makes the table.

    N rows of the table   T max_tokens
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Ids: TypeAlias = npt.NDArray[np.integer]
"""Token ids. The table keeps 32 bits of each, half of what PyTorch wants them in."""


@dataclass(frozen=True)
class PackingReport:
    """What became of the text.

    Attributes:
        files: files that were read.
        empty_files: those of them without a document.
        documents: documents that were read.
        blank_lines: lines that were skipped because nothing was on them.
        dropped_documents: documents without a predictable token (nothing but unknown characters),
            which are left out.
        tokens: tokens of text; not counted are `<s>` and `</s>`.
        rows: N.
        fill: share of the N x T places of the table that hold a token, `<s>` and `</s>` included.
    """

    files: int
    empty_files: int
    documents: int
    blank_lines: int
    dropped_documents: int
    tokens: int
    rows: int
    fill: float

    def __str__(self) -> str:
        """Say it in one line, what is unusual at the end."""
        files = "1 file" if self.files == 1 else f"{self.files:,} files"
        line = (
            f"{self.documents:,} documents in {files}: {self.tokens:,} tokens in "
            f"{self.rows:,} rows, {self.fill:.1%} full"
        )
        unusual = {
            "empty files": self.empty_files,
            "blank lines skipped": self.blank_lines,
            "documents without a predictable token dropped": self.dropped_documents,
        }
        return line + "".join(f"; {count:,} {what}" for what, count in unusual.items() if count)


class PackedRows:
    """Rows of tokens in a memory-mapped Arrow file: any of them at once, none in memory.

    Attributes:
        fingerprint: names the rows; equal fingerprints mean equal rows.
        report: what became of the text.
    """

    def __init__(self, path: Path) -> None:
        """Map a file that `pack_rows` wrote."""
        table = pa.ipc.open_file(pa.memory_map(str(path)))
        self.fingerprint = path.stem
        self.report = PackingReport(**json.loads(table.schema.metadata[b"report"]))
        # Arrow keeps a list column as two flat arrays, all values and where each row starts among
        # them. Views of these, a pair for each batch of the file, and no row is ever copied twice.
        columns = [table.get_batch(i).column(0) for i in range(table.num_record_batches)]
        self._offsets = [column.offsets.to_numpy() for column in columns]
        self._values: list[Ids] = [column.values.to_numpy() for column in columns]
        self._first_rows = np.cumsum([0] + [len(column) for column in columns])

    def __len__(self) -> int:
        """Return N."""
        return int(self._first_rows[-1])

    def take(self, indices: npt.NDArray[np.int64]) -> list[Ids]:
        """Return rows by their index, each an array of at most T token ids."""
        if len(indices) and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(f"rows {indices.min()}..{indices.max()} of {len(self)}")
        batches = np.searchsorted(self._first_rows, indices, side="right") - 1
        return [
            self._values[batch][self._offsets[batch][place] : self._offsets[batch][place + 1]]
            for batch, place in zip(batches, indices - self._first_rows[batches], strict=True)
        ]
