"""Which sequences make batch number k: a function of (data, seed, k), and of nothing else.

The run is one long list of sequences, epoch after epoch, each epoch in an order of its own:

    position p      0  1  2  3  4 | 5  6  7  8  9 | 10 ...        5 sequences
    epoch p // 5    0             | 1             | 2
    sequence        0  3  1  4  2 | 1  2  3  0  4 | ...           order(epoch)[p % 5]
    batch p // 2    0     1     2       3     4     5             batches of 2

>>> for epoch in range(2):
...     print(fold_in(12345, "order", epoch).permutation(5))
[0 3 1 4 2]
[1 2 3 0 4]

Batch 2 crosses the end of an epoch, so no sequence is skipped and no batch is smaller. To resume at
update 40,000 is to ask for its batches: nothing is read up to there, and no state is saved. The
order is a shuffle of the whole text, not of a buffer; the text is a memory-mapped table, so any
order costs the same.

**Sequences of different length** (`--packing none`) would mostly be padding. So similar ones are
brought together: the order is cut into windows of 4096, each window is sorted by length and cut
into chunks of 64, and the chunks are shuffled. In miniature, with windows of 8 and chunks of 2:

>>> lengths = np.array([3, 9, 4, 8, 3, 7, 9, 4, 5])
>>> order = group_by_length(np.arange(9), lengths, fold_in(12345, "group", 0), window=8, chunk=2)
>>> print(lengths[order])
[4 4 7 8 3 3 9 9 5]

With lengths as uneven as those of paragraphs, in batches of 32, the share of real tokens is

>>> lengths = fold_in(0, "lengths").exponential(80, size=8192).astype(np.int64) + 3
>>> def filled(order):
...     batches = lengths[order].reshape(-1, 32)
...     return round(float(batches.sum() / (32 * batches.max(axis=1).sum())), 2)
>>> shuffled = fold_in(12345, "order", 0).permutation(8192)
>>> filled(shuffled), filled(group_by_length(shuffled, lengths, fold_in(12345, "group", 0)))
(0.25, 0.96)

Sorting the whole epoch would fill a little more, but then the same sequences would share a batch in
every epoch.

**Ranks** take turns: micro-batch m of update u on rank r is batch number
(u x micro_batches + m) x world_size + r. So an update has the same sequences whether it is 8
batches of 8 in one process or 4 batches of 8 in each of two:

    update 5, one process, 4 micro-batches      20  21  22  23
    update 5, two processes, 2 micro-batches    20      22        rank 0
                                                    21      23    rank 1

A mixture of several texts (`text/mixture.py`) says whose turn it is at position p; then the same
holds for the turns of each text.

A stream cannot be asked for sequence p. Its loader is in `streams/streams.py`.
"""

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from annotated_mpnet.mpnet.batch import NOT_PREDICTED, Batch
from annotated_mpnet.mpnet.collator import (
    DataCollatorForMaskedPermutedLanguageModeling,
    NumberedSequence,
)
from annotated_mpnet.mpnet.randomness import fold_in
from annotated_mpnet.streams.reservoir import StreamState
from annotated_mpnet.text.mixture import Mixture, turn_at
from annotated_mpnet.text.sequences import PackedSequences

CHUNK = 64
"""Sequences of similar length that stay together."""

T = TypeVar("T")
Ints = npt.NDArray[np.int64]

Update = tuple[list[Batch], StreamState | None]
"""The micro-batches of an update, and the state of the stream after them."""


class UpdateSource(Protocol):
    """What a run trains on: a `BatchLoader`, or a `StreamLoader`."""

    def updates(
        self, first_update: int, micro_batches: int, state: StreamState | None = None
    ) -> Generator[Update]:
        """Yield this rank's micro-batches of each update from `first_update` on, without end.

        A whole update at a time, because each loss is divided by the predicted tokens of all its
        batches.

        Args:
            first_update: its number.
            micro_batches: batches in an update.
            state: of the stream before that update; None at the beginning, and for text on disk.
        """
        ...


@dataclass
class BatchLoader:
    """The batches of a run by number, in any order and from any thread.

    Attributes:
        sequences: the training text, at least one sequence.
        collator: makes a batch.
        batch_size: B of this rank's batches. It may exceed the number of sequences: a batch then
            has some of them twice, from two epochs and with different masks.
        seed: of the run.
        rank: this process, from 0.
        world_size: processes that train together.
    """

    sequences: PackedSequences
    collator: DataCollatorForMaskedPermutedLanguageModeling
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        """Remember the last two orders; a batch never needs more unless it is very large."""
        self._parts = [self.sequences]
        if isinstance(self.sequences, Mixture):
            self._parts = self.sequences.parts
        self._order = lru_cache(maxsize=2 * len(self._parts))(self._draw_order)

    def updates(
        self, first_update: int, micro_batches: int, state: StreamState | None = None
    ) -> Generator[tuple[list[Batch], None]]:
        """Yield this rank's micro-batches of each update; there is no state."""
        for update in count(first_update):
            numbers = range(update * micro_batches, (update + 1) * micro_batches)
            yield [self.batch(n * self.world_size + self.rank) for n in numbers], None

    def batch(self, k: int) -> Batch:
        """Return batch number k, from 0, without an upper end."""
        return self.collator(self.sequences_of(k))

    def sequences_of(self, k: int) -> list[NumberedSequence]:
        """Return the B sequences of batch k before they are masked.

        Their masks depend on epoch and index, so they are the same for any batch size.
        """
        first = k * self.batch_size
        places = [self._place(p) for p in range(first, first + self.batch_size)]
        indices = np.array([index for _, index in places], dtype=np.int64)
        return _numbered(self.sequences, indices, [epoch for epoch, _ in places])

    def _place(self, p: int) -> tuple[int, int]:
        """Return the epoch and the index of the sequence at a position of the run."""
        if not isinstance(self.sequences, Mixture):
            epoch, place = divmod(p, len(self.sequences))
            return epoch, int(self._order(0, epoch)[place])
        # Sequences of similar length have their turns together.
        together = CHUNK if self.collator.packing == "none" else 1
        turn, rest = divmod(p, together)
        part, turn = turn_at(turn, self.sequences.turns, self.seed)
        epoch, place = divmod(turn * together + rest, len(self._parts[part]))
        return epoch, self.sequences.first[part] + int(self._order(part, epoch)[place])

    def _draw_order(self, part: int, epoch: int) -> Ints:
        text = self._parts[part]
        # The first text, or the only one, has the order that it has alone.
        which = (epoch, part) if part else (epoch,)
        order = fold_in(self.seed, "order", *which).permutation(len(text))
        if self.collator.packing != "none":
            return order
        return group_by_length(order, text.lengths(), fold_in(self.seed, "group", *which))


def group_by_length(
    order: Ints,
    lengths: Ints,
    generator: np.random.Generator,
    window: int = 4096,
    chunk: int = CHUNK,
) -> Ints:
    """Return the order with sequences of similar length next to each other.

    Args:
        order: all sequences, in random order.
        lengths: of each sequence, by its index.
        generator: shuffles the chunks.
        window: sequences that are sorted together, a multiple of `chunk`.
        chunk: sequences that stay together. The rest, less than a chunk, stays at the end.
    """
    # One sort for all windows: by window first (the last key of `lexsort`), then by length.
    windows = np.arange(len(order)) // window
    by_length = order[np.lexsort((lengths[order], windows))]
    whole = len(order) // chunk * chunk
    chunks = by_length[:whole].reshape(-1, chunk)
    return np.concatenate([generator.permutation(chunks).reshape(-1), by_length[whole:]])


def evaluation_batches(
    sequences: PackedSequences,
    collator: DataCollatorForMaskedPermutedLanguageModeling,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Yield this rank's share of the sequences; together the ranks read each of them once.

    The masks are the same each time and differ from those of training, even if the training's
    collator is given. A rank that has nothing left in the last turn repeats the last batch without
    predictions, because all ranks must run a sharded network equally often:

        rank 0    0  2  4
        rank 1    1  3 (4)
    """
    collator = collator.for_evaluation()
    order = np.arange(len(sequences))
    if collator.packing == "none":
        order = np.argsort(sequences.lengths(), kind="stable")
    for turn in range(0, len(order), batch_size * world_size):
        start, last = turn + batch_size * rank, (len(order) - 1) // batch_size * batch_size
        indices = order[min(start, last) :][:batch_size]
        batch = collator(_numbered(sequences, indices, [0] * len(indices)))
        if start > last:
            nothing_BP = torch.full_like(batch.predicted_ids, NOT_PREDICTED)
            batch = replace(batch, predicted_ids=nothing_BP, num_tokens=0, num_predicted=0)
        yield batch


def _numbered(
    sequences: PackedSequences, indices: Ints, epochs: list[int]
) -> list[NumberedSequence]:
    numbered = zip(sequences.take(indices), epochs, indices.tolist(), strict=True)
    return [NumberedSequence(*each) for each in numbered]


def pinned(updates: Generator[Update], device: torch.device) -> Generator[Update]:
    """Yield updates in pinned memory, from which a GPU copies in the background (`Batch.to`)."""
    with closing(updates):
        for batches, state in updates:
            # A new thread uses the machine's first GPU, and would take memory there for each rank.
            with torch.cuda.device(device):
                ready = [batch.pinned() for batch in batches]
            yield ready, state


def prefetch(batches: Iterator[T], depth: int) -> Generator[T]:
    """Yield the items of an iterator, computed in a thread, up to `depth` of them ahead.

    One thread keeps up, because the model's time is spent outside Python. An exception of the
    iterator is raised here, in its place in the order. Closing this generator ends the thread and
    closes the iterator.
    """
    end = object()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as worker:
        ahead = deque(worker.submit(next, batches, end) for _ in range(depth))
        try:
            while (item := ahead.popleft().result()) is not end:
                ahead.append(worker.submit(next, batches, end))
                yield item  # type: ignore[misc]
        finally:
            # Otherwise closing would wait until `depth` more items are computed.
            worker.shutdown(cancel_futures=True)
            if isinstance(batches, Generator):
                batches.close()
