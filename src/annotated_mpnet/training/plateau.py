"""Has training left the unigram plateau?

On the plateau a network guesses by frequency, whatever the context (`data/statistics.py`). Its loss
still creeps down a little there, by up to a bit: it learns what follows punctuation, and which
words go with the topic. Then it falls. So the plateau counts as left once the training loss is one
bit below it, where half of the candidates are ruled out by the context:

>>> watch = PlateauWatch(bits=9.2, patience=300, advice="try a lower --lr")
>>> for update, bits in ((20, 9.3), (40, 8.9), (60, 8.1), (80, 7.9)):
...     if said := watch.look(update, bits):
...         print(said)
left the plateau at update 60: the model now uses context

A run that is still there after a while hears once what to try:

>>> watch = PlateauWatch(bits=9.2, patience=300, advice="try a lower --lr")
>>> [watch.look(update, bits=8.6) for update in (100, 200)]
[None, None]
>>> print(watch.look(300, 8.6))
still on the plateau after 300 updates (8.60 bits; guessing by frequency: 9.20): try a lower --lr
>>> watch.look(400, 8.6)

A run that starts from trained weights is below the plateau from the start, and nothing is said.

Next: `tracking.py`, which asks after each line of metrics.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from annotated_mpnet.config import PretrainingConfig

MARGIN_BITS = 1.0
"""How far below the plateau it counts as left. Runs that stayed on it still came down to 0.9 bits
below it (`docs/log.md`)."""

LEAST_PATIENCE = 300
"""Updates before a run hears that it is still on the plateau. With the local start it is left after
60 to 150."""


@dataclass
class PlateauWatch:
    """Follows the training loss of a run and says when it leaves the plateau, once.

    Attributes:
        bits: the plateau of the training text.
        patience: updates after which a run that is still on the plateau is told so.
        advice: what to try then.
    """

    bits: float
    patience: int
    advice: str
    _was_on_it: bool = False
    _done: bool = False
    _warned: bool = False

    def look(self, update: int, bits: float) -> str | None:
        """Take the training loss by an update, and return what to tell the user, if anything."""
        if self._done:
            return None
        if bits <= self.bits - MARGIN_BITS:
            self._done = True
            if not self._was_on_it:
                return None
            return f"left the plateau at update {update}: the model now uses context"
        self._was_on_it = True
        if update < self.patience or self._warned:
            return None
        self._warned = True
        return (
            f"still on the plateau after {update} updates ({bits:.2f} bits; guessing by frequency: "
            f"{self.bits:.2f}): {self.advice}"
        )


def watch_for(
    bits: float, config: PretrainingConfig, former: Iterable[Mapping[str, float]]
) -> PlateauWatch:
    """Return the watch of a run.

    Args:
        bits: the plateau of the training text.
        config: of the run. Patience is at least twice the warm-up, during which little is learned.
        former: the metrics of the run so far, if it is resumed. What they show is not said again.
    """
    optimization, run = config.optimization, config.run
    # Loaded weights keep their own bias, so the flag would not help there.
    fresh = not run.resuming and run.initial_weights is None
    local = fresh and optimization.relative_bias_init == "normal"
    watch = PlateauWatch(
        bits,
        max(LEAST_PATIENCE, 2 * optimization.effective_warmup_updates),
        f"try {'--relative-bias-init local, ' * local}a lower --lr, or more sequences in an update "
        "(--update-freq)",
    )
    for record in former:
        if "train/bits" in record:
            watch.look(int(record["step"]), record["train/bits"])
    return watch


def left_at(records: Iterable[Mapping[str, float]], bits: float) -> int | None:
    """Return the update by which a run had left the plateau.

    None if it never did, or started below it.

    >>> records = [{"step": 20, "train/bits": 9.0}, {"step": 40, "train/bits": 7.9}]
    >>> left_at(records, 9.2), left_at(records[1:], 9.2), left_at(records, 8.5)
    (40, None, None)
    """
    watch = PlateauWatch(bits, patience=1 << 62, advice="")
    for record in records:
        if "train/bits" in record and watch.look(int(record["step"]), record["train/bits"]):
            return int(record["step"])
    return None
