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

Evaluation reads each row once, in natural order, always with the masks of epoch 0: two evaluations
of a run differ by the model alone.

Next: `training/trainer.py`, which asks for the batches.
"""

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from annotated_mpnet.batch import Batch
from annotated_mpnet.data.collator import DataCollatorForMaskedPermutedLanguageModeling, Row
from annotated_mpnet.data.rows import PackedRows
from annotated_mpnet.randomness import fold_in

T = TypeVar("T")


class BatchLoader:
    """The batches of a run, by number."""

    def __init__(
        self,
        rows: PackedRows,
        collator: DataCollatorForMaskedPermutedLanguageModeling,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
    ) -> None:
        """Describe a run; nothing is read yet.

        Args:
            rows: the training rows, at least one.
            collator: makes a batch of rows.
            batch_size: B. It may be larger than the number of rows.
            seed: the run's.
            shuffle: a new order in each epoch; otherwise the natural one in all of them.
        """
        self.rows = rows
        self.collator = collator
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        # A batch needs the orders of two epochs at most, of two consecutive ones.
        self._order = lru_cache(maxsize=2)(self._draw_order)

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
        if self.shuffle:
            return fold_in(self.seed, "order", epoch).permutation(len(self.rows))
        return np.arange(len(self.rows))


def evaluation_batches(
    rows: PackedRows, collator: DataCollatorForMaskedPermutedLanguageModeling, batch_size: int
) -> Iterator[Batch]:
    """Yield each row once, in natural order; the last batch may be smaller.

    The masks are the same each time, and none of those of training, although the collator of the
    training may be given.
    """
    evaluation = collator.for_evaluation()
    for first in range(0, len(rows), batch_size):
        indices = np.arange(first, min(first + batch_size, len(rows)))
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
