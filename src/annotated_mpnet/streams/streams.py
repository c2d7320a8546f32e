"""An endless dataset: texts as they come, packed into sequences, shuffled, and made into batches.

    shards ----> texts ----> documents ----> sequences ----> reservoir ----> batches
           read       filter           pack             wait            mask
                      tokenize

Everything that has a history is in a `StreamState` (`streams/reservoir.py`). Take it between any
two sequences, end the process, start another one with it: the next sequence is the same.

**Packing.** With --packing full, tokens that do not fill a sequence wait for the next document,
across the ends of shards and epochs. Two documents, `a b c d e` and `f g`, in sequences of 7:

    <s> a b c d e </s>
    <s> </s> f g </s> a </s>        the </s> of document 1 had no place; its next epoch begins
    <s> b c d e </s> </s>

With --packing none, each document starts a sequence of its own and continues in further ones. With
--packing documents, whole documents share a sequence where they fit best among those that were read
together, at most 256. On paragraphs of novels and sequences of 512 that fills 98.5 % of the places.

**Small datasets.** The reservoir is filled before the first sequence is drawn, with all slots or
one whole epoch, whichever comes first. Then each sequence drawn is replaced by the next one. So a
dataset that fits into it is shuffled as a whole, and nothing is lost at the end of an epoch.

**Masks** are a function of a sequence's number: sequence n of rank r is n x world_size + r. A
sequence of a stream never comes twice, so the epoch in that function is always 0.
"""

import hashlib
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerFast

from annotated_mpnet.errors import CheckpointError, DataError
from annotated_mpnet.mpnet.batch import Batch
from annotated_mpnet.mpnet.collator import (
    DataCollatorForMaskedPermutedLanguageModeling,
    Ids,
    NumberedSequence,
)
from annotated_mpnet.settings.config import DataConfig
from annotated_mpnet.streams.reservoir import StreamCounts, StreamState, draw_slot
from annotated_mpnet.streams.shards import ShardReader
from annotated_mpnet.text.cutting import Ragged, cut_sequences
from annotated_mpnet.text.hold_out import text_hash
from annotated_mpnet.text.tokenization import Tokenise, pieces, windows_of
from annotated_mpnet.text.tokenizer import vocabulary_of

__all__ = ["SequenceStream", "StreamCounts", "StreamLoader", "StreamState"]

FEW_WITHOUT_TEXT = 1000
"""Up to this many rows without text are accepted, after that a tenth of all rows."""


class SequenceStream:
    """How a rank's sequences are made; the state is in a `SequenceCursor`.

    Attributes:
        fingerprint: names all that decides which sequences come, except tokenizer, length and seed.
            It is the "data" of a run's identity, in words, to show what differs.
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
            reader: of this rank's share.
            held_out: hashes of documents to skip.
        """
        # Sorted, because the order of a set differs between processes.
        left_out = hashlib.sha256(repr(sorted(held_out)).encode()).hexdigest()[:16]
        self.reader = reader
        self.fingerprint = (
            f"{reader.shards.fingerprint}, at least {data.min_text_length} characters, "
            f"{len(held_out)} held out ({left_out}), shuffled among {data.buffer_size} rows, "
            f"packing {data.packing}"
        )
        self.buffer_size = data.buffer_size
        self._data = data
        self._held_out = held_out
        self._tokenise = Tokenise(tokenizer)
        self._vocabulary = vocabulary_of(tokenizer)

    def begin(self, state: StreamState) -> "SequenceCursor":
        """Return a cursor at a state: `StreamState(rank, world_size)`, or a cursor's.

        Raises:
            CheckpointError: the state is another rank's, or of another number of ranks.
        """
        # A position counts one rank's shards. With another number of ranks it would be another
        # place: documents would come twice or not at all, without an error.
        mine, saved = (self.reader.rank, self.reader.world_size), (state.rank, state.world_size)
        if mine != saved:
            raise CheckpointError(
                f"the state of the stream is that of rank {saved[0]} of {saved[1]}, this is rank "
                f"{mine[0]} of {mine[1]}: a stream is split among the ranks. Resume with "
                f"{saved[1]} processes, or give --allow-change world-size to start the next epoch"
            )
        return SequenceCursor(self, state)

    def documents(self, values: list[object]) -> tuple[Ragged, StreamCounts]:
        """Return the tokens of each document in a column's values, without `<s>` and `</s>`.

        Each value is counted once, under the first reason to skip it.
        """
        texts = [value for value in values if isinstance(value, str)]
        with_text = [text for text in texts if text.strip()]
        long_enough = [text for text in with_text if len(text) >= self._data.min_text_length]
        wanted = [text for text in long_enough if text_hash(text) not in self._held_out]
        # Made as for text on disk (`text/tokenization.py`): long texts in pieces, which the number
        # of their text joins again.
        numbered = [(piece, n) for n, text in enumerate(wanted) for piece in pieces(text)]
        documents = Ragged.of([])
        if numbered:
            text, number = zip(*numbered, strict=True)
            tokens = self._tokenise(pa.table({"text": text, "document": number}))
            if len(tokens):
                documents = next(windows_of(tokens, at_least=2**62))
        return documents, StreamCounts(
            documents=len(documents),
            blank=len(texts) - len(with_text),
            not_text=len(values) - len(texts),
            too_short=len(with_text) - len(long_enough),
            held_out=len(long_enough) - len(wanted),
            unpredictable=len(wanted) - len(documents),
        )

    def pack(self, remainder: Ids, documents: Ragged) -> tuple[list[Ids], Ids]:
        """Return the sequences of `remainder` and the documents, and the new remainder."""
        data, vocabulary, packing = self._data, self._vocabulary, self._data.packing
        if packing == "full":
            # `cut_sequences` omits the `</s>` after the last document; a stream has no last one.
            separated = np.insert(documents.values, documents.ends_N, vocabulary.sep_id)
            tokens = np.concatenate([remainder, separated])
            content = data.max_tokens - 2
            full = len(tokens) // content * content
            # Cut like a single long document.
            documents, packing = Ragged(tokens[:full], np.array([full])), "none"
            remainder = tokens[full:].copy()
        if len(documents.values) == 0:
            return [], remainder
        (sequences,) = cut_sequences(
            [documents], packing, data.max_tokens, vocabulary.cls_id, vocabulary.sep_id
        )
        # Copies: a view in the reservoir would keep all its neighbours in memory.
        return [sequence.copy() for sequence in sequences], remainder


class SequenceCursor:
    """A place in a stream, which moves on by one sequence at a time."""

    def __init__(self, stream: SequenceStream, state: StreamState) -> None:
        self._stream = stream
        self._steps = stream.reader.read(state.position)
        # Two parts change in place, to save copying 10,000 references for each sequence.
        self._state = state
        self._pending = deque(state.pending)
        self._reservoir = list(state.reservoir)

    @property
    def state(self) -> StreamState:
        """Everything that the next sequences depend on."""
        return replace(self._state, pending=tuple(self._pending), reservoir=tuple(self._reservoir))

    def take(self) -> NumberedSequence:
        """Deliver the next sequence, with the number that its masks are a function of.

        Raises:
            DataError: the dataset cannot be read, or holds no text to train on.
        """
        # Only once: afterwards it neither empties nor grows.
        if not self._reservoir:
            self._fill()
        # The replacement first: if the stream breaks here, the state is still consistent.
        replacement = self._next_sequence()
        reader, n = self._stream.reader, self._state.delivered
        slot = draw_slot(reader.seed, reader.rank, n, len(self._reservoir))
        sequence, self._reservoir[slot] = self._reservoir[slot], replacement
        self._state = replace(self._state, delivered=n + 1)
        return NumberedSequence(sequence, epoch=0, index=n * reader.world_size + reader.rank)

    def close(self) -> None:
        """Close files and connections."""
        self._steps.close()

    def _fill(self) -> None:
        epoch = self._state.position.epoch
        while len(self._reservoir) < self._stream.buffer_size:
            if self._pending:
                self._reservoir.append(self._pending.popleft())
            # At least one: a dataset of less text than a sequence needs several epochs to fill it.
            elif self._reservoir and self._state.position.epoch > epoch:
                return
            else:
                self._read_on()

    def _next_sequence(self) -> Ids:
        while not self._pending:
            self._read_on()
        return self._pending.popleft()

    def _read_on(self) -> None:
        """Read and pack a few more texts: the only place where a stream moves.

        The state changes only after everything that can fail, so it can be saved after an error.
        """
        before, stream = self._state, self._stream
        values, position = next(self._steps)
        documents, met = stream.documents(values)
        counts = before.counts + met
        sequences, remainder = stream.pack(before.remainder, documents)
        self._pending.extend(sequences)
        self._state = replace(before, position=position, counts=counts, remainder=remainder)
        if counts.not_text > max(FEW_WITHOUT_TEXT, counts.rows_read / 10):
            raise DataError(
                f"{counts.not_text:,} of {counts.rows_read:,} rows of {stream.fingerprint} hold no "
                "text; expected strings: name another column with --text-field"
            )
        if position.epoch > before.position.epoch:
            if counts.documents == before.documents_before_epoch:
                reader = stream.reader
                share = f" for rank {reader.rank} of {reader.world_size}" * (reader.world_size > 1)
                raise DataError(
                    f"nothing to train on in the whole of {stream.fingerprint}{share}: {counts}; "
                    "choose other text, or lower --min-text-length or --eval-samples"
                )
            self._state = replace(self._state, documents_before_epoch=counts.documents)


@dataclass(frozen=True)
class StreamLoader:
    """The batches of a run over a stream; the counterpart of `loader.BatchLoader`."""

    stream: SequenceStream
    collator: DataCollatorForMaskedPermutedLanguageModeling
    batch_size: int

    def updates(
        self, first_update: int, micro_batches: int, state: StreamState | None = None
    ) -> Generator[tuple[list[Batch], StreamState]]:
        """Yield the micro-batches of each update, and the state of the stream after them.

        Updates are built ahead of training, so a checkpoint needs the state that came with the
        update: the cursor is already further.

        Args:
            state: after the update before the first one; None to begin the dataset.

        Raises:
            CheckpointError: the state is another rank's, or of another number of ranks.
            DataError: the dataset cannot be read, or holds no text to train on.
        """
        if state is None:
            reader = self.stream.reader
            # A run that changes its dataset continues counting, to get new masks.
            delivered = first_update * micro_batches * self.batch_size
            state = StreamState(reader.rank, reader.world_size, delivered=delivered)
        cursor = self.stream.begin(state)
        try:
            while True:
                batches = [
                    self.collator([cursor.take() for _ in range(self.batch_size)])
                    for _ in range(micro_batches)
                ]
                yield batches, cursor.state
        finally:
            cursor.close()
