"""Which rows make batch number k: a function of (data, seed, k), and of nothing else.

A loader usually is a process: it shuffles, hands out, remembers where it is, and a run that is
interrupted needs to bring it back to that state, workers and all. This one is a function. The run
is one long sequence of rows, epoch after epoch, each in an order of its own:

    position p      0  1  2  3  4 | 5  6  7  8  9 | 10 ...        5 rows
    epoch p // 5    0             | 1             | 2
    row             0  3  1  4  2 | 1  2  3  0  4 | ...           order(epoch)[p % 5]
    batch p // 2    0     1     2       3     4     5             batches of 2

>>> for epoch in range(2):
...     print(fold_in(12345, "order", epoch).permutation(5))
[0 3 1 4 2]
[1 2 3 0 4]

Batch k is the rows at the positions 2k and 2k+1. Batch 2 runs across the end of an epoch, so that
no row is left out and no batch is smaller. To resume at update 40,000 is to ask for its batches;
nothing has to be read up to there, and no state is saved.

The order of an epoch is a permutation of *all* rows, drawn by `fold_in(seed, "order", epoch)`: a
shuffle over the whole text, not one within a buffer. The rows lie in a memory-mapped table
(`text/sequences.py`), so that this costs nothing.

**Rows of different length** (--packing none) would mostly be padding if a batch took them as they
come. So neighbours in the order are made similar: the permutation is cut into windows of 4096 rows,
each window is sorted by length and cut into chunks of 64, and the chunks of the whole epoch are
shuffled once more. The rows of a batch then come from one chunk or a few. Windows and chunks have
nothing to do with the size of a batch, and the order stays a function of (data, seed, epoch). In
miniature, windows of 8 rows and chunks of 2; the last chunk keeps its place, since it may be
shorter than the others:

>>> lengths = np.array([3, 9, 4, 8, 3, 7, 9, 4, 5])
>>> order = group_by_length(np.arange(9), lengths, fold_in(12345, "group", 0), window=8, chunk=2)
>>> print(lengths[order])
[4 4 7 8 3 3 9 9 5]

What it is worth: of lengths that are as uneven as those of paragraphs, in batches of 32, the share
of the places that hold a token is

>>> lengths = fold_in(0, "lengths").exponential(80, size=8192).astype(np.int64) + 3
>>> def filled(order):
...     batches = lengths[order].reshape(-1, 32)
...     return round(float(batches.sum() / (32 * batches.max(axis=1).sum())), 2)
>>> shuffled = fold_in(12345, "order", 0).permutation(8192)
>>> generator = fold_in(12345, "group", 0)
>>> filled(shuffled), filled(group_by_length(shuffled, lengths, generator, WINDOW, CHUNK))
(0.25, 0.96)

Were the whole epoch sorted, it would be a little more; but then each batch would have the same
neighbours in all epochs, where so they are drawn anew.

**Ranks.** With several processes a batch number counts over all of them: micro-batch m of update u
on rank r is batch (u x micro_batches + m) x world_size + r. So an update of 64 rows consists of the
same 64 rows, as 8 batches of 8 in one process, as 16 of 4, or as 4 of 8 in each of two processes.
Update 5, of four batches, in one process and in two:

>>> [(5 * 4 + m) * 1 + 0 for m in range(4)]
[20, 21, 22, 23]
>>> [[(5 * 2 + m) * 2 + rank for m in range(2)] for rank in range(2)]
[[20, 22], [21, 23]]

**Evaluation** reads each row once, in natural order (those of different length: from the shortest
to the longest), always with the masks of epoch 0: two evaluations of a run differ by the model
alone. The ranks take turns at its batches. Those that come away empty-handed at the end get one
without anything to predict, so that all ranks run the network equally often, as a sharded one
needs. Five batches on two ranks, the last one of rank 1 being number 4 once more, without targets:

    rank 0    0  2  4
    rank 1    1  3 (4)

A dataset that comes as a stream cannot be asked for row p. `streams/streams.py` has a loader for it with
the same face, `UpdateSource`.

Next: `mpnet/loop.py`, which asks for the batches.
"""

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
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
from annotated_mpnet.text.sequences import PackedSequences

T = TypeVar("T")


WINDOW = 4096
"""Rows among which those of similar length are looked for. More would save little padding (0.96 of
the places are filled already), and leave less to chance."""

CHUNK = 64
"""Rows of similar length that stay together. A batch of up to as many rows finds them in one chunk,
or in two; where the next one starts, the lengths jump."""


Update = tuple[list[Batch], StreamState | None]
"""The micro-batches of an update, and the state of the stream behind them."""


class UpdateSource(Protocol):
    """What a run is fed by: `BatchLoader` here, or `streams.StreamLoader`.

    Two loaders, and one question. A whole update at a time, because the loss of each of its batches
    is divided by the predicted tokens of all of them (`mpnet/loop.py`).
    """

    def updates(
        self, first_update: int, micro_batches: int, state: StreamState | None = None
    ) -> Generator[Update]:
        """Yield this rank's micro-batches of each update, without end, and the state behind them.

        Args:
            first_update: the number of the first one.
            micro_batches: batches in an update.
            state: behind the update before it, if the text has a past; None at its beginning.
        """
        ...


class BatchLoader:
    """The batches of a run, by number.

    It has no state but the orders that it remembers, which could be drawn again. Any batch may be
    asked for at any time, twice, or by two threads.
    """

    def __init__(
        self,
        rows: PackedSequences,
        collator: DataCollatorForMaskedPermutedLanguageModeling,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Describe a run; nothing is read yet.

        Args:
            rows: the training rows, at least one.
            collator: makes a batch of rows.
            batch_size: B, of this rank's batches. It may be larger than the number of rows: a batch
                then holds some of them twice, from two epochs, and with two different masks.
            seed: the run's.
            shuffle: a new order in each epoch; otherwise the natural one in all of them.
            rank: this process, from 0.
            world_size: processes that train together.
        """
        self.rows = rows
        self.collator = collator
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        # A batch needs the orders of two consecutive epochs, seldom of more. To draw one takes time
        # in proportion to the rows, and eight bytes for each: done once in an epoch it is nothing,
        # done for each batch it would be more than the batch.
        self._order = lru_cache(maxsize=2)(self._draw_order)

    def updates(
        self, first_update: int, micro_batches: int, state: StreamState | None = None
    ) -> Generator[tuple[list[Batch], None]]:
        """Yield this rank's micro-batches of each update from `first_update` on, without end.

        There is no state: the number of the update says it all.

        Args:
            first_update: the number of the first one; after a resume, the updates done so far.
            micro_batches: batches in an update, on this rank.
            state: is not looked at; there for the other loader.
        """
        for update in count(first_update):
            first = update * micro_batches
            yield (
                [
                    self.batch((first + m) * self.world_size + self.rank)
                    for m in range(micro_batches)
                ],
                None,
            )

    def batch(self, k: int) -> Batch:
        """Return batch number k, from 0, without an upper end."""
        return self.collator(self.rows_of(k))

    def rows_of(self, k: int) -> list[NumberedSequence]:
        """Return the B rows of batch k before they are masked.

        Each with its epoch and its index in the text: of these two its masks are a function, not of
        the batch that it happens to be in. So the same row has the same masks at any batch size.
        """
        # Position p is row number `place` in the order of `epoch`; within a batch that runs across
        # the end of an epoch, the epoch changes from one row to the next.
        first = k * self.batch_size
        places = [divmod(p, len(self.rows)) for p in range(first, first + self.batch_size)]
        indices = np.array([self._order(epoch)[place] for epoch, place in places])
        return [
            NumberedSequence(input_ids, epoch, int(index))
            for input_ids, (epoch, _), index in zip(
                self.rows.take(indices), places, indices, strict=True
            )
        ]

    def _draw_order(self, epoch: int) -> npt.NDArray[np.int64]:
        if not self.shuffle:
            return np.arange(len(self.rows))
        order = fold_in(self.seed, "order", epoch).permutation(len(self.rows))
        # Where rows are packed there is nothing to group: they are full, or nearly.
        if self.collator.packing == "none":
            grouping = fold_in(self.seed, "group", epoch)
            return group_by_length(order, self.rows.lengths(), grouping, WINDOW, CHUNK)
        return order


def group_by_length(
    order: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    generator: np.random.Generator,
    window: int,
    chunk: int,
) -> npt.NDArray[np.int64]:
    """Return the order with rows of similar length next to each other.

    Args:
        order: all rows, in random order.
        lengths: of each row, by its index.
        generator: shuffles the chunks.
        window: rows that are sorted by length together; a multiple of `chunk`.
        chunk: rows that stay together.

    Returns:
        The same rows in the new order. Within a chunk they stand from the shortest to the longest,
        which no batch minds: its rows are added up.
    """
    # One sort for all windows: first by window, within each by length. (The last key of `lexsort`
    # is the first to be compared.)
    windows = np.arange(len(order)) // window
    by_length = order[np.lexsort((lengths[order], windows))]
    # The chunks as the rows of a matrix, which `permutation` shuffles as wholes. What is left over
    # does not make one, and stays at the end.
    whole = len(order) // chunk * chunk
    chunks = by_length[:whole].reshape(-1, chunk)
    return np.concatenate([generator.permutation(chunks).reshape(-1), by_length[whole:]])


def evaluation_batches(
    rows: PackedSequences,
    collator: DataCollatorForMaskedPermutedLanguageModeling,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Yield this rank's share of the rows, which all ranks together read once each.

    In natural order or by length; the last batch may be smaller. The masks are the same each time,
    and none of those of training, although the collator of the training may be given.

    Args:
        rows: validation or test text, the same on all ranks.
        collator: that of the training will do.
        batch_size: B. The loss does not depend on it, nor on the number of ranks: it is a mean over
            tokens, and each row has its masks by its own index.
        rank: this process, from 0.
        world_size: processes that evaluate together.
    """
    evaluation = collator.for_evaluation()
    # No chance is needed here, since nothing is learned from the order: sorted as a whole, the rows
    # have the least padding that there can be.
    order = np.arange(len(rows))
    if collator.packing == "none":
        order = np.argsort(rows.lengths(), kind="stable")
    for turn in range(0, len(rows), batch_size * world_size):
        # Behind the end there is nothing left for this rank; the last batch of all stands in.
        mine = min(turn + batch_size * rank, (len(rows) - 1) // batch_size * batch_size)
        indices = order[mine : mine + batch_size]
        batch = evaluation(
            [
                NumberedSequence(input_ids, epoch=0, index=int(index))
                for input_ids, index in zip(rows.take(indices), indices, strict=True)
            ]
        )
        yield batch if mine == turn + batch_size * rank else _without_predictions(batch)


def _without_predictions(batch: Batch) -> Batch:
    """Return a batch of the same shape which counts as nothing, in the loss and in the metrics.

    >>> ids_BP = torch.tensor([[12, 13]])
    >>> batch = Batch(torch.tensor([[0, 19, 19, 2]]), torch.tensor([[2, 1]]), ids_BP, None, 4, 2)
    >>> empty = _without_predictions(batch)
    >>> empty.predicted_ids, empty.num_tokens, empty.num_predicted
    (tensor([[-100, -100]]), 0, 0)
    """
    nothing_BP = torch.full_like(batch.predicted_ids, NOT_PREDICTED)
    return replace(batch, predicted_ids=nothing_BP, num_tokens=0, num_predicted=0)


def pinned(updates: Generator[Update], device: torch.device) -> Generator[Update]:
    """Yield updates whose batches lie in pinned memory, from which a GPU fetches them by itself.

    Asked by the thread of `prefetch`, it copies them there beside the loop; the way to the GPU is
    then its own business (`Batch.to`), and the loop waits for neither.

    Args:
        updates: is closed with this.
        device: the GPU.
    """
    with closing(updates):
        for batches, state in updates:
            # A thread begins with the first GPU of the machine, whichever one the process uses, and
            # would take memory of it, once for each rank.
            with torch.cuda.device(device):
                ready = [batch.pinned() for batch in batches]
            yield ready, state


def prefetch(batches: Iterator[T], depth: int) -> Generator[T]:
    """Yield what an iterator yields, made in a thread, up to `depth` (at least 1) items ahead.

    One thread is enough to keep the next batch ready while the model works, because the model's
    time is spent outside of Python. What the iterator raises is raised here, in its place in the
    sequence. Close the generator (or exhaust it) and the thread is gone.

    >>> from annotated_mpnet.errors import DataError
    >>> def two_batches():
    ...     yield from "ab"
    ...     raise DataError("the text broke off")
    >>> try:
    ...     for batch in prefetch(two_batches(), depth=8):
    ...         print(batch)
    ... except DataError as error:
    ...     print(error)
    a
    b
    the text broke off

    A thread and not a process: a process would have to send its batches through a pipe, and could
    be killed by itself. To collate a row takes less than a tenth of a millisecond (`docs/log.md`).

    Args:
        batches: is asked by one thread at a time, in order.
        depth: items that wait at most; each is an update's batches in memory.
    """
    # `None` might be an item; this object is nobody else's. An exception would not do as the end:
    # Python makes a RuntimeError of a StopIteration that comes up inside a generator.
    end = object()

    def following() -> T | object:
        return next(batches, end)

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as worker:
        # One worker, so that the items are asked for in order and never two at once.
        ahead = deque(worker.submit(following) for _ in range(depth))
        try:
            while (item := ahead.popleft().result()) is not end:
                ahead.append(worker.submit(following))
                yield item  # type: ignore[misc]
        finally:
            # Without it, closing would wait for the whole depth to be made and thrown away.
            worker.shutdown(cancel_futures=True)
            # A generator may hold files open; nobody else knows that it is not needed any more.
            if isinstance(batches, Generator):
                batches.close()
