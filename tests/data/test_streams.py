"""Streams lose and repeat nothing: over ranks, epochs, resumes, and a network that fails."""

import dataclasses
import itertools
import random
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from fake_shards import (
    SEED,
    TOKENIZER,
    ListShards,
    hash_of,
    in_memory,
    loader_from,
    stream_from,
    text_of,
    through_a_checkpoint,
    write_shards,
)

from annotated_mpnet.errors import CheckpointError, DataError
from annotated_mpnet.settings.config import DataConfig
from annotated_mpnet.streams.eval_samples import EvalSamples, choose_eval_samples
from annotated_mpnet.streams.hub import open_stream
from annotated_mpnet.streams.reservoir import StreamState
from annotated_mpnet.streams.shards import MOST_FAILURES, Position, ShardReader
from annotated_mpnet.streams.streams import SequenceStream
from annotated_mpnet.text.counts import Counts
from annotated_mpnet.text.hold_out import text_hash

CLS, SEP = TOKENIZER.convert_tokens_to_ids(["<s>", "</s>"])


def hashes(samples: EvalSamples) -> frozenset[int]:
    return frozenset(map(text_hash, (*samples.valid.texts, *samples.test.texts)))


def take(stream: SequenceStream, count: int, state: StreamState | None = None):
    """Return the next sequences, as (tokens, index), and the state after them."""
    reader = stream.reader
    cursor = stream.begin(state or StreamState(reader.rank, reader.world_size))
    taken = [cursor.take() for _ in range(count)]
    return [(sequence.input_ids.tolist(), sequence.index) for sequence in taken], cursor.state


def until_epoch(stream: SequenceStream, epoch: int) -> tuple[list[list[int]], StreamState]:
    """Return all sequences before the reader starts an epoch, and the state there."""
    reader = stream.reader
    cursor = stream.begin(StreamState(reader.rank, reader.world_size))
    taken = []
    while cursor.state.position.epoch < epoch:
        taken.append(cursor.take().input_ids.tolist())
    return taken, cursor.state


def documents_of(sequences: list[list[int]]) -> list[str]:
    """Return the text of sequences made with --packing none, each a whole document."""
    return [" ".join(TOKENIZER.convert_ids_to_tokens(sequence[1:-1])) for sequence in sequences]


def read_an_epoch(reader: ShardReader, epoch: int = 0) -> list[object]:
    """Return what a rank reads in an epoch."""
    steps = reader.read(Position(epoch))
    within = itertools.takewhile(lambda step: step[1].epoch == epoch, steps)
    return [value for values, _ in within for value in values]


@pytest.mark.parametrize("packing", ["full", "none", "documents"])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_resumed_stream_delivers_the_sequences_of_the_uninterrupted_one(
    tmp_path, kind, world_size, packing
):
    write_shards(tmp_path / "d", [23, 10, 19], kind)
    chance = random.Random(f"{kind} {world_size} {packing}")

    def opened(rank: int) -> SequenceStream:
        dataset = open_stream(DataConfig(dataset_name=str(tmp_path / "d")))
        return stream_from(dataset, rank, world_size, packing=packing)

    for rank in range(world_size):
        stream = opened(rank)
        count = len(until_epoch(stream, 2)[0])
        whole, _ = take(stream, count + 20)
        for _ in range(7):
            # Opened again, as in a new process, and interrupted three times.
            stream, state, resumed = opened(rank), None, []
            for stop in sorted(chance.sample(range(1, count), 3)):
                part, state = take(stream, stop - len(resumed), state)
                resumed += part
                state = through_a_checkpoint(state)
            part, _ = take(stream, count + 20 - len(resumed), state)
            assert resumed + part == whole
        assert [index % world_size for _, index in whole] == [rank] * len(whole)


@pytest.mark.parametrize("world_size", [1, 2])
def test_resumed_stream_makes_identical_batches(world_size):
    seen = set()
    for rank in range(world_size):

        def updates(first: int, state: StreamState | None, rank: int = rank):
            stream = stream_from(in_memory([30, 17]), rank, world_size)
            return loader_from(stream).updates(first, 2, state)

        whole = [hash_of(batches) for batches, _ in islice(updates(0, None), 30)]
        seen |= set(whole)
        for stop in (1, 5, 6, 13, 29):
            *_, (_, state) = islice(updates(0, None), stop)
            resumed = updates(stop, through_a_checkpoint(state))
            assert [hash_of(batches) for batches, _ in islice(resumed, 30 - stop)] == whole[stop:]
    assert len(seen) == 30 * world_size


def test_state_is_that_after_the_update_and_not_after_what_was_built_ahead():
    updates = loader_from(stream_from(in_memory([30]))).updates(0, 2)
    states = [state for _, state in islice(updates, 5)]
    assert [state.delivered for state in states] == [6, 12, 18, 24, 30]


@pytest.mark.parametrize("sizes", [[13], [9, 4], [5, 1, 7], [0, 6, 0, 7], [1] * 13])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_each_document_comes_once_in_each_epoch_over_all_ranks(tmp_path, kind, sizes, world_size):
    if kind == "parquet" and 0 in sizes:
        pytest.skip("datasets 5.2 cannot read a Parquet file without a row")
    texts = write_shards(tmp_path / "d", sizes, kind)
    stream = open_stream(DataConfig(dataset_name=str(tmp_path / "d")))
    orders = []
    for epoch in range(2):
        readers = [ShardReader(stream, SEED, rank, world_size) for rank in range(world_size)]
        orders.append([text for reader in readers for text in read_an_epoch(reader, epoch)])
        assert sorted(orders[-1]) == sorted(texts)
    if len(sizes) > 4:
        assert orders[0] != orders[1]


@pytest.mark.parametrize("buffer_size", [1, 5, 10_000])
@pytest.mark.parametrize("packing", ["full", "none", "documents"])
def test_reservoir_and_packing_lose_and_repeat_nothing(buffer_size, packing):
    stream = stream_from(in_memory([20, 9]), buffer_size=buffer_size, packing=packing)
    taken, state = until_epoch(stream, 3)
    waiting = [sequence.tolist() for sequence in (*state.reservoir, *state.pending)]
    tokens = Counter(
        token for sequence in (*taken, *waiting, state.remainder.tolist()) for token in sequence
    )
    del tokens[CLS], tokens[SEP]
    ids = TOKENIZER([text_of(i) for i in range(29)], add_special_tokens=False)["input_ids"]
    assert state.counts.documents >= 3 * 29
    # The reader has read a few documents of epoch 3.
    extra = state.counts.documents - 3 * 29
    order = read_an_epoch(stream.reader, 3)[:extra]
    more = TOKENIZER(order, add_special_tokens=False)["input_ids"] if order else []
    assert tokens == Counter(token for document in [*ids * 3, *more] for token in document)


def test_small_dataset_is_shuffled_as_a_whole_and_never_starves():
    stream = stream_from(in_memory([8, 4]), buffer_size=10_000, packing="none")
    taken, state = take(stream, 200)
    assert len(state.reservoir) == 12
    counts = Counter(documents_of([sequence for sequence, _ in taken]))
    assert set(counts) == {text_of(i) for i in range(12)}
    assert max(counts.values()) - min(counts.values()) < 8


def test_dataset_of_less_than_a_sequence_fills_it_over_several_epochs():
    stream = stream_from(ListShards([[["a b"]]]))
    (first, *_), state = take(stream, 3)
    a, b = TOKENIZER.convert_tokens_to_ids(["a", "b"])
    assert first[0] == [CLS, a, b, SEP, a, b, SEP, a, b, SEP, a, SEP]
    assert len(state.reservoir) == 1


def test_sequences_cross_the_end_of_an_epoch_as_drawn():
    shards = ListShards([[["a b c d e", "f g"]]], at_once=1)
    taken, _ = take(stream_from(shards, max_tokens=7, buffer_size=1), 3)
    assert [" ".join(TOKENIZER.convert_ids_to_tokens(sequence)) for sequence, _ in taken] == [
        "<s> a b c d e </s>",
        "<s> </s> f g </s> a </s>",
        "<s> b c d e </s> </s>",
    ]


def test_neighbours_in_a_file_are_apart_in_the_stream():
    stream = stream_from(in_memory([400]), buffer_size=100, packing="none")
    taken, _ = take(stream, 300)
    numbers = {text_of(i): i for i in range(400)}
    order = np.array([numbers[text] for text in documents_of([sequence for sequence, _ in taken])])
    assert np.abs(np.diff(order)).mean() > 30


def test_resume_reads_at_most_what_was_not_read():
    """After 2000 documents in parts of 7 rows, nothing is read twice."""
    shards = in_memory([3000])
    _, state = take(stream_from(shards, packing="none"), 2000)
    read_before, shards.handed = shards.handed, 0
    take(stream_from(shards, packing="none"), 1, through_a_checkpoint(state))
    assert shards.handed <= shards.at_once
    assert read_before - 2000 <= 5 + shards.at_once


def test_resume_in_a_parquet_file_opens_only_the_part_it_needs(tmp_path, monkeypatch):
    write_shards(tmp_path / "d", [700], "parquet")
    stream = open_stream(DataConfig(dataset_name=str(tmp_path / "d")))
    steps = ShardReader(stream, SEED).read(Position(0, 0, part=95, row=4))
    assert next(steps)[0] == [text_of(i) for i in range(95 * 7 + 4, 96 * 7)]
    assert stream.num_parts(0) == 100


def failing(error: Exception, every: int, times: int = 10**9):
    """Return a function that raises at every n-th value, at most so many times."""
    calls = itertools.count(1)
    left = iter(range(times))

    def broken(shard: int, part: int, row: int) -> None:
        if next(calls) % every == 0 and next(left, None) is not None:
            raise error

    return broken


class ReadTimeoutError(Exception):
    __module__ = "urllib3.exceptions"


class HubError(OSError):
    def __init__(self, status: int) -> None:
        super().__init__(f"{status} from the Hub")
        self.response = type("Response", (), {"status_code": status})()


def wrapped() -> Exception:
    error = RuntimeError("could not read the file")
    error.__cause__ = ConnectionResetError("reset by peer")
    return error


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("gone"),
        TimeoutError("slow"),
        HubError(502),
        HubError(429),
        ReadTimeoutError("slow"),
        OSError("no number"),
        wrapped(),
    ],
    ids=repr,
)
def test_network_errors_lose_and_repeat_nothing(error):
    pauses: list[float] = []
    whole, _ = take(stream_from(in_memory([30, 17])), 40)
    unreliable = in_memory([30, 17], broken=failing(error, every=3))
    resumed, _ = take(stream_from(unreliable, sleep=pauses.append), 40)
    assert resumed == whole
    assert len(pauses) > 10
    assert set(pauses) == {1.0}


def test_network_that_is_gone_for_good_ends_with_an_error_and_growing_pauses():
    pauses: list[float] = []
    shards = in_memory([30], broken=failing(ConnectionError("gone\nfor good"), every=1))
    with pytest.raises(
        DataError, match=r"failed 9 times in a row .* 'gone\\nfor good'; .*--resume"
    ):
        take(stream_from(shards, sleep=pauses.append), 1)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    assert len(pauses) == MOST_FAILURES


@pytest.mark.parametrize(
    "error", [ValueError("bad row"), HubError(404), FileNotFoundError(2, "no such file")], ids=repr
)
def test_other_errors_are_not_tried_again_and_name_the_shard(error):
    pauses: list[float] = []
    shards = in_memory([30], broken=failing(error, every=4))
    with pytest.raises(DataError, match=r"shard 0 of documents in memory cannot be read: "):
        take(stream_from(shards, sleep=pauses.append), 40)
    assert pauses == []


def test_state_where_the_network_broke_resumes_with_the_same_sequence():
    whole, _ = take(stream_from(in_memory([30, 17])), 40)
    shards = in_memory([30, 17], broken=failing(ConnectionError("gone"), every=1, times=0))
    updates = loader_from(stream_from(shards, sleep=lambda _: None)).updates(0, 2)
    good = [next(updates)]
    shards.broken = failing(ConnectionError("gone"), every=1)
    with pytest.raises(DataError, match="network failed"):
        good.extend(updates)
    _, state = good[-1]
    rest, _ = take(stream_from(in_memory([30, 17])), 40 - state.delivered, state)
    assert rest == whole[state.delivered :]


def test_values_that_are_not_text_are_skipped_and_counted():
    odd: list[object] = [None, 3, ["a"], "", " ", "a b", "long enough", 2.5, {"a": 1}, "ç é ü ñ ö"]
    documents, counts = stream_from(in_memory([1]), min_text_length=5).documents(odd)
    assert len(documents) == counts.documents == 1
    assert (counts.not_text, counts.blank, counts.too_short) == (5, 2, 1)
    assert (counts.unpredictable, counts.rows_read) == (1, 10)
    assert str(counts) == (
        "1 documents; dropped: 2 blank rows, 5 rows without text, 1 short texts, "
        "1 documents without a predictable token"
    )


def test_column_without_text_is_refused_after_a_thousand_rows():
    values = [*["a b c"] * 50, *[None] * 5000]
    shards = ListShards([[values]], at_once=100)
    with pytest.raises(DataError, match=r"1,050 of 1,100 rows of .* no text; .*--text-field"):
        take(stream_from(shards), 100)
    assert shards.handed == 1100


@pytest.mark.parametrize(
    ("parts", "options"),
    [
        ([[["a b c", "d e f"]]], {"min_text_length": 64}),
        ([[[None] * 20]], {}),
        ([[[]], [[]]], {}),
        ([[]], {}),
        ([[["a b c"] * 9]], {"held_out": frozenset({text_hash("a b c")})}),
    ],
)
def test_stream_of_which_nothing_is_left_ends_after_one_epoch(parts, options):
    shards = ListShards(parts)
    with pytest.raises(DataError, match=r"nothing to train on in the whole of"):
        take(stream_from(shards, **options), 1)
    assert shards.handed == sum(len(part) for shard in parts for part in shard)


def test_rank_without_a_document_says_so():
    with pytest.raises(DataError, match="for rank 1 of 2: 0 documents"):
        take(stream_from(ListShards([[["a b c"]]]), rank=1, world_size=2), 1)


@pytest.mark.parametrize("world_size", [1, 2])
def test_held_out_documents_and_their_copies_are_never_trained_on(world_size):
    texts = [text_of(i) for i in range(150)]
    corpus = [*texts, *texts[::3], *texts[::5]]
    random.Random(0).shuffle(corpus)
    shards = ListShards([[corpus[i : i + 7]] for i in range(0, len(corpus), 7)])
    chosen = []
    trained: set[str] = set()
    for rank in range(world_size):
        reader = ShardReader(shards, SEED, rank, world_size)
        chosen.append(choose_eval_samples(reader, 10, min_text_length=0))
        stream = stream_from(shards, rank, world_size, held_out=hashes(chosen[-1]), packing="none")
        taken, state = until_epoch(stream, 2)
        assert state.counts.held_out > 0
        trained |= set(documents_of(taken))
        trained |= set(documents_of([sequence.tolist() for sequence in state.reservoir]))
    assert all(each == chosen[0] for each in chosen)
    valid, test = chosen[0].valid.texts, chosen[0].test.texts
    assert len(set(valid)) == len(set(test)) == 10
    assert set(valid) | set(test) | trained == set(texts)
    assert not set(valid) & set(test)
    assert not (set(valid) | set(test)) & trained


def test_eval_samples_have_the_lowest_hashes_and_look_only_at_the_beginning():
    shards = in_memory([100] * 40)
    samples = choose_eval_samples(ShardReader(shards, seed=1), 20, min_text_length=8)
    assert 16 * 40 <= shards.handed < 4000
    assert all(len(text) >= 8 for text in samples.valid.texts)
    again = choose_eval_samples(ShardReader(in_memory([100] * 40), seed=2), 20, min_text_length=8)
    assert again == samples
    hashes = [text_hash(text) for text in (*samples.valid.texts, *samples.test.texts)]
    assert hashes == sorted(hashes)
    counts = Counts()
    assert tuple(samples.test.documents(counts)) == samples.test.texts
    assert counts.documents == 20
    assert samples.valid.fingerprint != samples.test.fingerprint


@pytest.mark.parametrize(("documents", "fits"), [(40, False), (41, True)])
def test_holding_out_half_of_the_documents_is_refused(documents, fits):
    reader = ShardReader(in_memory([documents]), SEED)
    if fits:
        assert len(hashes(choose_eval_samples(reader, 10, 0))) == 20
    else:
        with pytest.raises(DataError, match=r"--eval-samples 10 .* of the 40 .* less than 10"):
            choose_eval_samples(reader, 10, 0)


def test_no_eval_samples_read_nothing():
    shards = in_memory([10])
    assert hashes(choose_eval_samples(ShardReader(shards, SEED), 0, 0)) == frozenset()
    assert shards.handed == 0


def test_text_never_yields_special_tokens():
    taken, _ = take(stream_from(ListShards([[["a <mask> b </s> c <s> <pad> d"] * 5]])), 3)
    special = set(TOKENIZER.convert_tokens_to_ids(["<s>", "<pad>", "<mask>"]))
    assert not special & {token for sequence, _ in taken for token in sequence[1:-1]}


def test_documents_that_fit_share_a_sequence_whole():
    shards = ListShards([[["a b c", "d e f g h i", "j k", "l"]]], at_once=4)
    taken, _ = take(stream_from(shards, packing="documents", buffer_size=1), 2)
    assert [" ".join(TOKENIZER.convert_ids_to_tokens(sequence)) for sequence, _ in taken] == [
        "<s> a b c </s> <s> l </s>",
        "<s> d e f g h i </s> <s> j k </s>",
    ]


def test_long_document_continues_in_further_sequences():
    words = [*"abcdefghij", *"klmnopqrst", "u"]
    stream = stream_from(ListShards([[[" ".join(words)]]]), packing="none", buffer_size=1)
    taken, _ = take(stream, 3)
    assert [len(sequence) for sequence, _ in taken] == [12, 12, 3]
    tokens = [token for sequence, _ in taken for token in sequence[1:-1]]
    assert TOKENIZER.convert_ids_to_tokens(tokens) == words


def test_state_of_another_number_of_ranks_is_refused_and_can_be_restarted():
    _, state = take(stream_from(in_memory([30, 17]), rank=1, world_size=2), 7)
    with pytest.raises(CheckpointError, match=r"rank 1 of 2, .* rank 0 of 1.*world-size"):
        stream_from(in_memory([30, 17])).begin(state)
    restarted = state.restarted(rank=0, world_size=1)
    taken, after = take(stream_from(in_memory([30, 17])), 5, restarted)
    assert [index for _, index in taken] == [14, 15, 16, 17, 18]
    assert after.position.epoch >= state.position.epoch + 1


def test_masks_do_not_repeat_when_a_run_changes_to_another_dataset():
    updates = loader_from(stream_from(in_memory([30]))).updates(4, 2)
    assert next(updates)[1].delivered == 5 * 2 * 3


def test_damaged_state_is_refused():
    _, state = take(stream_from(in_memory([30])), 7)
    values, arrays = state.to_parts()
    damage = [
        ({"format": 99}, {}),
        ({"delivered": -1}, {}),
        ({"rank": True}, {}),
        ({"surprise": 1}, {}),
        ({"position": {"epoch": 0}}, {}),
        ({"counts": None}, {}),
        ({}, {"remainder": np.zeros(3)}),
        ({}, {"reservoir_ids": arrays["reservoir_ids"][:-1]}),
        ({}, {"surprise": np.zeros(3, np.int32)}),
    ]
    for wrong_values, wrong_arrays in damage:
        with pytest.raises(CheckpointError, match="state of the stream"):
            StreamState.from_parts({**values, **wrong_values}, {**arrays, **wrong_arrays})


def test_state_survives_being_taken_apart():
    _, state = take(stream_from(in_memory([30])), 7)
    again = through_a_checkpoint(state)
    for each in dataclasses.fields(StreamState):
        before, after = getattr(state, each.name), getattr(again, each.name)
        if isinstance(before, tuple):
            assert [sequence.tolist() for sequence in before] == [
                sequence.tolist() for sequence in after
            ]
        else:
            assert np.array_equal(before, after), each.name
    nothing = through_a_checkpoint(StreamState())
    assert (nothing.reservoir, nothing.pending, len(nothing.remainder)) == ((), (), 0)


def test_waiting_sequences_do_not_keep_their_neighbours_in_memory():
    _, state = take(stream_from(in_memory([200])), 50)
    assert all(
        sequence.base is None for sequence in (*state.reservoir, *state.pending, state.remainder)
    )
