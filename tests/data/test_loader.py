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

from annotated_mpnet.batch import NOT_PREDICTED, Batch
from annotated_mpnet.config import ObjectiveConfig
from annotated_mpnet.data import (
    BatchLoader,
    DataCollatorForMaskedPermutedLanguageModeling,
    PackedRows,
    Vocabulary,
    evaluation_batches,
    pack_rows,
    prefetch,
)
from annotated_mpnet.data.loader import group_by_length
from waiting import HUNG

MAX_TOKENS = 12


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> PackedRows:
    directory = tmp_path_factory.mktemp("loader")
    generator = np.random.default_rng(0)
    words = ["".join(generator.choice(list("abcdefgh"), size=4)) for _ in range(60)]
    (directory / "text.txt").write_text("\n".join(words) + "\n")
    tokenizer = toy_tokenizer.word_piece()
    packed = pack_rows([directory / "text.txt"], tokenizer, MAX_TOKENS, cache_dir=directory)
    assert len(packed) == 30
    return packed


@pytest.fixture(scope="module")
def collator() -> DataCollatorForMaskedPermutedLanguageModeling:
    vocabulary = Vocabulary.of(toy_tokenizer.word_piece())
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
    """Return (epoch, index) of the rows of the first batches."""
    return [(row.epoch, row.index) for k in range(batches) for row in loader.rows_of(k)]


def test_batch_is_the_same_in_whatever_order_it_is_asked_for(rows, collator):
    first = BatchLoader(rows, collator, 7, seed=1)
    in_order = [content(first.batch(k)) for k in range(20)]
    second = BatchLoader(rows, collator, 7, seed=1)
    for k in np.random.default_rng(0).permutation(20).tolist():
        assert content(second.batch(k)) == in_order[k]


@pytest.mark.parametrize("batch_size", [1, 7, 30, 100])
def test_every_row_comes_once_in_every_epoch(rows, collator, batch_size):
    loader = BatchLoader(rows, collator, batch_size, seed=1)
    positions = seen(loader, 300 // batch_size)
    for epoch in range(len(positions) // 30):
        of_epoch = positions[30 * epoch : 30 * (epoch + 1)]
        assert {row_epoch for row_epoch, _ in of_epoch} == {epoch}
        assert sorted(index for _, index in of_epoch) == list(range(30))


# fault 58
def test_of_13_rows_two_ranks_read_each_once_an_epoch_and_none_waits(
    collator, tmp_path, monkeypatch
):
    words = [a + b for a in "abcdefgh" for b in "abcdefgh"][:13]
    (tmp_path / "text.txt").write_text("\n".join(2 * word for word in words) + "\n")
    packed = pack_rows(
        [tmp_path / "text.txt"], toy_tokenizer.word_piece(), 6, packing="none", cache_dir=tmp_path
    )
    assert len(packed) == 13
    # Which rows they are, instead of what is made of them.
    monkeypatch.setattr(BatchLoader, "batch", BatchLoader.rows_of)
    loaders = [BatchLoader(packed, collator, 2, seed=1, rank=r, world_size=2) for r in range(2)]
    # 13 updates of 2 rows on each rank are 4 epochs, of which three end within an update.
    updates = [islice(loader.updates(0, 1), 13) for loader in loaders]
    read = [
        (row.epoch, row.index)
        for of_all in zip(*updates, strict=True)
        for (rows,), _ in of_all
        for row in rows
    ]
    assert len(read) == 52
    assert sorted(read) == [(epoch, index) for epoch in range(4) for index in range(13)]
    assert [epoch for epoch, _ in read] == sorted(epoch for epoch, _ in read)


def test_order_is_another_one_in_the_next_epoch_and_for_the_next_seed(rows, collator):
    positions = seen(BatchLoader(rows, collator, 30, seed=1), 3)
    orders = [tuple(index for _, index in positions[30 * i : 30 * i + 30]) for i in range(3)]
    other = tuple(index for _, index in seen(BatchLoader(rows, collator, 30, seed=2), 1))
    assert len({*orders, other, tuple(range(30))}) == 5


def test_without_shuffling_the_order_is_natural_in_every_epoch(rows, collator):
    loader = BatchLoader(rows, collator, 7, seed=1, shuffle=False)
    assert seen(loader, 10) == [(p // 30, p % 30) for p in range(70)]


def test_sequence_of_rows_does_not_depend_on_the_batch_size(rows, collator):
    small, large = (BatchLoader(rows, collator, size, seed=1) for size in (4, 8))
    assert seen(small, 30) == seen(large, 15)


def test_rows_are_those_of_the_table(rows, collator):
    for row in BatchLoader(rows, collator, 40, seed=1).rows_of(2):
        assert row.input_ids.tolist() == rows.take(np.array([row.index]))[0].tolist()


def test_evaluation_reads_each_row_once_with_the_same_masks_each_time(rows, collator):
    first, second = (list(evaluation_batches(rows, collator, 8)) for _ in range(2))
    assert [len(batch.input_ids) for batch in first] == [8, 8, 8, 6]
    assert list(map(content, first)) == list(map(content, second))
    restored = []
    for batch in first:
        for ids, positions, originals in zip(
            batch.input_ids, batch.predicted_positions, batch.predicted_ids, strict=True
        ):
            used = originals != NOT_PREDICTED
            ids[positions[used]] = originals[used]
            restored.append(ids[: len(rows.take(np.array([len(restored)]))[0])].tolist())
    assert restored == [row.tolist() for row in rows.take(np.arange(30))]


def test_evaluation_masks_are_not_those_of_training(rows, collator):
    training = BatchLoader(rows, collator, 30, seed=1, shuffle=False).batch(0)
    (evaluation,) = evaluation_batches(rows, collator, 30)
    assert not (training.predicted_positions == evaluation.predicted_positions).all()


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
    # Asking for number 0 made room for number 3, which is made without being asked for.
    assert fourth.wait(HUNG)
    ahead.close()
    assert made == [0, 1, 2, 3]


def test_prefetch_that_is_closed_does_not_make_what_nobody_will_take(monkeypatch):
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
        # Closing waits for the number in the making, which is made when the others are cancelled.
        shutdown(self, wait=False, **options)
        closing.set()
        shutdown(self, wait=wait)

    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", shut)
    ahead = prefetch(numbers(), depth=50)
    assert next(ahead) == 0
    assert begun.wait(HUNG)
    ahead.close()
    assert made == [1]


def test_prefetch_passes_an_error_on_in_its_place():
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


# Rows of different length.


@pytest.fixture(scope="module")
def uneven(tmp_path_factory) -> PackedRows:
    directory = tmp_path_factory.mktemp("uneven")
    lengths = np.random.default_rng(0).integers(1, 60, size=5000)
    (directory / "text.txt").write_text("\n".join("a " * length for length in lengths))
    tokenizer = toy_tokenizer.word_piece()
    return pack_rows([directory / "text.txt"], tokenizer, 64, packing="none", cache_dir=directory)


def fill(batches: list[Batch]) -> float:
    return sum(batch.num_tokens for batch in batches) / sum(b.input_ids.numel() for b in batches)


def test_rows_of_different_length_are_hardly_padded_and_each_comes_once(uneven, collator):
    collator = dataclasses.replace(collator, packing="none", max_tokens=64)
    for batch_size in (8, 16, 64):
        loader = BatchLoader(uneven, collator, batch_size, seed=1)
        epoch = 5000 // batch_size
        assert sorted(seen(loader, epoch + 1))[:5000] == [(0, i) for i in range(5000)]
        assert fill([loader.batch(k) for k in range(epoch)]) > 0.97
        assert fill(list(evaluation_batches(uneven, collator, batch_size))) > 0.97


def test_order_of_rows_of_different_length_is_a_function_of_seed_and_epoch(uneven, collator):
    collator = dataclasses.replace(collator, packing="none", max_tokens=64)
    small, large = (BatchLoader(uneven, collator, size, seed=1) for size in (10, 40))
    assert seen(small, 1000) == seen(large, 250)
    other = BatchLoader(uneven, collator, 40, seed=2)
    orders = {tuple(seen(other, 125)), tuple(seen(large, 125)), tuple(seen(large, 250)[5000:])}
    assert len(orders) == 3
    # Lengths go up and down over an epoch: what comes late is not longer than what comes early.
    lengths = [len(row.input_ids) for k in range(125) for row in large.rows_of(k)]
    assert abs(np.mean(lengths[:2500]) - np.mean(lengths[2500:])) < 10


@given(st.integers(1, 300), st.integers(1, 5), st.integers(1, 8))
def test_grouping_is_a_permutation(rows, chunks, chunk):
    generator = np.random.default_rng(rows)
    lengths = generator.integers(1, 9, size=rows)
    order = generator.permutation(rows)
    grouped = group_by_length(order, lengths, generator, window=chunks * chunk, chunk=chunk)
    assert sorted(grouped.tolist()) == list(range(rows))
