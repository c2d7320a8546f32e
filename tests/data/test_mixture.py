"""A mixture gives each text its share, and its order is a function of (data, seed, position)."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import toy_tokenizer

from annotated_mpnet.errors import ConfigError, DataError
from annotated_mpnet.mpnet.collator import DataCollatorForMaskedPermutedLanguageModeling
from annotated_mpnet.mpnet.config import ObjectiveConfig, Packing
from annotated_mpnet.runs.texts import read_text
from annotated_mpnet.settings.config import DataConfig, PretrainingConfig
from annotated_mpnet.settings.config_file import arguments_from_toml, to_toml
from annotated_mpnet.settings.parsing import parse_pretrain
from annotated_mpnet.text.frequencies import token_counts
from annotated_mpnet.text.mixture import Mixture, turns_of
from annotated_mpnet.text.packing import pack_sequences
from annotated_mpnet.text.sequences import PackedSequences
from annotated_mpnet.text.tokenizer import vocabulary_of, write_tokenizer
from annotated_mpnet.training.loader import CHUNK, BatchLoader

MAX_TOKENS = 12


def packed(directory: Path, letters: str, documents: int, packing: Packing) -> PackedSequences:
    generator = np.random.default_rng(0)
    lines = ["".join(generator.choice(list(letters), size=4)) for _ in range(documents)]
    file = directory / f"{letters}.txt"
    file.write_text("\n".join(lines) + "\n")
    tokenizer = toy_tokenizer.word_piece()
    return pack_sequences([file], tokenizer, MAX_TOKENS, packing=packing, cache_dir=directory)


def mixture_of(directory: Path, packing: Packing = "full") -> Mixture:
    """Mix 60 and 20 documents, three to one."""
    parts = [packed(directory, "abcd", 60, packing), packed(directory, "efgh", 20, packing)]
    return Mixture(parts, (3, 1))


def loader_of(mixture: Mixture, batch_size: int, packing: Packing = "full") -> BatchLoader:
    collator = DataCollatorForMaskedPermutedLanguageModeling(
        vocabulary_of(toy_tokenizer.word_piece()),
        ObjectiveConfig(),
        MAX_TOKENS,
        seed=3,
        packing=packing,
    )
    return BatchLoader(mixture, collator, batch_size, seed=1)


def test_each_text_has_its_share_and_reads_its_sequences_equally_often(tmp_path: Path) -> None:
    mixture = mixture_of(tmp_path)
    first, second = map(len, mixture.parts)
    assert mixture.turns == (750, 250)
    read = loader_of(mixture, 1000).sequences_of(0) + loader_of(mixture, 1000).sequences_of(1)
    for start in (0, 1000):
        assert sum(each.index < first for each in read[start : start + 1000]) == 750
    for begin, size in ((0, first), (first, second)):
        own = [each for each in read if begin <= each.index < begin + size]
        for epoch in range(len(own) // size):
            of_epoch = own[epoch * size : (epoch + 1) * size]
            assert {each.epoch for each in of_epoch} == {epoch}
            indices = [each.index for each in of_epoch]
            assert sorted(indices) == list(range(begin, begin + size))
            assert indices != sorted(indices)
    for each in read[:50]:
        own = mixture.take(np.array([each.index]))[0]
        assert each.input_ids.tolist() == own.tolist()


@pytest.mark.parametrize("packing", ["full", "none"])
def test_the_order_is_a_function_of_the_position(tmp_path: Path, packing: Packing) -> None:
    mixture = mixture_of(tmp_path, packing)
    at_once = loader_of(mixture, 960, packing).sequences_of(1)
    later = [loader_of(mixture, 96, packing).sequences_of(k) for k in (19, 12, 10)]
    for k, batch in zip((9, 2, 0), later, strict=True):
        there = at_once[96 * k : 96 * (k + 1)]
        assert [(each.epoch, each.index) for each in batch] == [
            (each.epoch, each.index) for each in there
        ]
    other = dataclasses.replace(loader_of(mixture, 960, packing), seed=2).sequences_of(1)
    assert [each.index for each in other] != [each.index for each in at_once]


def test_sequences_of_similar_length_stay_together(tmp_path: Path) -> None:
    mixture = mixture_of(tmp_path, "none")
    read = loader_of(mixture, 20 * CHUNK, "none").sequences_of(0)
    parts = [each.index < len(mixture.parts[0]) for each in read]
    chunks = [parts[start : start + CHUNK] for start in range(0, len(parts), CHUNK)]
    assert all(len(set(chunk)) == 1 for chunk in chunks)
    assert len({chunk[0] for chunk in chunks}) == 2


def test_frequencies_are_those_of_the_mixture(tmp_path: Path) -> None:
    parts = [packed(tmp_path, "abcd", 40, "full"), packed(tmp_path, "efgh", 400, "full")]
    vocabulary = vocabulary_of(toy_tokenizer.word_piece())

    def share_of_first(text: PackedSequences) -> float:
        counts_V = token_counts(text, vocabulary.is_special_V)
        return float(counts_V[token_counts(parts[0], vocabulary.is_special_V) > 0].sum()) / float(
            counts_V.sum()
        )

    assert share_of_first(Mixture(parts, (3, 1))) == pytest.approx(0.75, abs=0.1)
    assert share_of_first(Mixture(parts, (1, 9))) < 0.3


def test_the_fingerprint_names_texts_and_shares(tmp_path: Path) -> None:
    parts = mixture_of(tmp_path).parts
    same = {Mixture(parts, weights).fingerprint for weights in ((3, 1), (6, 2), (0.75, 0.25))}
    other = {Mixture(parts, (1, 3)).fingerprint, Mixture(parts[::-1], (3, 1)).fingerprint}
    assert len(same) == 1
    assert len(same | other) == 3


def test_turns_add_up_however_odd_the_weights(tmp_path: Path) -> None:
    for weights in ((1, 1, 1), (1e-6, 1e6), (0.1,) * 7, (5,), tuple(range(1, 40))):
        turns = turns_of(weights)
        assert sum(turns) == 1000
        assert min(turns) >= 1
        for each, weight in zip(turns, weights, strict=True):
            assert abs(each - 1000 * weight / sum(weights)) < 1.5


# From the command line.


def data_of(directory: Path, **changes: object) -> DataConfig:
    """Write two directories that share a document."""
    for name, lines in (("a", "abcd aabb\nbbaa cc\nshared ab\n"), ("b", "efgh eeff\nshared ab\n")):
        (directory / name).mkdir(exist_ok=True)
        (directory / name / "text.txt").write_text(lines)
    write_tokenizer(toy_tokenizer.word_piece(), directory / "tokenizer")
    values = {
        "train_dir": (directory / "a", directory / "b"),
        "tokenizer_name": str(directory / "tokenizer"),
        "max_tokens": MAX_TOKENS,
    }
    return DataConfig(**{**values, **changes})  # type: ignore[arg-type]


def test_several_paths_are_one_text_and_with_weights_a_mixture(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    text = read_text(data_of(tmp_path), seed=1)
    assert not isinstance(text.train, Mixture)
    assert "5 documents in 2 files" in str(text.train.report)  # type: ignore[union-attr]
    mixed = read_text(data_of(tmp_path, train_weights=(1.0, 1.0)), seed=1).train
    assert isinstance(mixed, Mixture)
    assert "5 documents in 2 files" in str(mixed.report)
    assert [part.report.counts.documents for part in mixed.parts] == [3, 2]


def test_held_out_text_is_left_out_of_every_part(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "valid.txt").write_text("shared ab\n")
    data = data_of(tmp_path, train_weights=(1.0, 1.0), valid_file=tmp_path / "valid.txt")
    mixed = read_text(data, seed=1).train
    assert isinstance(mixed, Mixture)
    assert [part.report.counts.left_out for part in mixed.parts] == [1, 1]


def test_a_file_in_two_paths_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    for weights in (None, (1.0, 1.0)):
        twice = (tmp_path / "a", tmp_path / "a" / "text.txt")
        with pytest.raises(DataError, match=r"text\.txt' is in two paths of --train-dir"):
            read_text(data_of(tmp_path, train_dir=twice, train_weights=weights), seed=1)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("--train-dir a b --train-weights 3", "has 1 numbers for 2 paths of --train-dir"),
        ("--train-weights 3 1", "has 2 numbers for 0 paths"),
        ("--train-dir a b --train-weights 3 0", "is 3.0 0.0; expected numbers > 0"),
        ("--train-dir a b --train-weights 3 nan", "is 3.0 nan; expected numbers > 0"),
        ("--train-dir a b --train-weights 3 x", "--train-weights is 'x'; expected a number"),
        ("--train-dir a --train-weights", "--train-weights has no value"),
        ("--train-dir a --train-dir b", "given twice"),
    ],
)
def test_weights_that_cannot_be_are_refused(typed: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_pretrain(typed.split()).settings.validate()
    assert said in str(caught.value)


def test_paths_and_weights_come_back_from_a_file(tmp_path: Path) -> None:
    data = DataConfig(train_dir=(Path("a b"), Path("-c")), train_weights=(3.0, 0.5))
    arguments = arguments_from_toml(to_toml(PretrainingConfig(data=data)), "test")
    again = parse_pretrain(arguments).settings.data
    assert again == dataclasses.replace(data, train_dir=(Path("a b"), Path("./-c")))
    # A single path stays a single path, typed or in a list.
    for one in (["--train-dir", "a"], arguments_from_toml('[data]\ntrain_dir = ["a"]', "test")):
        assert parse_pretrain(one).settings.data.train_dir == Path("a")
    with pytest.raises(ConfigError, match="empty list"):
        arguments_from_toml("[data]\ntrain_dir = []", "test")
