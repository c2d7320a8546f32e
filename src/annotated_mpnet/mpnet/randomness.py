"""Randomness as a function of position, not of history.

The usual way to be reproducible is one generator that everybody draws from, in order. Then every
draw depends on all the draws before it: on the number of workers, on whether an evaluation
happened in between, on where a run was interrupted; and its state must be saved and restored to
the bit. Here nothing has a history. Whoever needs random numbers names *where* it stands, and that
name is hashed into a fresh generator:

    order of the rows in an epoch   fold_in(seed, "order", epoch)
    masking of a row                fold_in(seed, "mask", epoch, row)
    dropout of a micro-batch        fold_in(seed, "dropout", update, micro_batch, rank)

>>> first = fold_in(12345, "mask", 0, 7).random()
>>> fold_in(12345, "mask", 0, 7).random() == first  # same place, same numbers, in any process
True
>>> fold_in(12345, "mask", 0, 8).random() == first
False

So no checkpoint holds a generator's state, no worker can change what is trained on, evaluation
sees the same masks each time, and batch one million costs no more to reach than batch one. (The
name is JAX's `jax.random.fold_in`, which does this with one integer at a time.)

Next: `training/loader.py` uses it for order, `mpnet/masking.py` for masks, `mpnet/loop.py` for
dropout.
"""

import hashlib

import numpy as np


def fold_in_seed(seed: int, *position: int | str) -> int:
    """Hash a seed and a position to 128 bits: the same on every machine, in every Python."""
    name = repr((seed, *position)).encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "little")


def fold_in(seed: int, *position: int | str) -> np.random.Generator:
    """Return the generator that belongs to a position.

    Philox is a counter-based generator: its key is its whole state, so that making one costs
    microseconds, where numpy's default would first spread the seed over a large state.
    """
    return np.random.Generator(np.random.Philox(key=fold_in_seed(seed, *position)))
