"""Tokens to sequences, in three ways."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from annotated_mpnet.text.cutting import Ragged, best_fit, cut_sequences

CLS, SEP = 0, 2
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def documents_of(lengths: list[int], first: int = 10) -> list[list[int]]:
    """Return documents whose tokens count upwards, so each token is unique."""
    ends = np.cumsum(lengths) + first
    return [list(range(end - length, end)) for end, length in zip(ends, lengths, strict=True)]


def sequences_in(packing: str, documents: list[list[int]], max_tokens: int, window: int = 10**6):
    windows = [
        Ragged.of(documents[first : first + window]) for first in range(0, len(documents), window)
    ]
    return [
        sequence.tolist()
        for sequences in cut_sequences(windows, packing, max_tokens, CLS, SEP)
        for sequence in sequences
    ]


def documents_in(sequence: list[int]) -> list[list[int]]:
    """Return the documents of a sequence, without `<s>` and `</s>`."""
    ends = [place for place, token in enumerate(sequence) if token == SEP]
    starts = [place for place, token in enumerate(sequence) if token == CLS]
    assert len(starts) == len(ends)
    assert [0, *(end + 1 for end in ends)] == [*starts, len(sequence)]
    return [sequence[start + 1 : end] for start, end in zip(starts, ends, strict=True)]


@given(LENGTHS, st.integers(4, 20), st.integers(1, 10))
def test_full_is_one_stream_whatever_the_windows(lengths, max_tokens, window):
    documents = documents_of(lengths)
    sequences = sequences_in("full", documents, max_tokens, window)
    assert all(sequence[0] == CLS and sequence[-1] == SEP for sequence in sequences)
    assert all(len(sequence) == max_tokens for sequence in sequences[:-1])
    stream = [token for document in documents for token in [*document, SEP]][:-1]
    assert [token for sequence in sequences for token in sequence[1:-1]] == stream


@given(LENGTHS, st.integers(4, 20))
def test_none_has_one_document_per_sequence_and_continues_long_ones(lengths, max_tokens):
    documents = documents_of(lengths)
    sequences = sequences_in("none", documents, max_tokens)
    assert all(3 <= len(sequence) <= max_tokens for sequence in sequences)
    remaining = iter(sequences)
    for document in documents:
        of_it: list[int] = []
        while len(of_it) < len(document):
            ((text),) = documents_in(next(remaining))
            of_it += text
        assert of_it == document
    assert list(remaining) == []


@given(LENGTHS, st.integers(4, 20), st.integers(1, 30))
def test_documents_are_whole_once_and_in_order_within_a_sequence(lengths, max_tokens, window):
    documents = documents_of(lengths)
    sequences = sequences_in("documents", documents, max_tokens, window)
    assert all(len(sequence) <= max_tokens for sequence in sequences)
    found = [document for sequence in sequences for document in documents_in(sequence)]
    alone = [sequence[1:-1] for sequence in sequences_in("none", documents, max_tokens)]
    assert sorted(found) == alone
    for sequence in sequences:
        assert documents_in(sequence) == sorted(documents_in(sequence))


def slow_best_fit(lengths: list[int], capacity: int) -> int:
    """Return the number of sequences that the textbook's best fit needs."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [space for space in free if space >= length]
        if fitting:
            free.remove(min(fitting))
            free.append(min(fitting) - length)
        else:
            free.append(capacity - length)
    return len(free)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=80), st.integers(30, 50))
def test_best_fit_equals_the_textbooks(lengths, capacity):
    row_of_N = best_fit(np.array(lengths), capacity)
    used = np.bincount(row_of_N, weights=lengths)
    assert used.max() <= capacity
    assert used.min() > 0
    assert len(used) == slow_best_fit(lengths, capacity)
    # Sequences are numbered by their first item.
    assert list(dict.fromkeys(row_of_N.tolist())) == list(range(len(used)))


def test_sequences_of_documents_are_nearly_full_with_lengths_like_paragraphs():
    lengths = np.random.default_rng(0).lognormal(3.5, 1.0, size=4000).astype(int) + 1
    sequences = sequences_in("documents", documents_of(lengths.tolist()), 128)
    assert sum(map(len, sequences)) / (128 * len(sequences)) > 0.99


@pytest.mark.parametrize("packing", ["full", "none", "documents"])
def test_a_single_document_makes_the_same_sequence_in_all_modes(packing):
    assert sequences_in(packing, [[11, 12, 13]], 8) == [[0, 11, 12, 13, 2]]


def test_ragged_returns_its_parts():
    sequences = [[1, 2], [], [3], [4, 5, 6]]
    ragged = Ragged.of(sequences)
    assert [each.tolist() for each in ragged] == sequences
    assert [each.tolist() for each in ragged.take(np.array([3, 0, 2, 1]))] == [
        [4, 5, 6],
        [1, 2],
        [3],
        [],
    ]
    assert list(Ragged.of([])) == []
