"""How often each token occurs, and how far guessing by frequency gets.

The simplest language model predicts every token with its frequency p(v) in the training text,
whatever the context. Its loss on other text,

    - sum over v of q(v) log2 p(v)        with q(v), the frequencies there,

is the *unigram plateau*. It is the first thing that a masked language model learns
(`mpnet/local_start.py`). How far a validation loss is below it says how much the network uses the
context, so each run computes it from its own text.

    V vocabulary
"""

import numpy as np

from annotated_mpnet.text.sequences import PackedSequences

COUNTED = 200_000
"""Frequencies are known long before a large corpus ends."""


def token_counts(sequences: PackedSequences, is_special_V: np.ndarray) -> np.ndarray:
    """Count the predictable tokens (V) of the first sequences; special tokens count 0."""
    vocab_size = len(is_special_V)
    counts_V = np.zeros(vocab_size, dtype=np.int64)
    counted = min(len(sequences), COUNTED)
    for first in range(0, counted, 4096):
        tokens = np.concatenate(sequences.sample(first, min(first + 4096, counted)))
        counts_V += np.bincount(tokens, minlength=vocab_size)
    counts_V[is_special_V] = 0
    return counts_V


def unigram_log_probabilities(counts_V: np.ndarray) -> np.ndarray:
    """Return log p(v) (V) in nats, each count raised by 0.1 so that nothing is impossible.

    >>> np.exp(unigram_log_probabilities(np.array([8, 1, 0]))).round(2).tolist()
    [0.87, 0.12, 0.01]
    """
    smoothed_V = counts_V + 0.1
    return np.asarray(np.log(smoothed_V / smoothed_V.sum()))


def unigram_bits(train_counts_V: np.ndarray, held_out_counts_V: np.ndarray) -> float:
    """Return the unigram plateau: bits per predicted token on the held-out text.

    >>> unigram_bits(np.array([10**6, 10**6]), np.array([3, 5]))  # a fair coin is one bit
    1.0
    """
    log_p_V = unigram_log_probabilities(train_counts_V)
    nats = -(held_out_counts_V * log_p_V).sum() / held_out_counts_V.sum()
    return round(float(nats / np.log(2)), 4)


def unigram_accuracy(train_counts_V: np.ndarray, held_out_counts_V: np.ndarray) -> float:
    """Return the share of held-out tokens that always guessing the most frequent one gets right."""
    return float(held_out_counts_V[train_counts_V.argmax()] / held_out_counts_V.sum())
