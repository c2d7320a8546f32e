"""Which tokens are predicted, and what the network reads in their place."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from annotated_mpnet.mpnet.masking import (
    choose_predicted,
    corrupt,
    count_in_documents,
    count_predicted,
    draw,
    find_words,
)

# The kinds of tokens for masking: special, the start of a word, its continuation.
SPECIAL, START, CONTINUE = "s", "w", "c"
SEQUENCES = st.lists(
    st.text(alphabet=[SPECIAL, START, CONTINUE], min_size=1, max_size=60), min_size=1, max_size=5
)
SHARES = st.floats(min_value=0.01, max_value=0.99)


def tables(sequences: list[str], width: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return which tokens start a word and which are predictable, (B, L), padded with specials."""
    length = max(width, *map(len, sequences))
    kinds_BL = np.array([list(sequence.ljust(length, SPECIAL)) for sequence in sequences])
    return kinds_BL == START, kinds_BL != SPECIAL


def choose(
    sequences: list[str], pred_prob: float, width: int = 0, first: int = 0
) -> list[list[int]]:
    """Return the predicted positions of each sequence in order, numbered from `first`."""
    starts_BL, predictable_BL = tables(sequences, width)
    draws_UBL = np.zeros((5, *starts_BL.shape))
    for i, sequence in enumerate(sequences):
        draws_UBL[:, i, : len(sequence)] = draw(7, "mask", 0, first + i, len(sequence))
    # Everything is one document, including padding.
    document_BL = np.ones(starts_BL.shape, dtype=np.int64)
    count_B = count_predicted(predictable_BL.sum(axis=1), pred_prob)
    count_BN = np.stack([0 * count_B, count_B], axis=1)
    word_BL = find_words(starts_BL, predictable_BL)
    positions_BP = choose_predicted(word_BL, document_BL, count_BN, draws_UBL)
    assert positions_BP.shape == (len(sequences), count_B.max())
    # Unused slots come last.
    return [
        positions[:count].tolist()
        for positions, count in zip(positions_BP, count_B, strict=True)
        if (positions[count:] == -1).all()
    ]


@given(SEQUENCES, SHARES)
def test_each_sequence_predicts_its_own_share(sequences, pred_prob):
    for sequence, predicted in zip(sequences, choose(sequences, pred_prob), strict=True):
        predictable = len(sequence) - sequence.count(SPECIAL)
        expected = max(1, round(pred_prob * predictable)) if predictable else 0
        assert len(predicted) == len(set(predicted)) == expected


@given(SEQUENCES, SHARES)
def test_special_tokens_and_padding_are_never_predicted(sequences, pred_prob):
    for sequence, predicted in zip(sequences, choose(sequences, pred_prob, width=70), strict=True):
        assert all(
            position < len(sequence) and sequence[position] != SPECIAL for position in predicted
        )


def words_of(sequence: str) -> list[list[int]]:
    words: list[list[int]] = []
    for position, kind in enumerate(sequence):
        if kind == START or (
            kind == CONTINUE and (position == 0 or sequence[position - 1] == SPECIAL)
        ):
            words.append([])
        if kind != SPECIAL:
            words[-1].append(position)
    return words


@given(SEQUENCES, SHARES)
def test_words_are_whole_except_at_most_one_per_sequence(sequences, pred_prob):
    for sequence, predicted in zip(sequences, choose(sequences, pred_prob), strict=True):
        cut = [
            word for word in words_of(sequence) if 0 < len(set(word) & set(predicted)) < len(word)
        ]
        assert len(cut) <= 1


@given(SEQUENCES)
def test_words_begin_by_the_rule(sequences):
    for sequence, found in zip(sequences, find_words(*tables(sequences)), strict=True):
        expected = {position: word[0] for word in words_of(sequence) for position in word}
        assert found.tolist() == [expected.get(position, -1) for position in range(len(found))]


@given(SEQUENCES, SHARES, st.integers(0, 5))
def test_documents_in_one_sequence_have_the_same_masks_as_alone(documents, pred_prob, padding):
    # Each begins with a special token, as real documents do, so no word spans two of them.
    documents = [SPECIAL + document for document in documents]
    alone = choose(documents, pred_prob)
    shared = "".join(documents) + SPECIAL * padding
    starts_BL, predictable_BL = tables([shared])
    lengths = [len(document) for document in documents]
    numbers = np.repeat([*range(1, len(documents) + 1), 0], [*lengths, padding])
    document_BL = numbers[None]
    draws = [draw(7, "mask", 0, i, length) for i, length in enumerate(lengths)]
    draws_UBL = np.concatenate([*draws, np.zeros((5, padding))], axis=1)[:, None]
    count_BN = count_predicted(count_in_documents(predictable_BL, document_BL), pred_prob)
    word_BL = find_words(starts_BL, predictable_BL)
    chosen = choose_predicted(word_BL, document_BL, count_BN, draws_UBL)[0].tolist()
    starts = np.cumsum([0, *lengths]).tolist()
    assert chosen == [
        start + position
        for start, positions in zip(starts, alone, strict=False)
        for position in positions
    ]


@given(SEQUENCES, SHARES, st.integers(0, 10))
def test_choice_does_not_depend_on_other_sequences_or_padding(sequences, pred_prob, padding):
    together = choose(sequences, pred_prob)
    alone = [
        choose([sequence], pred_prob, width=len(sequence) + padding, first=i)[0]
        for i, sequence in enumerate(sequences)
    ]
    assert together == alone


def test_every_word_and_every_order_is_equally_likely():
    # 4000 sequences predict two of ten words: 800 times each word, and 4000 / 90 times each ordered
    # pair. Bounds of five standard deviations.
    chosen = np.array(choose([START * 10] * 4000, 0.2))
    counts = np.bincount(chosen.ravel(), minlength=10)
    assert np.abs(counts - 800).max() < 5 * np.sqrt(4000 * 0.2 * 0.8)
    pairs = np.bincount(chosen[:, 0] * 10 + chosen[:, 1], minlength=100).reshape(10, 10)
    assert np.diagonal(pairs).sum() == 0
    assert np.abs(pairs[~np.eye(10, dtype=bool)] - 4000 / 90).max() < 5 * np.sqrt(4000 / 90)


def test_pieces_of_a_word_are_predicted_in_random_order():
    orders = choose([START + CONTINUE * 2] * 600, 0.99)
    counts = [orders.count(order) for order in {tuple(order): order for order in orders}.values()]
    assert len(counts) == 6
    assert max(abs(count - 100) for count in counts) < 5 * np.sqrt(600 / 6 * 5 / 6)


def corrupted(original_BP, rand_prob=0.1, keep_prob=0.1, random_ids=None):
    if random_ids is None:
        random_ids = np.arange(100, 200)
    draws_UBP = np.random.default_rng(5).random((5, *original_BP.shape))
    return corrupt(
        original_BP,
        draws_UBP,
        mask_id=3,
        random_ids=random_ids,
        rand_prob=rand_prob,
        keep_prob=keep_prob,
    )


def test_corruption_is_80_10_10_within_statistical_bounds():
    original_BP = np.full((100, 1000), 50)
    corrupted_BP = corrupted(original_BP)
    # For 100,000 tokens, five standard deviations are 0.63 % and 0.47 %.
    assert abs((corrupted_BP == 3).mean() - 0.8) < 0.0064
    assert abs((corrupted_BP == 50).mean() - 0.1) < 0.0048
    random = corrupted_BP[corrupted_BP >= 100]
    assert abs(len(random) / 100_000 - 0.1) < 0.0048
    counts = np.bincount(random - 100, minlength=100)
    assert np.abs(counts - 100).max() < 5 * np.sqrt(100)


def test_random_tokens_come_from_the_given_ids_only():
    random_ids = np.array([5, 17, 900])
    corrupted_BP = corrupted(np.full((10, 100), 50), 1.0, 0.0, random_ids)
    assert set(corrupted_BP.ravel()) == {5, 17, 900}


def test_nothing_is_corrupted_if_everything_is_kept():
    original_BP = np.arange(40).reshape(4, 10)
    assert (corrupted(original_BP, rand_prob=0.0, keep_prob=1.0) == original_BP).all()


def test_random_numbers_differ_by_sequence_epoch_seed_and_stream_only():
    numbers = draw(1, "mask", 0, 0, 8)
    assert (draw(1, "mask", 0, 0, 8) == numbers).all()
    for other in [(2, "mask", 0, 0), (1, "eval", 0, 0), (1, "mask", 1, 0), (1, "mask", 0, 1)]:
        assert not np.isin(draw(*other, 8), numbers).any()


def test_a_word_that_is_too_long_is_cut_anywhere() -> None:
    # 3000 sequences predict three tokens of a word of 20: 450 times each position, 3000 / 380 times
    # each ordered pair. Bounds of five standard deviations.
    chosen = np.array(choose([START + CONTINUE * 19] * 3000, 0.15))
    counts = np.bincount(chosen.ravel(), minlength=20)
    assert np.abs(counts - 450).max() < 5 * np.sqrt(3000 * 0.15 * 0.85)
    pairs = np.bincount(chosen[:, 0] * 20 + chosen[:, 1], minlength=400).reshape(20, 20)
    assert np.abs(pairs[~np.eye(20, dtype=bool)] - 3000 / 380).max() < 5 * np.sqrt(3000 / 380)


def test_no_position_of_a_word_is_predicted_more_often_than_another() -> None:
    # Four words of five tokens: 15 % of 20 tokens is less than one word.
    chosen = np.array(choose([(START + CONTINUE * 4) * 4] * 3000, 0.15))
    counts = np.bincount(chosen.ravel(), minlength=20)
    assert np.abs(counts - 450).max() < 5 * np.sqrt(3000 * 0.15 * 0.85)
