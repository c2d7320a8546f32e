"""A dataset that never ends: documents as they come, rows of tokens, and batches.

What `sources`, `packing` and `loader` do for text that lies on a disk, one after the other and each
to its end, a stream does all at once and a little at a time:

    shards ----> texts ----> documents ----> rows ----> reservoir ----> batches
           read        filter          pack        wait           mask
                       tokenise

Everything that has a past is in a `StreamState` (`reservoir.py`). Take it between any two rows, end
the process, begin another one with it: the next row is the one that would have come.

**What is left out**, and counted (`StreamCounts`): rows without text, blank ones, texts shorter
than --min-text-length, documents that are held out, documents without a predictable token. Two
things are errors. If more than 1000 rows, and more than a tenth of them, are without text, it is
the wrong column. If a rank reads a whole epoch without one document, it would read for ever.

**Rows.** With --packing full the tokens that do not fill a row wait for the next document, across
the ends of shards and of epochs, so that every row of a stream is full; each document comes once in
each epoch:

    epoch 0   a b c d e | f g         epoch 1   a b c d e | f g
    rows      <s> a b c d e </s>
              <s> </s> f g </s> a </s>
              <s> b c d e </s> </s>

With --packing none a document begins a row of its own, and goes on in further ones. With --packing
documents, whole documents share a row where they fit best, looked for among those that are read
together, 256 at most. On paragraphs of novels and rows of 512 that fills 98.5 % of the places; text
on disk, where one can look among a million tokens, 99.7 %.

**Small datasets.** The reservoir is filled before the first row is drawn: until it is full, or a
whole epoch is in it, whichever comes first. Then each row that is drawn is replaced by the next of
the stream, across the ends of epochs. So a dataset that fits into it is shuffled as a whole; and no
row is lost at the end of an epoch, it only may still lie there while the next epoch goes by.

**Masks** are a function of a row's number, which counts over the ranks: row n of rank r is number
n x world_size + r.

Next: `eval_samples.py`, which texts a stream must not deliver; `training/trainer.py`, which keeps
the state of each update.
"""

import hashlib
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerFast

from annotated_mpnet.batch import Batch
from annotated_mpnet.config import DataConfig, Packing
from annotated_mpnet.data.collator import DataCollatorForMaskedPermutedLanguageModeling, Row
from annotated_mpnet.data.hold_out import text_hash
from annotated_mpnet.data.reservoir import StreamCounts, StreamState, draw_slot
from annotated_mpnet.data.row_cutting import Ragged, cut_rows
from annotated_mpnet.data.rows import Ids
from annotated_mpnet.data.shards import ShardReader
from annotated_mpnet.data.tokenising import Tokenise, pieces, windows_of
from annotated_mpnet.data.tokenizer import Vocabulary
from annotated_mpnet.errors import CheckpointError, DataError

__all__ = ["RowStream", "StreamCounts", "StreamLoader", "StreamState"]

FEW_WITHOUT_TEXT = 1000
"""So many rows without text are never too many; from then on a tenth of all rows is."""


class RowStream:
    """What a rank's rows are made of, and how; it has no state of its own.

    Attributes:
        fingerprint: names the rows, but for tokenizer, length and seed.
        reader: reads the rank's share of a dataset.
    """

    def __init__(
        self,
        reader: ShardReader,
        tokenizer: PreTrainedTokenizerFast,
        data: DataConfig,
        held_out: frozenset[int] = frozenset(),
    ) -> None:
        """Describe a stream; nothing is read yet.

        Args:
            reader: the rank's share of a dataset.
            tokenizer: from `load_tokenizer`.
            data: row length, shortest text, packing, size of the reservoir.
            held_out: hashes of the documents that must not be in it.
        """
        vocabulary = Vocabulary.of(tokenizer)
        left_out = hashlib.sha256(repr(sorted(held_out)).encode()).hexdigest()[:16]
        self.reader = reader
        self.fingerprint = (
            f"{reader.shards.fingerprint}, at least {data.min_text_length} characters, "
            f"{len(held_out)} held out ({left_out}), shuffled among {data.buffer_size} rows, "
            f"packing {data.packing}"
        )
        self._data = data
        self._held_out = held_out
        self._tokenise = Tokenise(tokenizer)
        self._cls_id, self._sep_id = vocabulary.cls_id, vocabulary.sep_id

    def begin(self, state: StreamState) -> "RowCursor":
        """Return the rows from a state on.

        Raises:
            CheckpointError: the state is another rank's, or of another number of ranks.
        """
        mine, saved = (self.reader.rank, self.reader.world_size), (state.rank, state.world_size)
        if mine != saved:
            raise CheckpointError(
                f"the state of the stream is that of rank {saved[0]} of {saved[1]}, this is rank "
                f"{mine[0]} of {mine[1]}: a stream is split among the ranks. Go on with "
                f"{saved[1]} processes; or, with --allow-change world-size, from the next epoch on"
            )
        return RowCursor(self, state)

    def documents(self, values: list[object]) -> tuple[Ragged, StreamCounts]:
        """Return the tokens of each document in a column's values."""
        data = self._data
        texts = [value for value in values if isinstance(value, str)]
        with_text = [text for text in texts if text.strip()]
        long_enough = [text for text in with_text if len(text) >= data.min_text_length]
        wanted = [text for text in long_enough if text_hash(text) not in self._held_out]
        documents = self._tokens_of(wanted)
        return documents, StreamCounts(
            documents=len(documents),
            blank=len(texts) - len(with_text),
            not_text=len(values) - len(texts),
            too_short=len(with_text) - len(long_enough),
            held_out=len(long_enough) - len(wanted),
            unpredictable=len(wanted) - len(documents),
        )

    def pack(self, remainder: Ids, documents: Ragged) -> tuple[list[Ids], Ids]:
        """Return the rows that documents make, after what was left before, and what is left now."""
        if self._data.packing != "full":
            return self._cut(documents, self._data.packing), remainder
        separated = np.insert(documents.values, documents.ends_N, self._sep_id)
        tokens = np.concatenate([remainder, separated])
        content = self._data.max_tokens - 2
        full = len(tokens) // content * content
        # Cut like a single long document. The copy, because a slice would keep all tokens in
        # memory.
        return self._cut(Ragged(tokens[:full], np.array([full])), "none"), tokens[full:].copy()

    def _tokens_of(self, texts: list[str]) -> Ragged:
        """Return the tokens of each text that has any to predict; the same as for text on disk."""
        numbered = [(piece, n) for n, text in enumerate(texts) for piece in pieces(text)]
        if not numbered:
            return Ragged.of([])
        tokens = self._tokenise(
            pa.table({"text": [each for each, _ in numbered], "document": [n for _, n in numbered]})
        )
        # All of it is one window, however large.
        return next(windows_of(tokens, at_least=2**62)) if len(tokens) else Ragged.of([])

    def _cut(self, documents: Ragged, packing: Packing) -> list[Ids]:
        if len(documents.values) == 0:
            return []
        special_ids = self._cls_id, self._sep_id
        (rows,) = cut_rows([documents], packing, self._data.max_tokens, *special_ids)
        # Copies, or a row in the reservoir would keep all the rows that it was cut with.
        return [row.copy() for row in rows]

    @property
    def buffer_size(self) -> int:
        """Slots of the reservoir."""
        return self._data.buffer_size


class RowCursor:
    """A place in a stream, which moves on by one row at a time."""

    def __init__(self, stream: RowStream, state: StreamState) -> None:
        self._stream = stream
        self._steps = stream.reader.read(state.position)
        # The parts of the state that change in place; `state` puts them together again.
        self._state = state
        self._pending = deque(state.pending)
        self._reservoir = list(state.reservoir)

    @property
    def state(self) -> StreamState:
        """All that the following rows depend on."""
        return replace(self._state, pending=tuple(self._pending), reservoir=tuple(self._reservoir))

    def take(self) -> Row:
        """Deliver the next row.

        Raises:
            DataError: the dataset cannot be read, or holds no text to train on.
        """
        # Once, before the first row of all: it never empties.
        if not self._reservoir:
            self._fill()
        reader, n = self._stream.reader, self._state.delivered
        # The replacement first: if the stream breaks here, the state is still one between two rows.
        following = self._next_row()
        slot = draw_slot(reader.seed, reader.rank, n, len(self._reservoir))
        row, self._reservoir[slot] = self._reservoir[slot], following
        self._state = replace(self._state, delivered=n + 1)
        return Row(row, epoch=0, index=n * reader.world_size + reader.rank)

    def close(self) -> None:
        """Close what is read."""
        self._steps.close()

    def _fill(self) -> None:
        """Fill the slots: all of them, or with what one epoch has, but at least one."""
        epoch = self._state.position.epoch
        while len(self._reservoir) < self._stream.buffer_size:
            if self._pending:
                self._reservoir.append(self._pending.popleft())
            elif self._reservoir and self._state.position.epoch > epoch:
                return
            else:
                self._read_on()

    def _next_row(self) -> Ids:
        while not self._pending:
            self._read_on()
        return self._pending.popleft()

    def _read_on(self) -> None:
        """Read a few texts more, and pack them."""
        before = self._state
        values, position = next(self._steps)
        documents, met = self._stream.documents(values)
        counts = before.counts + met
        rows, remainder = self._stream.pack(before.remainder, documents)
        self._pending.extend(rows)
        self._state = replace(before, position=position, counts=counts, remainder=remainder)
        self._refuse_other_columns(counts)
        if position.epoch > before.position.epoch:
            self._refuse_empty_epochs(counts.documents - before.documents_before_epoch)
            self._state = replace(self._state, documents_before_epoch=counts.documents)

    def _refuse_other_columns(self, counts: StreamCounts) -> None:
        if counts.not_text > max(FEW_WITHOUT_TEXT, counts.rows_read / 10):
            raise DataError(
                f"{counts.not_text:,} of {counts.rows_read:,} rows of "
                f"{self._stream.fingerprint} hold no text; expected strings: name another column "
                "with --text-field"
            )

    def _refuse_empty_epochs(self, documents: int) -> None:
        if documents == 0:
            reader = self._stream.reader
            share = f" for rank {reader.rank} of {reader.world_size}" * (reader.world_size > 1)
            raise DataError(
                f"nothing to train on in the whole of {self._stream.fingerprint}{share}: "
                f"{self._state.counts}; choose other text, or lower --min-text-length or "
                "--eval-samples"
            )


@dataclass(frozen=True)
class StreamLoader:
    """The batches of a run over a stream, an update at a time.

    Attributes:
        rows: the rank's rows.
        collator: makes a batch of rows.
        batch_size: B, of this rank's batches.
    """

    rows: RowStream
    collator: DataCollatorForMaskedPermutedLanguageModeling
    batch_size: int

    def updates(
        self, first_update: int, micro_batches: int, state: StreamState | None = None
    ) -> Generator[tuple[list[Batch], StreamState]]:
        """Yield the micro-batches of each update, and the state of the stream behind them.

        Args:
            first_update: the number of the first one.
            micro_batches: batches in an update.
            state: behind the update before it; None to begin the dataset at its beginning.

        Raises:
            CheckpointError: the state is another rank's, or of another number of ranks.
            DataError: the dataset cannot be read, or holds no text to train on.
        """
        if state is None:
            reader = self.rows.reader
            # Rows are numbered from the beginning of the run, so that masks differ from those of
            # the updates before, if there were any.
            delivered = first_update * micro_batches * self.batch_size
            state = StreamState(reader.rank, reader.world_size, delivered=delivered)
        cursor = self.rows.begin(state)
        try:
            while True:
                batches = [
                    self.collator([cursor.take() for _ in range(self.batch_size)])
                    for _ in range(micro_batches)
                ]
                yield batches, cursor.state
        finally:
            cursor.close()
