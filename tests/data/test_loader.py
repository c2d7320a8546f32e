"""The order of batches, a function of the seed and the position; batches made ahead."""

import dataclasses
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import pytest
import toy_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from annotated_mpnet.mpnet.batch import NOT_PREDICTED, Batch
from annotated_mpnet.mpnet.collator import DataCollatorForMaskedPermutedLanguageModeling
from annotated_mpnet.mpnet.config import ObjectiveConfig
from annotated_mpnet.text.packing import pack_sequences
from annotated_mpnet.text.sequences import PackedSequences
from annotated_mpnet.text.tokenizer import vocabulary_of
from annotated_mpnet.training.loader import (
    BatchLoader,
    evaluation_batches,
    group_by_length,
    prefetch,
)
from waiting import HUNG

MAX_TOKENS = 12


@pytest.fixture(scope="module")
def sequences(tmp_path_factory) -> PackedSequences:
    directory = tmp_path_factory.mktemp("loader")
    generator = np.random.default_rng(0)
    words = ["".join(generator.choice(list("abcdefgh"), size=4)) for _ in range(60)]
    (directory / "text.txt").write_text("\n".join(words) + "\n")
    tokenizer = toy_tokenizer.word_piece()
    packed = pack_sequences([directory / "text.txt"], tokenizer, MAX_TOKENS, cache_dir=directory)
    assert len(packed) == 30
    return packed


@pytest.fixture(scope="module")
def collator() -> DataCollatorForMaskedPermutedLanguageModeling:
    vocabulary = vocabulary_of(toy_tokenizer.word_piece())
    return DataCollatorForMaskedPermutedLanguageModeling(
        vocabulary, ObjectiveConfig(), MAX_TOKENS, seed=3
    )


def content(batch: Batch) -> tuple[object, ...]:
    return (
        batch.input_ids.tolist(),
        batch.predicted_positions.tolist(),
        batch.predicted_ids.tolist(),
        batch.num_tokens,
        batch.num_predicted,
    )


def seen(loader: BatchLoader, batches: int) -> list[tuple[int, int]]:
    """Return (epoch, index) of each sequence of the first batches."""
    return [
        (sequence.epoch, sequence.index)
        for k in range(batches)
        for sequence in loader.sequences_of(k)
    ]


def test_a_batch_is_the_same_in_any_order_of_requests(sequences, collator):
    first = BatchLoader(sequences, collator, 7, seed=1)
    in_order = [content(first.batch(k)) for k in range(20)]
    second = BatchLoader(sequences, collator, 7, seed=1)
    for k in np.random.default_rng(0).permutation(20).tolist():
        assert content(second.batch(k)) == in_order[k]


@pytest.mark.parametrize("batch_size", [1, 7, 30, 100])
def test_every_sequence_comes_once_in_every_epoch(sequences, collator, batch_size):
    loader = BatchLoader(sequences, collator, batch_size, seed=1)
    positions = seen(loader, 300 // batch_size)
    for epoch in range(len(positions) // 30):
        of_epoch = positions[30 * epoch : 30 * (epoch + 1)]
        assert {its_epoch for its_epoch, _ in of_epoch} == {epoch}
        assert sorted(index for _, index in of_epoch) == list(range(30))


def test_two_ranks_read_each_of_13_sequences_once_per_epoch_and_none_waits(
    collator, tmp_path, monkeypatch
):
    words = [a + b for a in "abcdefgh" for b in "abcdefgh"][:13]
    (tmp_path / "text.txt").write_text("\n".join(2 * word for word in words) + "\n")
    packed = pack_sequences(
        [tmp_path / "text.txt"], toy_tokenizer.word_piece(), 6, packing="none", cache_dir=tmp_path
    )
    assert len(packed) == 13
    # Returns the sequences instead of a batch.
    monkeypatch.setattr(BatchLoader, "batch", BatchLoader.sequences_of)
    loaders = [BatchLoader(packed, collator, 2, seed=1, rank=r, world_size=2) for r in range(2)]
    # 13 updates of 2 sequences per rank are 4 epochs; three of them end within an update.
    updates = [islice(loader.updates(0, 1), 13) for loader in loaders]
    read = [
        (sequence.epoch, sequence.index)
        for of_all in zip(*updates, strict=True)
        for (sequences,), _ in of_all
        for sequence in sequences
    ]
    assert len(read) == 52
    assert sorted(read) == [(epoch, index) for epoch in range(4) for index in range(13)]
    assert [epoch for epoch, _ in read] == sorted(epoch for epoch, _ in read)


def test_order_changes_with_the_epoch_and_with_the_seed(sequences, collator):
    positions = seen(BatchLoader(sequences, collator, 30, seed=1), 3)
    orders = [tuple(index for _, index in positions[30 * i : 30 * i + 30]) for i in range(3)]
    other = tuple(index for _, index in seen(BatchLoader(sequences, collator, 30, seed=2), 1))
    assert len({*orders, other, tuple(range(30))}) == 5


def test_order_does_not_depend_on_the_batch_size(sequences, collator):
    small, large = (BatchLoader(sequences, collator, size, seed=1) for size in (4, 8))
    assert seen(small, 30) == seen(large, 15)


def test_sequences_are_those_of_the_table(sequences, collator):
    for sequence in BatchLoader(sequences, collator, 40, seed=1).sequences_of(2):
        assert sequence.input_ids.tolist() == sequences.take(np.array([sequence.index]))[0].tolist()


def test_evaluation_reads_each_sequence_once_with_the_same_masks_each_time(sequences, collator):
    first, second = (list(evaluation_batches(sequences, collator, 8)) for _ in range(2))
    assert [len(batch.input_ids) for batch in first] == [8, 8, 8, 6]
    assert list(map(content, first)) == list(map(content, second))
    restored = []
    for batch in first:
        for ids, positions, originals in zip(
            batch.input_ids, batch.predicted_positions, batch.predicted_ids, strict=True
        ):
            used = originals != NOT_PREDICTED
            ids[positions[used]] = originals[used]
            restored.append(ids[: len(sequences.take(np.array([len(restored)]))[0])].tolist())
    assert restored == [sequence.tolist() for sequence in sequences.take(np.arange(30))]


def test_evaluation_masks_are_not_those_of_training(sequences, collator):
    loader = BatchLoader(sequences, collator, 30, seed=1)
    order = np.argsort([each.index for each in loader.sequences_of(0)])
    (evaluation,) = evaluation_batches(sequences, collator, 30)
    training = loader.batch(0).predicted_positions[order]
    assert not (training == evaluation.predicted_positions).all()


def test_rank_without_a_batch_repeats_the_last_one_without_predictions(sequences, collator):
    alone = list(evaluation_batches(sequences, collator, 7))
    first, second = (list(evaluation_batches(sequences, collator, 7, rank, 2)) for rank in range(2))
    assert [content(batch) for batch in first] == [content(batch) for batch in alone[::2]]
    assert [content(batch) for batch in second[:2]] == [content(batch) for batch in alone[1::2]]
    (*_, last), (*_, repeated) = first, second
    assert (repeated.input_ids == last.input_ids).all()
    assert (repeated.predicted_ids == NOT_PREDICTED).all()
    assert repeated.predicted_ids.shape == last.predicted_ids.shape
    assert repeated.num_tokens == repeated.num_predicted == 0


def prefetch_threads() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name.startswith("prefetch")]


def test_prefetch_yields_everything_in_order_and_leaves_no_thread():
    assert list(prefetch(iter(range(100)), depth=3)) == list(range(100))
    assert prefetch_threads() == []


def test_prefetch_works_ahead_by_its_depth_and_no_further():
    made: list[int] = []
    fourth = threading.Event()

    def numbers() -> Iterator[int]:
        for i in range(100):
            made.append(i)
            if i == 3:
                fourth.set()
            yield i

    ahead = prefetch(numbers(), depth=3)
    assert next(ahead) == 0
    # Taking number 0 made room for number 3, which is computed in advance.
    assert fourth.wait(HUNG)
    ahead.close()
    assert made == [0, 1, 2, 3]


def test_prefetch_that_is_closed_stops_working_ahead(monkeypatch):
    made: list[int] = []
    begun, closing = threading.Event(), threading.Event()
    shutdown = ThreadPoolExecutor.shutdown

    def numbers() -> Iterator[int]:
        yield 0
        begun.set()
        assert closing.wait(HUNG)
        for i in range(1, 100):
            made.append(i)
            yield i

    def shut(self: ThreadPoolExecutor, wait: bool = True, **options: bool) -> None:
        # Closing cancels the others and waits for the number that is being computed.
        shutdown(self, wait=False, **options)
        closing.set()
        shutdown(self, wait=wait)

    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", shut)
    ahead = prefetch(numbers(), depth=50)
    assert next(ahead) == 0
    assert begun.wait(HUNG)
    ahead.close()
    assert made == [1]


def test_prefetch_raises_an_error_in_its_place():
    def failing() -> Iterator[int]:
        yield 1
        yield 2
        raise OSError("the disk is gone")

    ahead = prefetch(failing(), depth=4)
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(ahead)
    assert prefetch_threads() == []


def test_prefetch_that_is_closed_early_leaves_no_thread():
    def endless() -> Iterator[int]:
        while True:
            yield 0

    ahead = prefetch(endless(), depth=2)
    assert next(ahead) == 0
    assert len(prefetch_threads()) == 1
    ahead.close()
    assert prefetch_threads() == []


# Sequences of different length.


@pytest.fixture(scope="module")
def uneven(tmp_path_factory) -> PackedSequences:
    directory = tmp_path_factory.mktemp("uneven")
    lengths = np.random.default_rng(0).integers(1, 60, size=5000)
    (directory / "text.txt").write_text("\n".join("a " * length for length in lengths))
    tokenizer = toy_tokenizer.word_piece()
    return pack_sequences(
        [directory / "text.txt"], tokenizer, 64, packing="none", cache_dir=directory
    )


def fill(batches: list[Batch]) -> float:
    return sum(batch.num_tokens for batch in batches) / sum(b.input_ids.numel() for b in batches)


def test_sequences_of_different_length_are_hardly_padded_and_each_comes_once(uneven, collator):
    collator = dataclasses.replace(collator, packing="none", max_tokens=64)
    for batch_size in (8, 16, 64):
        loader = BatchLoader(uneven, collator, batch_size, seed=1)
        epoch = 5000 // batch_size
        assert sorted(seen(loader, epoch + 1))[:5000] == [(0, i) for i in range(5000)]
        assert fill([loader.batch(k) for k in range(epoch)]) > 0.97
        assert fill(list(evaluation_batches(uneven, collator, batch_size))) > 0.97


def test_order_by_length_is_a_function_of_seed_and_epoch(uneven, collator):
    collator = dataclasses.replace(collator, packing="none", max_tokens=64)
    small, large = (BatchLoader(uneven, collator, size, seed=1) for size in (10, 40))
    assert seen(small, 1000) == seen(large, 250)
    other = BatchLoader(uneven, collator, 40, seed=2)
    orders = {tuple(seen(other, 125)), tuple(seen(large, 125)), tuple(seen(large, 250)[5000:])}
    assert len(orders) == 3
    # Later sequences are not longer than earlier ones.
    lengths = [len(sequence.input_ids) for k in range(125) for sequence in large.sequences_of(k)]
    assert abs(np.mean(lengths[:2500]) - np.mean(lengths[2500:])) < 10


@given(st.integers(1, 300), st.integers(1, 5), st.integers(1, 8))
def test_grouping_is_a_permutation(sequences, chunks, chunk):
    generator = np.random.default_rng(sequences)
    lengths = generator.integers(1, 9, size=sequences)
    order = generator.permutation(sequences)
    grouped = group_by_length(order, lengths, generator, window=chunks * chunk, chunk=chunk)
    assert sorted(grouped.tolist()) == list(range(sequences))
