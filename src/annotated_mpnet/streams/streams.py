"""A dataset that never ends: documents as they come, rows of tokens, and batches.

What `sources`, `packing` and `loader` do for text that lies on a disk, one after the other and each
to its end, a stream does all at once and a little at a time:

    shards ----> texts ----> documents ----> rows ----> reservoir ----> batches
           read        filter          pack        wait           mask
                       tokenise

Everything that has a past is in a `StreamState` (`streams/reservoir.py`). Take it between any two rows, end
the process, begin another one with it: the next row is the one that would have come.

Here is a stream of two documents, of five and two letters, in rows of seven tokens. Its reservoir
has a single slot, which shuffles nothing, so that one can see how rows are made:

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

**Rows.** With --packing full, as here, the tokens that do not fill a row wait for the next
document, across the ends of shards and of epochs: every row of a stream is full, and each document
comes once in each epoch. The second row begins with the `</s>` behind the first document, for which
there was no place in the first row; its "a" is the first token of the second epoch. At this moment
the state consists of little more than letters:

>>> state = cursor.state
>>> state.position.epoch, state.position.row, show(state.remainder)
(2, 2, 'g </s>')
>>> [show(row) for row in state.reservoir], state.pending, state.delivered
(['<s> c d e </s> f </s>'], (), 4)

It has read the third epoch, number 2, to its last document, and the row that it will deliver next
already lies in the reservoir. Two cursors that stand there deliver the same:

>>> show(cursor.take().input_ids) == show(stream.begin(state).take().input_ids)
True

With --packing none a document begins a row of its own, and goes on in further ones. With --packing
documents, whole documents share a row where they fit best, looked for among those that are read
together, 256 at most. On paragraphs of novels and rows of 512 that fills 98.5 % of the places; were
they looked for among 8192, it would be 99.7 % (`docs/log.md`). In neither mode do tokens wait.

**What is left out**, and counted (`StreamCounts`): rows without text, blank ones, texts shorter
than --min-text-length, documents that are held out, documents without a predictable token.

>>> documents, counts = stream.documents(["a b", None, " ", 7, "???", "c"])
>>> [show(each) for each in documents]
['a b', 'c']
>>> print(counts)
2 documents; dropped: 1 blank rows, 2 rows without text, 1 documents without a predictable token

Two things are errors. If more than 1000 rows, and more than a tenth of them, are without text, it
is the wrong column. If a rank reads a whole epoch without one document, it would read for ever.

**Small datasets.** The reservoir is filled before the first row is drawn: until it is full, or a
whole epoch is in it, whichever comes first. Then each row that is drawn is replaced by the next of
the stream, across the ends of epochs. So a dataset that fits into it is shuffled as a whole; and no
row is lost at the end of an epoch, it only may still lie there while the next epoch goes by.

**Masks** are a function of a row's number, which counts over the ranks: row n of rank r is number
n x world_size + r. Text on the disk has a row and an epoch for this (`training/loader.py`); in a stream a
row has no name by which it could be met again, so each is a new one, and the epoch is always 0.

**What it costs.** One core makes rows of a million tokens a second (`docs/log.md`), and a thread of
its own does it (`loader.prefetch`), so that the model does not wait for it.

Next: `streams/eval_samples.py`, which texts a stream must not deliver; `mpnet/loop.py`, which keeps
the state of each update.
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
"""So many rows without text are never too many; from then on a tenth of all rows is. A share alone
would refuse a dataset whose first row happens to be empty; a number alone, one that is long."""


class SequenceStream:
    """What a rank's rows are made of, and how; it has no state of its own.

    What changes from row to row is all in a `RowCursor`, of which there may be several over one
    stream. So nothing that was read by one run, or up to a failure, can leave a trace in the next.

    Attributes:
        fingerprint: names the rows, but for tokenizer, length and seed. It is the "data" of a run's
            identity: all that decides which rows come, in words, so that a refused resume can say
            what differs; of the held-out documents a hash, since there may be a million of them.
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
        vocabulary = vocabulary_of(tokenizer)
        # Sorted, because a set has no order of its own, and another one in each process.
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

        Args:
            state: `StreamState(rank, world_size)` to begin at the beginning, or a cursor's.

        Raises:
            CheckpointError: the state is another rank's, or of another number of ranks.
        """
        # A position counts the shards of one rank. Among those of rank 1 of 4 the place of rank 1
        # of 2 would be another one: no error would be raised, and some documents would come twice
        # in this epoch, others not at all.
        mine, saved = (self.reader.rank, self.reader.world_size), (state.rank, state.world_size)
        if mine != saved:
            raise CheckpointError(
                f"the state of the stream is that of rank {saved[0]} of {saved[1]}, this is rank "
                f"{mine[0]} of {mine[1]}: a stream is split among the ranks. Go on with "
                f"{saved[1]} processes; or, with --allow-change world-size, from the next epoch on"
            )
        return RowCursor(self, state)

    def documents(self, values: list[object]) -> tuple[Ragged, StreamCounts]:
        """Return the tokens of each document in a column's values.

        Args:
            values: as the dataset has them: strings, but also None, numbers, lists.

        Returns:
            The tokens, without `<s>` and `</s>`, and a count for each value, under the first of the
            reasons below for which it was left out.
        """
        data = self._data
        # In this order. A blank text is short as well, and a short one may be held out as well: by
        # the differences of the lengths each is counted once, and `rows_read` is their sum.
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
        """Return the rows that documents make, after what was left before, and what is left now.

        A pure function of the two: what is left is the caller's to keep.

        Args:
            remainder: tokens that no row has taken yet, fewer than a row has places for.
            documents: what was read next.
        """
        if self._data.packing != "full":
            return self._cut(documents, self._data.packing), remainder
        # A `</s>` behind every document. `row_cutting` leaves out the one behind the last document
        # of all; here there is no last one.
        separated = np.insert(documents.values, documents.ends_N, self._sep_id)
        tokens = np.concatenate([remainder, separated])
        content = self._data.max_tokens - 2
        full = len(tokens) // content * content
        # Cut like a single long document. The copy, because a slice would keep all tokens in
        # memory.
        return self._cut(Ragged(tokens[:full], np.array([full])), "none"), tokens[full:].copy()

    def _tokens_of(self, texts: list[str]) -> Ragged:
        """Return the tokens of each text that has any to predict; the same as for text on disk.

        The same functions make them (`text/tokenization.py`): long texts in pieces, nothing but text, and
        no document of unknown tokens alone. So a dataset can be streamed first and downloaded
        later, and is the same text.
        """
        # The number of its text stays with each piece, so that the pieces are joined again.
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
        # One window in, one out: what may share a row is what was read together, and nothing waits.
        special_ids = self._cls_id, self._sep_id
        (rows,) = cut_sequences([documents], packing, self._data.max_tokens, *special_ids)
        # Copies, or a row in the reservoir would keep all the rows that it was cut with.
        return [row.copy() for row in rows]

    @property
    def buffer_size(self) -> int:
        """Slots of the reservoir."""
        return self._data.buffer_size


class RowCursor:
    """A place in a stream, which moves on by one row at a time.

    `state` is that place, between any two calls of `take`. Reading is always a little ahead of it,
    by the slots of the reservoir and the rows that are pending; that is part of the state, so that
    a resume reads nothing twice.
    """

    def __init__(self, stream: SequenceStream, state: StreamState) -> None:
        self._stream = stream
        self._steps = stream.reader.read(state.position)
        # The two parts of the state that change with every row, as what can be changed in place:
        # 10,000 references would else be copied for each row that is drawn. `state` puts them
        # together again, once in an update.
        self._state = state
        self._pending = deque(state.pending)
        self._reservoir = list(state.reservoir)

    @property
    def state(self) -> StreamState:
        """All that the following rows depend on."""
        return replace(self._state, pending=tuple(self._pending), reservoir=tuple(self._reservoir))

    def take(self) -> NumberedSequence:
        """Deliver the next row.

        Returns:
            At most `max_tokens` tokens, and the number that its masks are a function of.

        Raises:
            DataError: the dataset cannot be read, or holds no text to train on.
        """
        # Once, before the first row of all: it never empties, and it never grows. A small dataset
        # keeps the slots that its first epoch has filled.
        if not self._reservoir:
            self._fill()
        reader, n = self._stream.reader, self._state.delivered
        # The replacement first: if the stream breaks here, the state is still one between two rows.
        following = self._next_row()
        slot = draw_slot(reader.seed, reader.rank, n, len(self._reservoir))
        row, self._reservoir[slot] = self._reservoir[slot], following
        self._state = replace(self._state, delivered=n + 1)
        return NumberedSequence(row, epoch=0, index=n * reader.world_size + reader.rank)

    def close(self) -> None:
        """Close what is read: files, and connections to a server."""
        self._steps.close()

    def _fill(self) -> None:
        """Fill the slots: all of them, or with what one epoch has, but at least one."""
        # Pending rows first: when the position is that of the next epoch, they are still rows of
        # this one.
        epoch = self._state.position.epoch
        while len(self._reservoir) < self._stream.buffer_size:
            if self._pending:
                self._reservoir.append(self._pending.popleft())
            # But at least one: a dataset may have less text than a row has places for, and then it
            # takes several epochs to fill the first.
            elif self._reservoir and self._state.position.epoch > epoch:
                return
            else:
                self._read_on()

    def _next_row(self) -> Ids:
        # Not `if`: what is read may be all left out, or too little for a row.
        while not self._pending:
            self._read_on()
        return self._pending.popleft()

    def _read_on(self) -> None:
        """Read a few texts more, and pack them.

        The only place where a stream moves. Position, counts, remainder and pending rows move
        together, and only after everything that can fail on the way to them: where the network
        breaks in `next`, the state is what it was, and can be saved.
        """
        before = self._state
        values, position = next(self._steps)
        documents, met = self._stream.documents(values)
        counts = before.counts + met
        rows, remainder = self._stream.pack(before.remainder, documents)
        self._pending.extend(rows)
        self._state = replace(before, position=position, counts=counts, remainder=remainder)
        # The end of an epoch comes as a step without values, with the position of the next one.
        self._refuse_other_columns(counts)
        if position.epoch > before.position.epoch:
            self._refuse_empty_epochs(counts.documents - before.documents_before_epoch)
            self._state = replace(self._state, documents_before_epoch=counts.documents)

    def _refuse_other_columns(self, counts: StreamCounts) -> None:
        # Both bounds: the larger of the two must be passed.
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

    It has the face of `loader.BatchLoader`, so that the loop need not know which of the two feeds
    it. There the number of an update says everything; here the state does, and comes along.

    Attributes:
        rows: the rank's rows.
        collator: makes a batch of rows.
        batch_size: B, of this rank's batches.
    """

    rows: SequenceStream
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

        Yields:
            Batches, and the state behind the last of them. Updates are made ahead of the training
            (`loader.prefetch`), so that the cursor itself is further than what was trained on: to
            save its present state would skip what waits between the two.

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
        # Whoever closes this generator, or drops it, is done with the shards too.
        finally:
            cursor.close()
