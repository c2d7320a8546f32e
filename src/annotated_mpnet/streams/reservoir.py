"""A shuffle that can be interrupted: rows wait in a reservoir, and all of it is state.

**The problem.** A stream comes in the order of its files, and files are sorted by something: by
date, by site, by topic. Rows that are neighbours in a file should not be neighbours in a batch. A
global shuffle needs random access, which a stream has not.

**The idea.** Keep `buffer_size` rows at hand. To deliver one, draw a slot at random, hand out what
lies there, and fill the slot with the next row of the stream. Four slots, and a, b, c, ... to come:

>>> stream = iter("abcdefghijkl")
>>> slots = [next(stream) for _ in range(4)]
>>> for n in range(6):
...     slot = draw_slot(seed=1, rank=0, n=n, slots=4)
...     print(n, "".join(slots), slot, slots[slot])
...     slots[slot] = next(stream)
0 abcd 1 b
1 aecd 0 a
2 fecd 0 f
3 gecd 1 e
4 ghcd 2 c
5 ghid 2 i

A row waits for `buffer_size` deliveries on average, some much longer: each delivery passes it by
with the probability 1 - 1/buffer_size, so that one row in twenty waits for three times as many.

>>> slots, waited = list(range(100)), []
>>> for n in range(100, 20_100):
...     slot = draw_slot(seed=1, rank=0, n=n, slots=100)
...     waited.append(n - slots[slot])
...     slots[slot] = n
>>> print(f"{np.mean(waited):.0f}, {np.mean(np.array(waited) > 300):.3f}, {np.exp(-3):.3f}")
100, 0.048, 0.050

So rows that are neighbours in a file are some `buffer_size` rows apart in training, but a part of
the stream that is much longer than the reservoir, a million documents of one site, stays a part.
Against that helps the order of the shards (`streams/shards.py`), which is drawn for the whole dataset.

It is packed rows that wait, not documents: so their number says how much memory they take, 20 MB
for 10,000 rows of 512 tokens.

>>> 10_000 * 512 * np.dtype(np.int32).itemsize
20480000

**Interrupted.** Which slot delivery n draws is a function of (seed, rank, n). What lies in the
slots is history, and the only way to know it is to have kept it: the rows in the reservoir are part
of a checkpoint, with the tokens that no row has taken yet and the position of the stream. That is
all there is, so a resumed run goes on with the very same row.

    position    epoch 3, shard 17, part 4, row 512       where reading goes on
    remainder   a b c                                    tokens behind the last whole row
    pending     [row] [row]                              rows that have no slot yet
    reservoir   [row] [row] [row] [row] ...              the slots
    delivered   40,000                                   n

HF: the shuffle buffer of `IterableDataset` is not part of its state. After a resume it is filled
anew: what was in it is lost for this epoch, about 10,000 documents each time.

**Cheap to take.** A `StreamState` is taken at every update, because batches are made ahead of the
training, and what is saved must be the state behind the batch that was trained on, not behind the
one that was made last. Rows are never changed once they are made. So a state refers to them, and
taking one is to copy a list of references; tables of numbers are only made of it to save it.

Next: `streams/streams.py`, which fills and drains it.

    N rows
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields

import numpy as np
import numpy.typing as npt

from annotated_mpnet.errors import CheckpointError
from annotated_mpnet.mpnet.collator import Ids
from annotated_mpnet.mpnet.randomness import fold_in_seed
from annotated_mpnet.streams.shards import Position

FORMAT = 1
"""Of the parts; to be raised when their meaning changes. A checkpoint with another is refused: read
with a new meaning, an old number would be a wrong place in the stream, and nobody would see it."""


@dataclass(frozen=True, slots=True)
class StreamCounts:
    """What a rank has met in its share of a stream.

    What `counts.Counts` is for text on a disk; but frozen, because it is part of a state.

    >>> counts = StreamCounts(documents=1200, blank=3) + StreamCounts(documents=34, too_short=1)
    >>> print(counts)
    1,234 documents; dropped: 3 blank rows, 1 short texts
    >>> counts.rows_read
    1238

    Attributes:
        documents: documents that became tokens.
        blank: rows with an empty text.
        not_text: rows without text: nothing at all, a number, a list.
        too_short: texts that were dropped for their length.
        held_out: documents that are kept from training, and copies of them.
        unpredictable: documents without a predictable token, dropped.
    """

    documents: int = 0
    blank: int = 0
    not_text: int = 0
    too_short: int = 0
    held_out: int = 0
    unpredictable: int = 0

    @property
    def rows_read(self) -> int:
        """How many rows of the dataset that were."""
        return sum(asdict(self).values())

    def __add__(self, other: "StreamCounts") -> "StreamCounts":
        mine, others = asdict(self), asdict(other)
        return StreamCounts(**{name: mine[name] + others[name] for name in mine})

    def __str__(self) -> str:
        """Say what was read, and of the rest what there was."""
        unusual = {
            "blank rows": self.blank,
            "rows without text": self.not_text,
            "short texts": self.too_short,
            "held-out documents": self.held_out,
            "documents without a predictable token": self.unpredictable,
        }
        dropped = [f"{count:,} {what}" for what, count in unusual.items() if count]
        return f"{self.documents:,} documents; dropped: {', '.join(dropped) or 'none'}"


@dataclass(frozen=True, slots=True, eq=False)
class StreamState:
    """All that a rank's stream consists of between two rows.

    Frozen: a state that somebody keeps is never changed by what the stream does next. Two of them
    cannot be compared by `==`, which for arrays is no single answer.

    Attributes:
        rank: whose it is.
        world_size: of how many.
        position: where reading goes on.
        delivered: rows that were delivered.
        counts: what was met so far.
        documents_before_epoch: `counts.documents` where the epoch began.
        remainder: tokens that no row has taken yet.
        pending: rows that have no slot yet, in order.
        reservoir: rows in the slots.
    """

    rank: int = 0
    world_size: int = 1
    position: Position = field(default_factory=Position)
    delivered: int = 0
    counts: StreamCounts = field(default_factory=StreamCounts)
    documents_before_epoch: int = 0
    remainder: Ids = field(default_factory=lambda: np.empty(0, np.int32))
    pending: tuple[Ids, ...] = ()
    reservoir: tuple[Ids, ...] = ()

    def restarted(self, rank: int, world_size: int) -> "StreamState":
        """Return where a run goes on with another number of ranks: at the start of the next epoch.

        The shares of the ranks are other ones then, so that no place in the old ones is a place in
        the new. What that costs: the rest of this epoch is not read, nor are the rows that wait. No
        row is masked as one was before, since the numbers of the rows go on: two ranks that have
        delivered five rows each have used the numbers 0 to 9, four ranks go on with 12.

        >>> state = StreamState(world_size=2, delivered=5).restarted(rank=0, world_size=4)
        >>> state.delivered * state.world_size, state.position.epoch
        (12, 1)
        """
        return StreamState(
            rank=rank,
            world_size=world_size,
            position=Position(self.position.epoch + 1),
            delivered=-(-self.delivered * self.world_size // world_size),
        )

    def to_parts(self) -> tuple[dict[str, object], dict[str, npt.NDArray[np.generic]]]:
        """Return what can be written: plain values for JSON, and arrays.

        Rows become two arrays, of all tokens and of lengths, as in `text/sequences.py`:

        >>> rows = (np.array([0, 11, 2], np.int32), np.array([0, 12, 13, 2], np.int32))
        >>> values, arrays = StreamState(reservoir=rows, delivered=40_000).to_parts()
        >>> arrays["reservoir_ids"], arrays["reservoir_lengths"]
        (array([ 0, 11,  2,  0, 12, 13,  2], dtype=int32), array([3, 4], dtype=int32))
        >>> StreamState.from_parts(values, arrays).delivered
        40000
        """
        values: dict[str, object] = {
            "format": FORMAT,
            **{name: getattr(self, name) for name in _NUMBERS},
            "position": asdict(self.position),
            "counts": asdict(self.counts),
        }
        arrays: dict[str, npt.NDArray[np.generic]] = {"remainder": self.remainder}
        for name, rows in (("pending", self.pending), ("reservoir", self.reservoir)):
            lengths_N = np.array([len(row) for row in rows], dtype=np.int32)
            arrays[f"{name}_ids"] = np.concatenate([np.empty(0, np.int32), *rows])
            arrays[f"{name}_lengths"] = lengths_N
        return values, arrays

    @classmethod
    def from_parts(
        cls, values: Mapping[str, object], arrays: Mapping[str, npt.NDArray[np.generic]]
    ) -> "StreamState":
        """Return the state that `to_parts` took apart.

        The checkpoint's hashes have shown that these are the bytes that were written. Looked at
        here is that they mean something: a negative row or a missing array would else come up as
        some error of numpy's, hours later.

        Args:
            values: the numbers, by name.
            arrays: the rows, by name.

        Raises:
            CheckpointError: these are not its parts, or not whole.
        """
        names = {"format", "position", "counts", *_NUMBERS}
        if values.get("format") != FORMAT or set(values) != names or set(arrays) != _ARRAYS:
            raise CheckpointError(
                "the state of the stream has other parts than expected: it was written by another "
                "version, or is damaged; go on from another checkpoint with --resume-checkpoint"
            )
        for name in _ARRAYS:
            if arrays[name].dtype != np.int32 or arrays[name].ndim != 1:
                raise _damaged(f"{name} is not a list of whole numbers")
        return cls(
            **{name: _count(name, values[name]) for name in _NUMBERS},
            position=Position(**_counts("position", values["position"], Position)),
            counts=StreamCounts(**_counts("counts", values["counts"], StreamCounts)),
            remainder=_fixed(arrays["remainder"]),
            pending=_rows("pending", arrays),
            reservoir=_rows("reservoir", arrays),
        )


_NUMBERS = ("rank", "world_size", "delivered", "documents_before_epoch")
_ARRAYS = {"remainder", "pending_ids", "pending_lengths", "reservoir_ids", "reservoir_lengths"}


def draw_slot(seed: int, rank: int, n: int, slots: int) -> int:
    """Return the slot of delivery n.

    The remainder of a division favours low slots, by one part in 2**128 / slots: not to be noticed.
    """
    return fold_in_seed(seed, "reservoir", rank, n) % slots


def _rows(name: str, arrays: Mapping[str, npt.NDArray[np.generic]]) -> tuple[Ids, ...]:
    """Return rows, each an array of its own: a view would keep all of them in memory, as long as
    one of them waits."""
    ids, lengths_N = _fixed(arrays[f"{name}_ids"]), _fixed(arrays[f"{name}_lengths"])
    if (lengths_N < 1).any() or lengths_N.sum() != len(ids):
        raise _damaged(f"{len(ids)} tokens are not the {lengths_N.sum()} of its {name} rows")
    return tuple(row.copy() for row in np.split(ids, np.cumsum(lengths_N))[:-1])


def _fixed(array: npt.NDArray[np.generic]) -> Ids:
    """Return an array that nobody else can change."""
    return np.array(array, dtype=np.int32)


def _counts(name: str, value: object, kind: type[Position] | type[StreamCounts]) -> dict[str, int]:
    if not isinstance(value, dict) or set(value) != {each.name for each in fields(kind)}:
        raise _damaged(f"{name} is not what it should be")
    return {each: _count(f"{name}.{each}", number) for each, number in value.items()}


def _count(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise _damaged(f"{name} is {str(value)[:80]!r}, expected a whole number from 0 on")
    return value


def _damaged(what: str) -> CheckpointError:
    return CheckpointError(
        f"the state of the stream is damaged: {what}; go on from another checkpoint with "
        "--resume-checkpoint"
    )
