"""The place in a stream, as four numbers, and how reading continues from there.

A stream cannot jump to row 40 million. But the place where reading continues is only an epoch, a
shard, a part of it and a row of that (drawn in `streams/hub.py`), and the order of the shards is
a function of seed and epoch. So a `Position` is four integers. Here is a stream of two shards with
two parts each, read to its end, then again from a position in the middle:

>>> class Letters:
...     fingerprint, num_shards = "letters", 2
...     def num_parts(self, shard):
...         return 2
...     def read(self, shard, part, first_row):
...         for letter in [["ab", "c"], ["d", "ef"]][shard][part][first_row:]:
...             yield [letter]
>>> from itertools import islice
>>> reader = ShardReader(Letters(), seed=12345)
>>> for values, position in islice(reader.read(Position()), 7):
...     print(values, position)
['d'] Position(epoch=0, shard=0, part=0, row=1)
['e'] Position(epoch=0, shard=0, part=1, row=1)
['f'] Position(epoch=0, shard=0, part=1, row=2)
['a'] Position(epoch=0, shard=1, part=0, row=1)
['b'] Position(epoch=0, shard=1, part=0, row=2)
['c'] Position(epoch=0, shard=1, part=1, row=1)
[] Position(epoch=1, shard=0, part=0, row=0)
>>> middle = Position(epoch=0, shard=1, part=0, row=1)
>>> [values for values, _ in islice(reader.read(middle), 3)]
[['b'], ['c'], []]

`shard` counts in this epoch's order: the first shard read here is number 1 of the dataset.

**Ranks.** With enough shards, each rank reads every world_size-th of the order. Enough means that
the ranks divide them evenly, or at least 16 for each rank. Otherwise all ranks read all shards and
keep every world_size-th row (`reads_rows`), so each rank downloads everything.

**A broken connection** loses no row: reading starts again from the position, after 1 second, then
2, 4, ... 60. After `MOST_FAILURES` failures without a row in between, the run stops. Only network
errors are retried: a damaged file is still damaged the next time.
"""

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Annotated, Protocol

import msgspec

from annotated_mpnet.errors import DataError, UserError, shown
from annotated_mpnet.mpnet.randomness import fold_in

MOST_FAILURES = 8
"""Failures in a row before the run gives up: three minutes of waiting, besides the retries that
the libraries below make."""

LONGEST_PAUSE = 60.0
"""Seconds between two attempts, at most."""

ENOUGH_SHARDS = 16
"""With this many shards for each rank, one more or less makes no difference."""

NETWORK_LIBRARIES = ("aiohttp", "fsspec", "httpcore", "httpx", "httpx2", "requests", "urllib3")
"""Top-level packages whose exceptions mean the network."""

Count = Annotated[int, msgspec.Meta(ge=0)]


class Shards(Protocol):
    """What a stream is read from: `hub.DatasetStream`. It keeps no position of its own."""

    fingerprint: str
    num_shards: int

    def num_parts(self, shard: int) -> int:
        """Return how many parts of a shard can be opened on their own."""
        ...

    def read(self, shard: int, part: int, first_row: int) -> Iterator[list[object]]:
        """Yield the values of a part, some at a time, from a row on."""
        ...


@dataclass(frozen=True, slots=True)
class Position:
    """Where reading continues: counts of what has been read to its end.

    `shard` counts within the epoch, `part` within the shard, `row` within the part.
    """

    epoch: Count = 0
    shard: Count = 0
    part: Count = 0
    row: Count = 0


@dataclass(frozen=True)
class ShardReader:
    """Reads one rank's share of a stream, epoch after epoch, from any position."""

    shards: Shards
    seed: int
    rank: int = 0
    world_size: int = 1
    sleep: Callable[[float], None] = time.sleep

    def read(self, position: Position) -> Generator[tuple[list[object], Position]]:
        """Yield values and the position after them, without end.

        At the end of an epoch the values are empty and the position is the start of the next one.

        Raises:
            DataError: a shard cannot be read, or the network stays down.
        """
        failures = 0
        while True:
            try:
                with closing(self._read(position)) as steps:
                    for values, position in steps:
                        failures = 0
                        yield values, position
            except Exception as error:
                if not is_network_error(error):
                    raise
                failures += 1
                if failures > MOST_FAILURES:
                    raise DataError(
                        f"the network failed {failures} times in a row while reading "
                        f"{self.shards.fingerprint}, the last time with {type(error).__name__}: "
                        f"{shown(str(error))}; continue with --resume when it is back"
                    ) from error
                self.sleep(min(LONGEST_PAUSE, 2.0 ** (failures - 1)))

    def _read(self, position: Position) -> Generator[tuple[list[object], Position]]:
        # Only the first shard is entered in its middle: after it, part and row are 0.
        num_shards, world_size = self.shards.num_shards, self.world_size
        while True:
            order = rank_order(self.seed, position.epoch, num_shards, self.rank, world_size)
            for shard in order[position.shard :]:
                yield from self._read_shard(shard, position)
                position = Position(position.epoch, position.shard + 1)
            position = Position(position.epoch + 1)
            yield [], position

    def _read_shard(
        self, shard: int, position: Position
    ) -> Generator[tuple[list[object], Position]]:
        shared = reads_rows(self.shards.num_shards, self.world_size)
        try:
            for part in range(position.part, self.shards.num_parts(shard)):
                for values in self.shards.read(shard, part, position.row):
                    # The position counts the rows of all ranks. Shard and part are in the offset
                    # so that the odd row does not always go to the same rank.
                    offset = self.rank - (shard + part + position.row)
                    position = replace(position, row=position.row + len(values))
                    mine = values[offset % self.world_size :: self.world_size] if shared else values
                    yield mine, position
                position = replace(position, part=part + 1, row=0)
        except Exception as error:
            if is_network_error(error) or isinstance(error, UserError):
                raise
            raise DataError(
                f"shard {shard} of {self.shards.fingerprint} cannot be read: "
                f"{type(error).__name__}: {shown(str(error))}; repair the file, choose "
                "other text (--dataset-split, --dataset-config, --dataset-revision), or read a "
                "folder with --train-dir, which looks at the column of the text alone"
            ) from error


def rank_order(seed: int, epoch: int, num_shards: int, rank: int, world_size: int) -> list[int]:
    """Return the shards that a rank reads in an epoch, in order.

    >>> rank_order(12345, 0, 6, rank=0, world_size=1)
    [1, 4, 0, 2, 5, 3]
    >>> [rank_order(12345, 0, 6, rank, world_size=2) for rank in range(2)]
    [[1, 0, 5], [4, 2, 3]]
    """
    order: list[int] = fold_in(seed, "shards", epoch).permutation(num_shards).tolist()
    return order if reads_rows(num_shards, world_size) else order[rank::world_size]


def reads_rows(num_shards: int, world_size: int) -> bool:
    """Return whether ranks share the rows of each shard, because there are too few shards.

    >>> reads_rows(6, 2), reads_rows(7, 2), reads_rows(2410, 8)
    (False, True, False)
    """
    return num_shards % world_size != 0 and num_shards < ENOUGH_SHARDS * world_size


def is_network_error(error: BaseException) -> bool:
    """Return whether the network raised an exception, or raised its cause.

    An overloaded server (5xx, 429) or a timeout (408) may answer the next time. Other refusals,
    such as 404 and 403, are final.

    >>> is_network_error(TimeoutError()), is_network_error(FileNotFoundError(2, "no such file"))
    (True, False)
    """
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    # HTTP libraries attach the answer, or its status, to the exception.
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", getattr(error, "status", None))
    if isinstance(status, int):
        return status >= 500 or status in (408, 429)
    return (
        type(error).__module__.partition(".")[0] in NETWORK_LIBRARIES
        # Network file systems raise OSError without an errno.
        or (type(error) is OSError and error.errno is None)
        or (error.__cause__ is not None and is_network_error(error.__cause__))
    )
