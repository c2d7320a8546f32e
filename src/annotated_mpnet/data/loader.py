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
(`rows.py`), so that this costs nothing.

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

**Ranks.** With several processes a batch number counts over all of them: micro-batch m of update u
on rank r is batch (u x micro_batches + m) x world_size + r. So an update of 64 rows consists of the
same 64 rows, as 8 batches of 8 in one process, as 16 of 4, or as 4 of 8 in each of two processes.

Evaluation reads each row once, in natural order (those of different length: from the shortest to
the longest), always with the masks of epoch 0: two evaluations of a run differ by the model alone.

A dataset that comes as a stream cannot be asked for row p. `streams.py` has a loader for it with
the same face, `UpdateSource`.

Next: `training/trainer.py`, which asks for the batches.
"""

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import count
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from annotated_mpnet.batch import Batch
from annotated_mpnet.data.collator import DataCollatorForMaskedPermutedLanguageModeling, Row
from annotated_mpnet.data.reservoir import StreamState
from annotated_mpnet.data.rows import PackedRows
from annotated_mpnet.randomness import fold_in

T = TypeVar("T")


WINDOW = 4096
"""Rows among which those of similar length are looked for."""

CHUNK = 64
"""Rows of similar length that stay together."""


class UpdateSource(Protocol):
    """What a run is fed by."""

    def updates(
        self, first_update: int, micro_batches: int, state: StreamState | None = None
    ) -> Generator[tuple[list[Batch], StreamState | None]]:
        """Yield this rank's micro-batches of each update, without end, and the state behind them.

        Args:
            first_update: the number of the first one.
            micro_batches: batches in an update.
            state: behind the update before it, if the text has a past; None at its beginning.
        """
        ...


class BatchLoader:
    """The batches of a run, by number."""

    def __init__(
        self,
        rows: PackedRows,
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
            batch_size: B. It may be larger than the number of rows.
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
        # A batch needs the orders of two epochs at most, of two consecutive ones.
        self._order = lru_cache(maxsize=2)(self._draw_order)

    def updates(
        self, first_update: int, micro_batches: int, state: StreamState | None = None
    ) -> Generator[tuple[list[Batch], None]]:
        """Yield this rank's micro-batches of each update from `first_update` on, without end.

        There is no state: the number of the update says it all.
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

    def rows_of(self, k: int) -> list[Row]:
        """Return the B rows of batch k before they are masked."""
        first = k * self.batch_size
        places = [divmod(p, len(self.rows)) for p in range(first, first + self.batch_size)]
        indices = np.array([self._order(epoch)[place] for epoch, place in places])
        return [
            Row(input_ids, epoch, int(index))
            for input_ids, (epoch, _), index in zip(
                self.rows.take(indices), places, indices, strict=True
            )
        ]

    def _draw_order(self, epoch: int) -> npt.NDArray[np.int64]:
        if not self.shuffle:
            return np.arange(len(self.rows))
        order = fold_in(self.seed, "order", epoch).permutation(len(self.rows))
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
    """
    windows = np.arange(len(order)) // window
    by_length = order[np.lexsort((lengths[order], windows))]
    whole = len(order) // chunk * chunk
    chunks = by_length[:whole].reshape(-1, chunk)
    return np.concatenate([generator.permutation(chunks).reshape(-1), by_length[whole:]])


def evaluation_batches(
    rows: PackedRows, collator: DataCollatorForMaskedPermutedLanguageModeling, batch_size: int
) -> Iterator[Batch]:
    """Yield each row once, in natural order or by length; the last batch may be smaller.

    The masks are the same each time, and none of those of training, although the collator of the
    training may be given.
    """
    evaluation = collator.for_evaluation()
    order = np.arange(len(rows))
    if collator.packing == "none":
        order = np.argsort(rows.lengths(), kind="stable")
    for first in range(0, len(rows), batch_size):
        indices = order[first : first + batch_size]
        yield evaluation(
            [
                Row(input_ids, epoch=0, index=int(index))
                for input_ids, index in zip(rows.take(indices), indices, strict=True)
            ]
        )


def prefetch(batches: Iterator[T], depth: int) -> Generator[T]:
    """Yield what an iterator yields, made in a thread, up to `depth` (at least 1) items ahead.

    One thread is enough to keep the next batch ready while the model works, because the model's
    time is spent outside of Python. What the iterator raises is raised here, in its place in the
    sequence. Close the generator (or exhaust it) and the thread is gone.
    """
    end = object()

    def following() -> T | object:
        return next(batches, end)

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as worker:
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
