"""Presets: what they set, and whether the numbers in their headers are right."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from annotated_mpnet import cli
from annotated_mpnet.mpnet.config import ModelConfig
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining
from annotated_mpnet.settings.config import PretrainingConfig
from annotated_mpnet.settings.config_file import (
    Header,
    Preset,
    preset_list,
    preset_names,
    read_header,
)
from annotated_mpnet.settings.parsing import parse_pretrain
from annotated_mpnet.training.throughput import training_flops

MPNET_VOCABULARY = 30527
SIZES = {"T": 1e12, "P": 1e15, "G": 1e9, "M": 1e6}

each_preset = pytest.mark.parametrize("name", preset_names())


def settings_of(name: Preset) -> PretrainingConfig:
    settings = parse_pretrain(["--preset", name]).settings
    settings.validate()
    return settings


def model_config(settings: PretrainingConfig, vocab_size: int) -> ModelConfig:
    return ModelConfig(
        **vars(settings.model), vocab_size=vocab_size, max_positions=settings.data.max_tokens
    )


def parameters(settings: PretrainingConfig, vocab_size: int) -> tuple[float, float]:
    """Return the parameters of a network and of its token embedding, in millions."""
    with torch.device("meta"):
        model = MPNetForPretraining(model_config(settings, vocab_size))
    embedding = model.sentence_encoder.embed_tokens.weight
    return sum(each.numel() for each in model.parameters()) / 1e6, embedding.numel() / 1e6


def number_in(text: str, pattern: str) -> float:
    """Return the number that the pattern's group matches."""
    found = re.search(pattern, text)
    assert found, (pattern, text)
    return float(found[1])


def work_and_tokens(settings: PretrainingConfig, vocab_size: int) -> tuple[float, float]:
    """Return the operations and the tokens of a whole run on one device."""
    optimization, length = settings.optimization, settings.data.max_tokens
    sequences = optimization.total_updates * optimization.batch_size * optimization.update_freq
    # `<s>` and `</s>` cannot be predicted.
    predicted = round(settings.objective.pred_prob * (length - 2))
    config = model_config(settings, vocab_size)
    return training_flops(config, "mpnet", 1, length, predicted) * sequences, float(
        sequences * length
    )


@each_preset
def test_a_header_is_complete(name: Preset) -> None:
    header = read_header(name)
    assert all(vars(header).values())
    assert header.command.startswith(f"pretrain-mpnet --preset {name}")
    assert isinstance(header, Header)


@each_preset
def test_the_command_of_a_header_works(name: Preset) -> None:
    command = parse_pretrain(read_header(name).command.split()[1:])
    command.settings.validate()
    assert command.settings.data.train_dir is not None


@each_preset
def test_a_header_gives_the_size_of_the_model(name: Preset) -> None:
    settings, said = settings_of(name), read_header(name).model
    assert number_in(said, r"(\d+) layers") == settings.model.encoder_layers
    assert number_in(said, r"(\d+) wide") == settings.model.encoder_embed_dim
    if name != "demo":
        assert number_in(said, r"sequences of (\d+)") == settings.data.max_tokens
    vocab_size = 8000 if name in ("demo", "tiny") else MPNET_VOCABULARY
    whole, embedding = parameters(settings, vocab_size)
    assert number_in(said, r"([\d.]+) M parameters") == round(whole, 1)
    if "of which" in said:
        assert number_in(said, r"of which ([\d.]+) M") == round(embedding, 1)
    if name == "tiny":
        with_theirs, embedding = parameters(settings, MPNET_VOCABULARY)
        assert number_in(said, r"8,000, ([\d.]+) M") == round(with_theirs, 1)
        assert round(embedding / with_theirs, 1) == 0.7  # "70 % of the parameters"


@pytest.mark.parametrize("name", ["tiny", "small", "base", "continue"])
def test_a_header_gives_the_work_of_the_run(name: Preset) -> None:
    said = read_header(name).cost
    settings = settings_of(name)
    work, tokens = work_and_tokens(settings, 8000 if name == "tiny" else MPNET_VOCABULARY)
    found = re.match(r"(\d+) ([TP])FLOP \(([\d.]+) ([MG]) tokens", said)
    assert found, said
    assert float(found[1]) == round(work / SIZES[found[2]])
    assert float(found[3]) * SIZES[found[4]] == pytest.approx(tokens, rel=0.01)
    # Times are computed for a stated speed; that of `tiny` was measured.
    speeds = {
        "small": 0.35 * 165e12,
        "base": 0.35 * 989e12,
        "continue": 0.35 * 165e12,
    }
    if name in speeds:
        assert number_in(said, r"(\d+)\s+minutes") == round(work / speeds[name] / 60)


def test_the_speed_of_the_demo_is_what_was_measured() -> None:
    work, _ = work_and_tokens(settings_of("demo"), 8000)
    assert round(work / 100 / 1e12, 2) == 0.09  # in about 100 s (docs/log.md)


def test_base_is_the_defaults_and_the_recipe_of_the_paper_is_3200_times_the_work() -> None:
    settings = settings_of("base")
    assert settings == PretrainingConfig()
    work, _ = work_and_tokens(settings, MPNET_VOCABULARY)
    assert round(work / (0.35 * 165e12) / 3600, 1) == 2.2
    batch = settings.optimization.batch_size * settings.optimization.update_freq
    assert 8192 / batch * 500_000 / settings.optimization.total_updates == 3200
    assert 8 * 64 * 16 == 8192  # the flags that the header gives


def test_continue_has_a_learning_rate_between_the_two_ways_of_scaling() -> None:
    settings = settings_of("continue")
    batch = settings.optimization.batch_size * settings.optimization.update_freq
    share = batch / 2048
    assert 5e-4 * share == pytest.approx(3.1e-5, rel=0.02)
    assert 5e-4 * share**0.5 == pytest.approx(1.25e-4)
    assert 5e-4 * share < settings.optimization.lr < 5e-4 * share**0.5


def test_continue_is_resumed_like_any_other_run() -> None:
    settings = parse_pretrain(["--preset=continue", "--resume"]).settings
    settings.validate()
    assert settings.run.initial_weights is None


@pytest.mark.parametrize("name", ["tiny", "small", "continue"])
def test_a_validation_file_replaces_the_presets_fraction(name: Preset) -> None:
    typed = ["--preset", name, "--train-dir", "texts", "--valid-file", "valid.txt"]
    with pytest.raises(Exception, match="--valid-fraction 0 resets"):
        parse_pretrain(typed).settings.validate()
    parse_pretrain([*typed, "--valid-fraction", "0"]).settings.validate()


def test_a_shorter_run_has_a_shorter_warmup_and_says_so() -> None:
    command = parse_pretrain(["--preset", "demo", "--total-updates", "50"])
    assert command.settings.optimization.warmup_updates == 2
    assert command.notes == (
        "warm-up: 2 updates (preset demo: 50 of 1,000, shortened like --total-updates)",
    )
    assert len(command.notes[0]) <= 80
    assert parse_pretrain(["--preset=tiny", "--total-updates=1"]).settings.optimization == (
        dataclasses.replace(settings_of("tiny").optimization, total_updates=1, warmup_updates=1)
    )


def test_a_warmup_that_the_user_gave_stays(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[optimization]\nwarmup_updates = 40\n")
    shorter = ["--preset", "demo", "--total-updates", "50"]
    for more, warmup in (
        (["--warmup-updates", "50"], 50),
        (["--warmup-updates", "None"], None),
        (["--config", str(tmp_path / "mine.toml")], 40),
    ):
        command = parse_pretrain([*shorter, *more])
        assert (command.settings.optimization.warmup_updates, command.notes) == (warmup, ())
    # It is not made longer either.
    assert parse_pretrain(["--preset=demo", "--total-updates=2000"]).notes == ()


def test_a_total_of_a_file_shortens_the_warmup_too(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[optimization]\ntotal_updates = 200\n")
    command = parse_pretrain(["--preset", "demo", "--config", str(tmp_path / "mine.toml")])
    assert command.settings.optimization.warmup_updates == 10


def test_small_sees_as_many_tokens_in_an_update_as_base() -> None:
    tokens = []
    for name in ("small", "base"):
        settings = settings_of(name)
        optimization = settings.optimization
        tokens.append(optimization.batch_size * optimization.update_freq * settings.data.max_tokens)
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("width", [80, 120])
def test_the_list_shows_cost_and_result_of_each_in_the_columns_there_are(width: int) -> None:
    text = preset_list(width)
    assert max(len(line) for line in text.splitlines()) <= width
    whole = " ".join(text.split())
    for name in preset_names():
        header = read_header(name)
        for part in (header.title, header.model, header.cost, header.expected, header.command):
            assert part in whole


def test_asking_for_the_list_prints_it_and_does_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli._ending("pretrain-mpnet", cli._pretrain, ["--preset", "list"]) == 0
    assert capsys.readouterr().out.startswith("demo ")
