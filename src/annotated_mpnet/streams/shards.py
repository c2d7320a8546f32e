"""Where a stream is, in four numbers, and how it continues from there.

A stream cannot jump to row 40 million. But a position is only an epoch, a shard, a part and a row
(`streams/hub.py` draws them), because the order of the shards is a function of seed and epoch:

>>> for epoch in range(3):
...     print(epoch, rank_order(seed=12345, epoch=epoch, num_shards=6, rank=0, world_size=1))
0 [1, 4, 0, 2, 5, 3]
1 [5, 2, 4, 0, 1, 3]
2 [4, 3, 0, 2, 5, 1]

After the last row of an epoch comes the first of the next. A stream of two shards with two parts
each, read to its end, and once more from a position in the middle:

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

**Ranks.** Where there are enough shards, each rank takes every world_size-th of the order:

>>> [rank_order(12345, 0, 6, rank, world_size=2) for rank in range(2)]
[[1, 0, 5], [4, 2, 3]]

Otherwise all ranks read all shards and take every world_size-th row (`reads_rows`). Enough means a
number that the ranks divide evenly, or at least 16 per rank, where one more or less does not
matter.

**A broken connection** loses no row: reading begins again at the position, after 1, 2, 4, up to 60
seconds, and after `MOST_FAILURES` failures without a single row the run stops. Only what looks like
the network is tried again; a damaged file stays damaged.

HF: `IterableDataset.state_dict` was exact in our measurements (datasets 5.2.0) without its shuffle
buffer, but begins a Parquet file at its beginning, and names inner objects that may change with the
version. So the order is ours, and `datasets` only opens the parts.
"""

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from annotated_mpnet.errors import DataError, UserError
from annotated_mpnet.mpnet.randomness import fold_in
from annotated_mpnet.text.sources import shown_text

MOST_FAILURES = 8
"""Failures in succession before giving up, after three minutes of waiting:

>>> sum(min(LONGEST_PAUSE, 2.0**n) for n in range(MOST_FAILURES))
183.0
"""

LONGEST_PAUSE = 60.0
"""Seconds between two attempts, at most."""

ENOUGH_SHARDS = 16
"""Per rank, so that one more or less does not matter."""

NETWORK_LIBRARIES = ("aiohttp", "fsspec", "httpcore", "httpx", "httpx2", "requests", "urllib3")
"""Top-level packages whose exceptions mean the network."""


class Shards(Protocol):
    """What a stream is read from: `hub.DatasetStream`, or a replacement in tests.

    Attributes:
        fingerprint: names the text.
        num_shards: shards, at least one.
    """

    fingerprint: str
    num_shards: int

    def num_parts(self, shard: int) -> int:
        """Return how many parts of a shard can be opened by themselves."""
        ...

    def read(self, shard: int, part: int, first_row: int) -> Iterator[list[object]]:
        """Yield the values of a part, some at a time, starting at a row."""
        ...


@dataclass(frozen=True, slots=True)
class Position:
    """Where reading continues.

    Attributes:
        epoch: times that the rank's share was read to its end.
        shard: shards of this epoch's order that were read to their end.
        part: parts of the next shard that were.
        row: rows of the next part that were.
    """

    epoch: int = 0
    shard: int = 0
    part: int = 0
    row: int = 0


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

        The end of an epoch comes as an empty list with the position of the next one.

        Raises:
            DataError: a shard cannot be read, or the network is gone for good.
        """
        # A second attempt starts at `position`, like a resume.
        failures = 0
        while True:
            try:
                with closing(self._read(position)) as steps:
                    for values, following in steps:
                        failures, position = 0, following
                        yield values, following
            except Exception as error:
                if not is_network_error(error):
                    raise
                failures += 1
                if failures > MOST_FAILURES:
                    raise DataError(self._gave_up(error)) from error
                self.sleep(min(LONGEST_PAUSE, 2.0 ** (failures - 1)))

    def _read(self, position: Position) -> Generator[tuple[list[object], Position]]:
        """Do what `read` does, without second attempts."""
        while True:
            for shard in self._order(position.epoch)[position.shard :]:
                yield from self._read_shard(shard, position)
                position = Position(position.epoch, position.shard + 1)
            position = Position(position.epoch + 1)
            yield [], position

    def _read_shard(
        self, shard: int, position: Position
    ) -> Generator[tuple[list[object], Position]]:
        """Yield values of a shard, starting at a position in it."""
        with self._naming(shard):
            for part in range(position.part, self.shards.num_parts(shard)):
                for values in self.shards.read(shard, part, position.row):
                    # The position counts the rows of other ranks too.
                    mine = self._share(values, shard + part + position.row)
                    position = replace(position, row=position.row + len(values))
                    yield mine, position
                position = replace(position, part=part + 1, row=0)

    @contextmanager
    def _naming(self, shard: int) -> Generator[None]:
        """Name the shard in an error that no second attempt would fix."""
        try:
            yield
        except Exception as error:
            if is_network_error(error) or isinstance(error, UserError):
                raise
            raise DataError(
                f"shard {shard} of {self.shards.fingerprint} cannot be read: "
                f"{type(error).__name__}: {shown_text(str(error))}; fix the file, or choose other "
                "text (--dataset-split, --dataset-config, --dataset-revision)"
            ) from error

    def _order(self, epoch: int) -> list[int]:
        return rank_order(self.seed, epoch, self.shards.num_shards, self.rank, self.world_size)

    def _share(self, values: list[object], first: int) -> list[object]:
        """Return this rank's values; `first` numbers the first of them."""
        if not reads_rows(self.shards.num_shards, self.world_size):
            return values
        return values[(self.rank - first) % self.world_size :: self.world_size]

    def _gave_up(self, error: Exception) -> str:
        return (
            f"the network failed {MOST_FAILURES + 1} times in succession while reading "
            f"{self.shards.fingerprint}, the last time with {type(error).__name__}: "
            f"{shown_text(str(error))}; continue with --resume when it is back"
        )


def rank_order(seed: int, epoch: int, num_shards: int, rank: int, world_size: int) -> list[int]:
    """Return the shards that a rank reads in an epoch, in order."""
    order: list[int] = fold_in(seed, "shards", epoch).permutation(num_shards).tolist()
    return order if reads_rows(num_shards, world_size) else order[rank::world_size]


def reads_rows(num_shards: int, world_size: int) -> bool:
    """Tell whether ranks share the rows of each shard, because there are too few shards.

    >>> reads_rows(6, 2), reads_rows(7, 2), reads_rows(2410, 8)
    (False, True, False)
    """
    return num_shards % world_size != 0 and num_shards < ENOUGH_SHARDS * world_size


def is_network_error(error: BaseException) -> bool:
    """Tell whether an exception, or its cause, is the network's.

    Of HTTP's statuses, 5xx, 429 and 408 may go away; 404 and 403 will not.

    >>> is_network_error(TimeoutError()), is_network_error(FileNotFoundError(2, "no such file"))
    (True, False)
    """
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    status = _http_status(error)
    if status is not None:
        return status >= 500 or status in (408, 429)
    if type(error).__module__.partition(".")[0] in NETWORK_LIBRARIES:
        return True
    # Network file systems raise OSError without an error number.
    if type(error) is OSError and error.errno is None:
        return True
    return error.__cause__ is not None and is_network_error(error.__cause__)


def _http_status(error: BaseException) -> int | None:
    """Return the HTTP status on an exception, where HTTP libraries put it."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", getattr(error, "status", None))
    return status if isinstance(status, int) else None
