"""Randomness as a function of position, not of history.

The usual way to be reproducible is one generator that everything draws from in turn. Each draw then
depends on all draws before it: on the number of workers, on an evaluation in between, on where the
run was interrupted. Its state must be saved and restored to the bit. Here nothing has a history:
code that needs random numbers names its *position* in the run, and a hash of that name seeds a
fresh generator.

    order of an epoch            fold_in(seed, "order", epoch)
    masking of a sequence        fold_in(seed, "mask", epoch, sequence)
    dropout of a micro-batch     fold_in_seed(seed, "dropout", update, micro_batch, rank)

>>> first = fold_in(12345, "mask", 0, 7).random()
>>> fold_in(12345, "mask", 0, 7).random() == first  # same position, same numbers, in any process
True
>>> fold_in(12345, "mask", 0, 8).random() == first
False

So no checkpoint holds a generator's state, workers cannot change what is trained on, every
evaluation sees the same masks, and batch one million is as cheap to reach as batch one. The name is
JAX's: `jax.random.fold_in` does this with one integer at a time.

Next: `mpnet/dropout.py`, the third line of the table.
"""

import hashlib

import numpy as np


def fold_in_seed(seed: int, *position: int | str) -> int:
    """Hash a seed and a position to 128 bits: the same on every machine and in every Python."""
    name = repr((seed, *position)).encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "little")


def fold_in(seed: int, *position: int | str) -> np.random.Generator:
    """Return the generator of a position.

    Philox is counter-based: the key is its whole state, so making one takes microseconds. NumPy's
    default generator would first spread the seed over a large state.
    """
    return np.random.Generator(np.random.Philox(key=fold_in_seed(seed, *position)))
