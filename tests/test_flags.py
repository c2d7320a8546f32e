"""The flags with their defaults and aliases, which old command lines rely on.

The table is written by hand on purpose: generated from the dataclasses, it would repeat their
mistakes.
"""

import dataclasses
from pathlib import Path

import pytest

from annotated_mpnet.errors import ConfigError
from annotated_mpnet.settings.commands import (
    ConvertCommand,
    ExplainCommand,
    PretrainCommand,
    TokenizerCommand,
)
from annotated_mpnet.settings.config import PretrainingConfig, fields_of
from annotated_mpnet.settings.fields import all_settings
from annotated_mpnet.settings.foreign_flags import NEARLY, SAME
from annotated_mpnet.settings.parsing import parse, parse_pretrain

# Flag: (default, another value, aliases).
PRETRAIN = {
    # Flags of annotated-mpnet.
    "--dataset-name": (None, "some/dataset", []),
    "--text-field": ("text", "body", []),
    "--buffer-size": (10000, 7, []),
    "--eval-samples": (500, 7, []),
    "--min-text-length": (64, 7, []),
    "--train-dir": (None, Path("texts"), []),
    "--train-weights": (None, (3.0,), []),
    "--valid-file": (None, Path("valid.txt"), []),
    "--test-file": (None, Path("test.txt"), []),
    "--tokenizer-name": (None, "my_tokenizer", []),
    "--max-tokens": (512, 128, []),
    "--max-positions": (None, 1024, []),
    "--encoder-layers": (12, 6, []),
    "--encoder-embed-dim": (768, 384, []),
    "--encoder-ffn-dim": (3072, 1536, []),
    "--encoder-attention-heads": (12, 6, []),
    "--dropout": (0.1, 0.0, []),
    "--attention-dropout": (0.1, 0.0, []),
    "--activation-dropout": (0.1, 0.0, []),
    "--activation-fn": ("gelu", "relu", ["-activation"]),
    "--normalize-before": (False, True, ["-prenorm"]),
    "--relative-attention-num-buckets": (32, 64, ["-num_buckets"]),
    "--relative-attention-max-distance": (128, 256, []),
    "--batch-size": (16, 32, []),
    "--update-freq": (8, 2, ["-gc_steps"]),
    "--gradient-checkpointing": (False, True, []),
    "--optimizer": ("adamw", "muon", []),
    "--lr": (6e-4, 1e-4, []),
    "--muon-lr": (None, 4e-3, []),
    "--end-learning-rate": (0.0, 1e-6, ["-end_lr"]),
    "--schedule": ("polynomial", "wsd", []),
    "--decay-updates": (None, 500, []),
    "--power": (1.0, 2.0, []),
    "--warmup-updates": (None, 100, ["-warmup_steps"]),
    "--total-updates": (10000, 500, []),
    "--beta1": (0.9, 0.8, []),
    "--beta2": (0.98, 0.999, []),
    "--adam-eps": (1e-6, 1e-8, []),
    "--weight-decay": (0.01, 0.1, ["-wd"]),
    "--clip-grad-norm": (1.0, 5.0, ["-grad_clip"]),
    "--checkpoint-dir": (Path("checkpoints"), Path("elsewhere"), []),
    "--checkpoint-interval": (-1, 100, ["--save-steps", "--save_steps"]),
    "--keep-checkpoints": (-1, 3, []),
    "--save-optimizer-state": (True, False, []),
    "--resume": (False, True, []),
    "--autoresume": (False, True, []),
    "--resume-checkpoint": (None, Path("checkpoints/checkpoint5"), []),
    "--trust-checkpoint": (False, True, []),
    "--hf-model-path": (None, "some/model", []),
    "--eval-interval-steps": (None, 100, []),
    "--logging-steps": (25, 5, []),
    "--tensorboard-log-dir": (None, Path("logs"), ["-log_dir"]),
    "--wandb": (False, True, []),
    "--wandb-project": ("annotated-mpnet", "mine", []),
    "--wandb-name": (None, "try", []),
    "--wandb-id": (None, "abc", []),
    "--wandb-watch": (False, True, []),
    "--num-workers": (0, 4, []),
    "--compile": (False, True, []),
    "--cuda-graph": (True, False, []),
    "--seed": (12345, 0, []),
    "--debug": (False, True, []),
    # New flags.
    "--preset": (None, "demo", []),
    "--config": (None, Path("mine.toml"), []),
    "--print-config": (False, True, []),
    "--dry-run": (False, True, []),
    "--device": ("auto", "cpu", []),
    "--precision": ("auto", "bf16", []),
    "--attention": ("auto", "eager", []),
    "--input-mode": ("mpnet", "plm", []),
    "--pred-prob": (0.15, 0.2, []),
    "--keep-prob": (0.1, 0.0, []),
    "--rand-prob": (0.1, 0.0, []),
    "--whole-word-mask": (True, False, []),
    "--position-embedding": ("learned", "sinusoidal", []),
    "--packing": ("full", "documents", []),
    "--dataset-config": (None, "english", []),
    "--dataset-split": ("train", "validation", []),
    "--dataset-revision": (None, "main", []),
    "--streaming": (True, False, []),
    "--valid-fraction": (0.0, 0.01, []),
    "--allow-change": ("", "data,seed", []),
    "--fsdp": (False, True, []),
    "--overwrite": (False, True, []),
    "--export-hf": (True, False, []),
    "--layer-norm-eps": (1e-5, 1e-12, []),
    "--head-bias": ("auto", "frequencies", []),
    "--relative-bias-init": ("auto", "normal", []),
    "--distributed-timeout": (1800, 60, []),
}

CONVERT = {
    "--mpnet-checkpoint-path": dataclasses.MISSING,
    "--hf-model-folder-path": dataclasses.MISSING,
    "--save-tokenizer": True,
    "--overwrite": False,
    "--pytorch-bin": False,
    "--push-to-hub": None,
    "--private": False,
    "--debug": False,
}

ALIASES = [(flag, alias) for flag, (*_, others) in PRETRAIN.items() for alias in others]


def value_of(command: PretrainCommand, flag: str) -> object:
    name = flag.removeprefix("--").replace("-", "_")
    groups = [command, *vars(command.settings).values()]
    (value,) = [vars(group)[name] for group in groups if name in vars(group)]
    return value


def as_typed(flag: str, value: object) -> list[str]:
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    return [flag, *map(str, value if isinstance(value, tuple) else (value,))]


def test_there_are_these_flags_with_these_defaults_and_spellings() -> None:
    settings = {each.flag: each for each in all_settings(PretrainCommand)}
    assert set(settings) == set(PRETRAIN)
    assert {flag: list(each.aliases) for flag, each in settings.items()} == {
        flag: others for flag, (*_, others) in PRETRAIN.items()
    }
    nothing = parse_pretrain([])
    assert {flag: value_of(nothing, flag) for flag in PRETRAIN} == {
        flag: default for flag, (default, *_) in PRETRAIN.items()
    }


def test_convert_to_hf_has_these_flags_with_these_defaults() -> None:
    assert {each.flag: each.default for each in all_settings(ConvertCommand)} == CONVERT
    typed = "--mpnet_checkpoint_path a --hf-model-folder-path=b --no-save-tokenizer --pytorch-bin"
    command = parse(ConvertCommand, typed.split(), "convert-to-hf")
    assert command == ConvertCommand(
        mpnet_checkpoint_path=Path("a"),
        hf_model_folder_path=Path("b"),
        save_tokenizer=False,
        pytorch_bin=True,
    )
    typed += " --push-to-hub me/mine --private"
    assert parse(ConvertCommand, typed.split(), "convert-to-hf") == dataclasses.replace(
        command, push_to_hub="me/mine", private=True
    )


@pytest.mark.parametrize("underscores", [False, True])
@pytest.mark.parametrize("joined", [False, True], ids=["blank", "equals"])
def test_every_flag_takes_a_value_in_every_way_of_writing(underscores: bool, joined: bool) -> None:
    typed = []
    without_layers = {flag: line for flag, line in PRETRAIN.items() if flag != "--config"}
    for flag, (_, value, _) in without_layers.items():
        name, *values = as_typed(flag, value)
        if underscores:
            name = "--" + name.removeprefix("--").replace("-", "_")
        typed += ["=".join([name, *values])] if joined else [name, *values]
    command = parse_pretrain(typed)
    assert {flag: value_of(command, flag) for flag in without_layers} == {
        flag: value for flag, (_, value, _) in without_layers.items()
    }


@pytest.mark.parametrize(("flag", "alias"), ALIASES)
def test_another_spelling_sets_the_flag(flag: str, alias: str) -> None:
    _, value, _ = PRETRAIN[flag]
    assert value_of(parse_pretrain(as_typed(alias, value)), flag) == value


def test_the_warmup_is_a_tenth_and_validations_come_with_checkpoints_unless_said() -> None:
    settings = parse_pretrain(["--total-updates", "700"]).settings
    assert settings.optimization.effective_warmup_updates == 70
    assert settings.run.effective_eval_interval == 5000
    settings = parse_pretrain(["--save-steps", "300"]).settings
    assert settings.run.effective_eval_interval == 300


def test_an_empty_dataset_name_next_to_files_means_none() -> None:
    parse_pretrain(["--dataset-name", "", "--train-dir", "texts"]).settings.validate()
    with pytest.raises(ConfigError, match="--dataset-name is empty and there is no --train-dir"):
        parse_pretrain(["--dataset-name", ""]).settings.validate()
    with pytest.raises(ConfigError, match="exclude each other"):
        parse_pretrain(["--dataset-name", "a/b", "--train-dir", "texts"]).settings.validate()


def test_every_setting_says_what_and_why_and_every_number_has_a_range() -> None:
    for each in all_settings(PretrainCommand):
        assert len(each.help) > 20, each.name
        assert each.help.endswith("."), each.name
    for _, field in fields_of(PretrainingConfig()):
        if isinstance(field.default, int | float) and not isinstance(field.default, bool):
            assert field.metadata["bounds"], field.name


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        # transformers
        ("--output_dir out", "--output_dir (here: --checkpoint-dir)"),
        ("--learning_rate=1e-4", "--learning_rate (here: --lr)"),
        ("--num_train_epochs 3", "--num_train_epochs (here: --total-updates, in updates: "),
        ("--per_device_train_batch_size 8", "(here: --batch-size)"),
        ("--gradient_accumulation_steps 8", "(here: --update-freq)"),
        ("--model_name_or_path a", "(here: --hf-model-path)"),
        ("--max_seq_length 128", "(here: --max-tokens)"),
        ("--max_steps 9", "(here: --total-updates)"),
        ("--fp16", "--fp16 (here: --precision, as --precision bf16)"),
        ("--epochs 3", "--epochs (here: --total-updates, in updates: "),
        ("--Random-Seed 3", "--Random-Seed (here: --seed)"),
        # fairseq
        ("--arch mpnet_base", "--arch (here: --preset, "),
        ("--tokens-per-sample 512 --max-tokens 4096", "what fairseq calls so is --batch-size"),
        ("--save-dir out", "(here: --checkpoint-dir)"),
        # annotated-mpnet
        ("-save_steps 9", "-save_steps (here: --checkpoint-interval)"),
        # Several at once, and an unknown one.
        ("--max_steps 9 --bf16 --zork", "--max_steps (here: --total-updates); --bf16 (here: "),
        ("--max_steps 9 --bf16 --zork", "bf16); --zork; see pretrain-mpnet --help"),
    ],
)
def test_a_flag_of_another_program_gets_a_pointer(typed: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_pretrain(typed.split())
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_each_command_points_to_flags_of_its_own() -> None:
    for kind, ours in (
        (ConvertCommand, "--hf-model-folder-path"),
        (TokenizerCommand, "--output"),
    ):
        with pytest.raises(ConfigError, match=rf"--output_dir \(here: {ours}\)"):
            parse(kind, ["--output_dir", "a"], "program")


def test_every_pointer_leads_to_a_flag_and_every_foreign_name_to_one_place() -> None:
    flags = [
        {each.flag for each in all_settings(kind)}
        for kind in (PretrainCommand, ConvertCommand, TokenizerCommand, ExplainCommand)
    ]
    for said in (*SAME, *NEARLY):
        ours = said.split()[0].rstrip(",:")
        assert not ours.startswith("--") or any(ours in each for each in flags), said
    for command in flags:
        pointed = [
            name
            for said, names in (*SAME.items(), *NEARLY.items())
            if said.split()[0].rstrip(",:") in command
            for name in names.split()
        ]
        assert sorted(pointed) == sorted(set(pointed))


def test_a_foreign_name_in_a_file_gets_a_pointer_too(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[optimization]\nlearning_rate = 1e-4\n")
    with pytest.raises(ConfigError, match=r"'learning_rate'; --lr is lr in \[optimization\]"):
        parse_pretrain(["--config", str(tmp_path / "mine.toml")])
