"""A shuffle that can be interrupted: sequences wait in a reservoir, and all of it is state.

A stream comes in the order of its files, which are sorted by date, site or topic. So `buffer_size`
sequences are kept. To deliver one, draw a slot at random, deliver what is in it, and refill it from
the stream. Four slots, and a, b, c, ... to come:

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

A sequence waits for `buffer_size` deliveries on average, and one in twenty for three times as many.
So neighbours in a file are some `buffer_size` sequences apart in training, but a million documents
of one site stay together; against that, the order of the shards is drawn (`streams/shards.py`).

**Interrupted.** Which slot delivery n draws is a function of (seed, rank, n). What is in the slots
is history, so it is part of a checkpoint:

    position    epoch 3, shard 17, part 4, row 512       where reading continues
    remainder   a b c                                    tokens after the last full sequence
    pending     [...] [...]                              sequences that have no slot yet
    reservoir   [...] [...] [...] [...] ...              the slots
    delivered   40,000                                   n

HF: the shuffle buffer of `IterableDataset` is not part of its state; a resume loses what was in it.

A `StreamState` is taken at every update, because batches are made ahead, and a checkpoint needs the
state after the batch that was trained on. Sequences never change, so it only copies references.

    N sequences
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
"""Of the parts. Raise it when their meaning changes: a checkpoint with another one is refused."""


@dataclass(frozen=True, slots=True)
class StreamCounts:
    """What a rank has read of a stream: `counts.Counts`, but frozen, because it is part of a state.

    >>> counts = StreamCounts(documents=1200, blank=3) + StreamCounts(documents=34, too_short=1)
    >>> print(counts)
    1,234 documents; dropped: 3 blank rows, 1 short texts
    >>> counts.rows_read
    1238

    Attributes:
        documents: documents that became tokens.
        blank: rows with an empty text.
        not_text: rows without text: nothing, a number, a list.
        too_short: texts below the minimum length.
        held_out: documents for validation and test, and copies of them.
        unpredictable: documents without a predictable token.
    """

    documents: int = 0
    blank: int = 0
    not_text: int = 0
    too_short: int = 0
    held_out: int = 0
    unpredictable: int = 0

    @property
    def rows_read(self) -> int:
        """Number of dataset rows read."""
        return sum(asdict(self).values())

    def __add__(self, other: "StreamCounts") -> "StreamCounts":
        mine, others = asdict(self), asdict(other)
        return StreamCounts(**{name: mine[name] + others[name] for name in mine})

    def __str__(self) -> str:
        """One line: what was read, and what was dropped."""
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
    """A rank's stream between two sequences; never changed.

    Attributes:
        rank: of the process that reads it.
        world_size: number of processes.
        position: where reading continues.
        delivered: number of sequences delivered.
        counts: what was read so far.
        documents_before_epoch: `counts.documents` at the start of the epoch.
        remainder: tokens that are not in a sequence yet.
        pending: sequences that have no slot yet, in order.
        reservoir: sequences in the slots.
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
        """Return where a run continues with another number of ranks: at the start of the next
        epoch.

        The rest of this epoch and the sequences that wait are lost. Masks do not repeat, because
        the numbers of the sequences continue: two ranks that have delivered five each have used 0
        to 9, four ranks continue with 12.

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
        """Return plain values for JSON, and arrays; sequences become all tokens and their lengths.

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

        Raises:
            CheckpointError: these are not its parts: another version wrote them.
        """
        names = {"format", "position", "counts", *_NUMBERS}
        if values.get("format") != FORMAT or set(values) != names or set(arrays) != _ARRAYS:
            raise CheckpointError(
                "the state of the stream has other parts than expected: it was written by another "
                "version, or is damaged; resume from another one with --resume-checkpoint"
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
    """Return the slot of delivery n."""
    return fold_in_seed(seed, "reservoir", rank, n) % slots


def _rows(name: str, arrays: Mapping[str, npt.NDArray[np.generic]]) -> tuple[Ids, ...]:
    """Return sequences as arrays of their own: one view would keep all of them in memory."""
    ids, lengths_N = _fixed(arrays[f"{name}_ids"]), _fixed(arrays[f"{name}_lengths"])
    if (lengths_N < 1).any() or lengths_N.sum() != len(ids):
        raise _damaged(f"{len(ids)} tokens are not the {lengths_N.sum()} of its {name} sequences")
    return tuple(row.copy() for row in np.split(ids, np.cumsum(lengths_N))[:-1])


def _fixed(array: npt.NDArray[np.generic]) -> Ids:
    return np.array(array, dtype=np.int32)


def _counts(name: str, value: object, kind: type[Position] | type[StreamCounts]) -> dict[str, int]:
    if not isinstance(value, dict) or set(value) != {each.name for each in fields(kind)}:
        raise _damaged(f"{name} has unexpected fields")
    return {each: _count(f"{name}.{each}", number) for each, number in value.items()}


def _count(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise _damaged(f"{name} is {str(value)[:80]!r}, expected a whole number of at least 0")
    return value


def _damaged(what: str) -> CheckpointError:
    return CheckpointError(
        f"the state of the stream is damaged: {what}; resume from another checkpoint with "
        "--resume-checkpoint"
    )
