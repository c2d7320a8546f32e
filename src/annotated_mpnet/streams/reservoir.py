"""A shuffle that can be interrupted: sequences wait in a reservoir, which is part of the state.

**The problem.** A stream comes in the order of its files, and files are sorted by something: date,
site, topic. Neighbours in a file should not be neighbours in a batch, but a stream has no random
access and cannot be shuffled as a whole.

**The idea.** Keep `buffer_size` sequences at hand. To deliver one, draw a slot at random, hand out
its sequence, and fill the slot with the next one of the stream. With four slots:

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

A sequence waits for `buffer_size` deliveries on average, one in twenty for three times as many. A
run of text much longer than the reservoir, a million documents of one site, stays together; the
random order of the shards (`streams/shards.py`) is what helps against that.

**Interrupted.** The slot of delivery n is a function of (seed, rank, n). The contents of the slots
are history, so a checkpoint stores them, and a resumed run delivers exactly the next sequence:

    position    epoch 3, shard 17, part 4, row 512       where reading continues
    remainder   a b c                                    tokens after the last full sequence
    pending     [sequence] [sequence]                    sequences that have no slot yet
    reservoir   [sequence] [sequence] [sequence] ...     the slots
    delivered   40,000                                   n

Batches are built ahead of training, so a state is taken after every update. That is cheap:
sequences never change, and a state only refers to them.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from annotated_mpnet.errors import CheckpointError
from annotated_mpnet.mpnet.collator import Ids
from annotated_mpnet.mpnet.randomness import fold_in_seed
from annotated_mpnet.streams.shards import Count, Position

Arrays = Mapping[str, npt.NDArray[np.generic]]


@dataclass(frozen=True, slots=True)
class StreamCounts:
    """How many rows of the dataset a rank has read, by what became of them.

    `counts.Counts` does this for text on disk. This one is frozen because it is part of a state.

    >>> counts = StreamCounts(documents=1200, blank=3) + StreamCounts(documents=34, too_short=1)
    >>> print(counts)
    1,234 documents; dropped: 3 blank rows, 1 short texts
    >>> counts.rows_read
    1238
    """

    documents: Count = 0
    blank: Count = 0
    not_text: Count = 0
    too_short: Count = 0
    held_out: Count = 0
    unpredictable: Count = 0

    @property
    def rows_read(self) -> int:
        """Number of dataset rows read."""
        return sum(asdict(self).values())

    def __add__(self, other: "StreamCounts") -> "StreamCounts":
        mine, others = asdict(self), asdict(other)
        return StreamCounts(**{name: mine[name] + others[name] for name in mine})

    def __str__(self) -> str:
        reasons = {
            "blank rows": self.blank,
            "rows without text": self.not_text,
            "short texts": self.too_short,
            "held-out documents": self.held_out,
            "documents without a predictable token": self.unpredictable,
        }
        dropped = [f"{count:,} {what}" for what, count in reasons.items() if count]
        return f"{self.documents:,} documents; dropped: {', '.join(dropped) or 'none'}"


@dataclass(frozen=True, slots=True, eq=False)
class StreamState:
    """Everything that the next sequences of a rank's stream depend on.

    Attributes:
        delivered: sequences delivered so far.
        documents_before_epoch: `counts.documents` at the start of the epoch.
        remainder: tokens after the last full sequence.
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
        """Return where a run with another number of ranks continues: at the next epoch.

        The ranks' shares change, so a position in an old share means nothing in a new one. The rest
        of this epoch and the waiting sequences are lost. No mask repeats, because sequences keep
        counting: two ranks that delivered five each used the numbers 0 to 9, four ranks continue
        with 12.

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
        """Return what a checkpoint stores: values for JSON, and arrays.

        >>> sequences = (np.array([0, 11, 2], np.int32), np.array([0, 12, 13, 2], np.int32))
        >>> values, arrays = StreamState(reservoir=sequences, delivered=40_000).to_parts()
        >>> arrays["reservoir_ids"], arrays["reservoir_lengths"]
        (array([ 0, 11,  2,  0, 12, 13,  2], dtype=int32), array([3, 4], dtype=int32))
        >>> StreamState.from_parts(values, arrays).delivered
        40000
        """
        values: dict[str, object] = {
            "format": 1,
            "rank": self.rank,
            "world_size": self.world_size,
            "delivered": self.delivered,
            "documents_before_epoch": self.documents_before_epoch,
            "position": asdict(self.position),
            "counts": asdict(self.counts),
        }
        arrays: dict[str, npt.NDArray[np.generic]] = {"remainder": self.remainder}
        for name, sequences in (("pending", self.pending), ("reservoir", self.reservoir)):
            arrays[f"{name}_ids"] = np.concatenate([np.empty(0, np.int32), *sequences])
            arrays[f"{name}_lengths"] = np.array([len(each) for each in sequences], np.int32)
        return values, arrays

    @classmethod
    def from_parts(cls, values: Mapping[str, object], arrays: Arrays) -> "StreamState":
        """Return the state that `to_parts` took apart.

        The checkpoint's hashes have proved the bytes. What is left to check is that this version
        understands all of them: taken apart again, the state must give the same parts.

        Raises:
            CheckpointError: another version wrote the parts, or they are damaged.
        """
        try:
            saved = msgspec.convert(values, _Saved)
            state = cls(
                rank=saved.rank,
                world_size=saved.world_size,
                position=saved.position,
                delivered=saved.delivered,
                counts=saved.counts,
                documents_before_epoch=saved.documents_before_epoch,
                remainder=np.array(arrays["remainder"], np.int32),
                pending=_sequences(arrays, "pending"),
                reservoir=_sequences(arrays, "reservoir"),
            )
            values_again, arrays_again = state.to_parts()
            if values_again != values or arrays_again.keys() != arrays.keys():
                raise ValueError("unknown or missing parts")
            for name, array in arrays.items():
                if array.dtype != np.int32 or not np.array_equal(array, arrays_again[name]):
                    raise ValueError(f"{name} is damaged")
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the state of the stream cannot be read ({error}): another version wrote it, or "
                "it is damaged; resume from another checkpoint with --resume-checkpoint"
            ) from error
        return state


class _Saved(msgspec.Struct):
    """The values of a state as JSON holds them.

    A change of meaning needs another `format`: with a new meaning, an old number would be a wrong
    place in the stream, and no error would show it.
    """

    format: Literal[1]
    rank: Count
    world_size: Count
    delivered: Count
    documents_before_epoch: Count
    position: Position
    counts: StreamCounts


def draw_slot(seed: int, rank: int, n: int, slots: int) -> int:
    """Return the slot of delivery n."""
    return fold_in_seed(seed, "reservoir", rank, n) % slots


def _sequences(arrays: Arrays, name: str) -> tuple[Ids, ...]:
    """Cut an array of tokens into sequences.

    Each is a copy: a view would keep all of them in memory while one of them waits.
    """
    ids, ends_N = arrays[f"{name}_ids"], np.cumsum(arrays[f"{name}_lengths"])
    return tuple(np.array(each, np.int32) for each in np.split(ids, ends_N)[:-1])
