"""A dataset that never ends: documents as they come, sequences of tokens, and batches.

    shards ----> texts ----> documents ----> sequences ----> reservoir ----> batches
           read        filter          pack             wait           mask
                       tokenise

Everything that has a past is in a `StreamState` (`streams/reservoir.py`). Take it between any two
sequences, end the process, begin another one with it: the next sequence is the one that would have
come. A stream of two documents, of five and two letters, in sequences of seven tokens, with a
reservoir of one slot:

>>> from tokenizers import Tokenizer, models, pre_tokenizers
>>> class Letters:
...     fingerprint, num_shards = "letters", 1
...     def num_parts(self, shard):
...         return 1
...     def read(self, shard, part, first_row):
...         for text in ["a b c d e", "f g"][first_row:]:
...             yield [text]
>>> words = ["<s>", "<pad>", "</s>", "<unk>", *"abcdefg", "<mask>"]
>>> whole_words = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
>>> backend = Tokenizer(whole_words)
>>> backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
>>> tokenizer = PreTrainedTokenizerFast(
...     tokenizer_object=backend, cls_token="<s>", pad_token="<pad>", sep_token="</s>",
...     unk_token="<unk>", mask_token="<mask>")
>>> def show(tokens):
...     return " ".join(words[token] for token in tokens)
>>> data = DataConfig(max_tokens=7, buffer_size=1, min_text_length=0)
>>> stream = SequenceStream(ShardReader(Letters(), seed=1), tokenizer, data)
>>> cursor = stream.begin(StreamState())
>>> for _ in range(4):
...     print(show(cursor.take().input_ids))
<s> a b c d e </s>
<s> </s> f g </s> a </s>
<s> b c d e </s> </s>
<s> f g </s> a b </s>

With --packing full, as here, tokens that do not fill a sequence wait for the next document, across
the ends of shards and epochs. After these four, the state is:

>>> state = cursor.state
>>> state.position.epoch, state.position.row, show(state.remainder)
(2, 2, 'g </s>')
>>> [show(each) for each in state.reservoir], state.pending, state.delivered
(['<s> c d e </s> f </s>'], (), 4)
>>> show(cursor.take().input_ids) == show(stream.begin(state).take().input_ids)
True

With --packing none a document begins a sequence of its own. With --packing documents, documents
that are read together, 256 at most, share sequences; on paragraphs of novels that fills 98.5 % of
the places (`docs/log.md`).

**Dropped**, and counted (`StreamCounts`): rows without text, blank ones, texts shorter than
--min-text-length, held-out documents, documents without a predictable token.

>>> documents, counts = stream.documents(["a b", None, " ", 7, "???", "c"])
>>> [show(each) for each in documents]
['a b', 'c']
>>> print(counts)
2 documents; dropped: 1 blank rows, 2 rows without text, 1 documents without a predictable token

**Small datasets.** The reservoir is filled before the first draw: until it is full, or holds a
whole epoch. So a dataset that fits into it is shuffled as a whole, and nothing is lost between
epochs.

**Masks** are a function of a sequence's number: number n of rank r is n x world_size + r, and the
epoch is always 0, because in a stream no sequence comes twice.

One core packs a million tokens a second (`docs/log.md`), in a thread of its own.
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
from annotated_mpnet.mpnet.config import Packing
from annotated_mpnet.settings.config import DataConfig
from annotated_mpnet.streams.reservoir import StreamCounts, StreamState, draw_slot
from annotated_mpnet.streams.shards import ShardReader
from annotated_mpnet.text.cutting import Ragged, cut_sequences
from annotated_mpnet.text.hold_out import text_hash
from annotated_mpnet.text.tokenization import Tokenise, pieces, windows_of
from annotated_mpnet.text.tokenizer import vocabulary_of

__all__ = ["SequenceStream", "StreamCounts", "StreamLoader", "StreamState"]

FEW_WITHOUT_TEXT = 1000
"""This many rows without text are always allowed; beyond it, a tenth of all rows is."""


class SequenceStream:
    """What a rank's sequences are made of; all state is in a `SequenceCursor`.

    Attributes:
        fingerprint: everything that decides which sequences come, but tokenizer, length and seed,
        in
            words, so a refused resume can say what differs.
        reader: reads the rank's share of a dataset.
    """

    def __init__(
        self,
        reader: ShardReader,
        tokenizer: PreTrainedTokenizerFast,
        data: DataConfig,
        held_out: frozenset[int] = frozenset(),
    ) -> None:
        """Describe a stream; nothing is read yet. `held_out` are hashes of documents to drop."""
        vocabulary = vocabulary_of(tokenizer)
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

    def begin(self, state: StreamState) -> "SequenceCursor":
        """Return the sequences after a state; `StreamState(rank, world_size)` is the beginning.

        Raises:
            CheckpointError: the state is another rank's, or of another number of ranks.
        """
        # A position counts the shards of one rank, so it means another place with other ranks.
        mine, saved = (self.reader.rank, self.reader.world_size), (state.rank, state.world_size)
        if mine != saved:
            raise CheckpointError(
                f"the state of the stream is that of rank {saved[0]} of {saved[1]}, this is rank "
                f"{mine[0]} of {mine[1]}: a stream is split among the ranks. Resume with "
                f"{saved[1]} processes; or, from the next epoch, with --allow-change world-size"
            )
        return SequenceCursor(self, state)

    def documents(self, values: list[object]) -> tuple[Ragged, StreamCounts]:
        """Return the tokens of each document in a column's values, without `<s>` and `</s>`.

        Each dropped value is counted once, under the first reason that applies.
        """
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
        """Return the sequences that the remainder and the documents make, and the new remainder."""
        if self._data.packing != "full":
            return self._cut(documents, self._data.packing), remainder
        separated = np.insert(documents.values, documents.ends_N, self._sep_id)
        tokens = np.concatenate([remainder, separated])
        content = self._data.max_tokens - 2
        full = len(tokens) // content * content
        # Cut like a single long document. A copy, because a slice would keep all tokens in memory.
        return self._cut(Ragged(tokens[:full], np.array([full])), "none"), tokens[full:].copy()

    def _tokens_of(self, texts: list[str]) -> Ragged:
        """Return the tokens of each text that has any to predict (`text/tokenization.py`)."""
        numbered = [(piece, n) for n, text in enumerate(texts) for piece in pieces(text)]
        if not numbered:
            return Ragged.of([])
        tokens = self._tokenise(
            pa.table({"text": [each for each, _ in numbered], "document": [n for _, n in numbered]})
        )
        return next(windows_of(tokens, at_least=2**62)) if len(tokens) else Ragged.of([])

    def _cut(self, documents: Ragged, packing: Packing) -> list[Ids]:
        if len(documents.values) == 0:
            return []
        special_ids = self._cls_id, self._sep_id
        (rows,) = cut_sequences([documents], packing, self._data.max_tokens, *special_ids)
        # Copies, or one sequence in the reservoir would keep all of them.
        return [row.copy() for row in rows]

    @property
    def buffer_size(self) -> int:
        """Slots of the reservoir."""
        return self._data.buffer_size


class SequenceCursor:
    """A place in a stream, which moves by one sequence at a time; `state` is that place."""

    def __init__(self, stream: SequenceStream, state: StreamState) -> None:
        self._stream = stream
        self._steps = stream.reader.read(state.position)
        # These two change with every sequence, so they are mutable here; `state` copies them.
        self._state = state
        self._pending = deque(state.pending)
        self._reservoir = list(state.reservoir)

    @property
    def state(self) -> StreamState:
        """Everything that the following sequences depend on."""
        return replace(self._state, pending=tuple(self._pending), reservoir=tuple(self._reservoir))

    def take(self) -> NumberedSequence:
        """Deliver the next sequence, with the number that its masks are a function of.

        Raises:
            DataError: the dataset cannot be read, or holds no text to train on.
        """
        # Once: it never empties and never grows.
        if not self._reservoir:
            self._fill()
        reader, n = self._stream.reader, self._state.delivered
        # The replacement first: if the stream breaks here, the state is still valid.
        following = self._next_row()
        slot = draw_slot(reader.seed, reader.rank, n, len(self._reservoir))
        row, self._reservoir[slot] = self._reservoir[slot], following
        self._state = replace(self._state, delivered=n + 1)
        return NumberedSequence(row, epoch=0, index=n * reader.world_size + reader.rank)

    def close(self) -> None:
        """Close files and connections."""
        self._steps.close()

    def _fill(self) -> None:
        """Fill the slots: all of them, or with what one epoch has, but at least one."""
        # Pending sequences are still of this epoch.
        epoch = self._state.position.epoch
        while len(self._reservoir) < self._stream.buffer_size:
            if self._pending:
                self._reservoir.append(self._pending.popleft())
            # A tiny dataset may take several epochs to fill the first sequence.
            elif self._reservoir and self._state.position.epoch > epoch:
                return
            else:
                self._read_on()

    def _next_row(self) -> Ids:
        while not self._pending:
            self._read_on()
        return self._pending.popleft()

    def _read_on(self) -> None:
        """Read a few more texts and pack them.

        Position, counts, remainder and pending sequences change together, after everything that can
        fail: if the network breaks in `next`, the state can still be saved.
        """
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
    """The batches of a run over a stream, an update at a time, like `loader.BatchLoader`."""

    rows: SequenceStream
    collator: DataCollatorForMaskedPermutedLanguageModeling
    batch_size: int

    def updates(
        self, first_update: int, micro_batches: int, state: StreamState | None = None
    ) -> Generator[tuple[list[Batch], StreamState]]:
        """Yield the micro-batches of each update, and the state of the stream after them.

        Updates are made ahead of training (`loader.prefetch`), so the cursor's own state is too
        far.

        Args:
            first_update: the number of the first one.
            micro_batches: batches per update.
            state: after the previous update; None for the beginning of the dataset.

        Raises:
            CheckpointError: the state is another rank's, or of another number of ranks.
            DataError: the dataset cannot be read, or holds no text to train on.
        """
        if state is None:
            reader = self.rows.reader
            # Numbered from the beginning of the run, so masks differ from those of earlier updates.
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
