"""The commands as a shell sees them: exit codes, one line for a mistake, signals."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from annotated_mpnet import cli
from annotated_mpnet.cli import parse_pretrain
from annotated_mpnet.config import PretrainingConfig, fields_of
from annotated_mpnet.config_file import arguments_from_toml, to_toml
from annotated_mpnet.errors import ConfigError
from annotated_mpnet.options import flag
from tiny_run import TinyText, changed, tiny_config, write_text

NUMERIC = [
    (each.name, value)
    for group, each in fields_of(PretrainingConfig())
    if (value := vars(vars(PretrainingConfig())[group])[each.name]) is not None
    and isinstance(value, int | float)
    and not isinstance(value, bool)
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TinyText:
    return write_text(tmp_path_factory.mktemp("text"))


def pretrain(*arguments: str | Path) -> tuple[int, str]:
    """Run the command in this process; return its exit code and what it wrote to stderr."""
    import contextlib
    import io

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = cli._ending("pretrain-mpnet", cli._pretrain, [str(each) for each in arguments])
    return code, said.getvalue()


def command_of(config: PretrainingConfig) -> list[str]:
    """Return the command that runs a configuration, in a process of its own."""
    start = "from annotated_mpnet.cli import pretrain; pretrain()"
    return [sys.executable, "-c", start, *arguments_from_toml(to_toml(config), "test")]


def assert_one_line(said: str) -> None:
    assert said.startswith("pretrain-mpnet: error: "), said
    assert said.count("\n") == 1, said


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "abc", "1e99", "-7", ""])
@pytest.mark.parametrize("name", [name for name, _ in NUMERIC])
def test_a_number_out_of_range_exits_2_and_names_the_flag(
    name: str, value: str, tmp_path: Path
) -> None:
    code, said = pretrain(f"{flag(name)}={value}", "--checkpoint-dir", tmp_path / "run")
    assert code == 2
    assert_one_line(said)
    assert flag(name) in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--encoder-embed-dim", "100"], ["--encoder-embed-dim", "--encoder-attention-heads"]),
        (["--activation-fn", "swish"], ["--activation-fn", "gelu"]),
        (["--dropout", "1"], ["--dropout"]),
        (["--max-positions", "128"], ["--max-positions", "--max-tokens"]),
        (["--warmup-updates", "20000"], ["--warmup-updates", "--total-updates"]),
        (["--keep-prob", "0.6", "--rand-prob", "0.6"], ["--keep-prob", "--rand-prob"]),
        (["--resume", "--hf-model-path", "x"], ["--resume", "--hf-model-path"]),
        (["--resume", "--overwrite"], ["--resume", "--overwrite"]),
        (["--relative-attention-num-buckets", "31"], ["--relative-attention-num-buckets"]),
        (["--encoder-layer", "3"], ["--encoder-layer", "perhaps you meant --encoder-layers"]),
        (["--enc", "3"], ["--enc"]),
        (["--preset", "giant"], ["--preset"]),
        (["--config", "nowhere.toml"], ["--config", "nowhere.toml"]),
    ],
)
def test_a_wrong_command_exits_2_with_one_line(
    arguments: list[str], words: list[str], tmp_path: Path
) -> None:
    code, said = pretrain(*arguments, "--checkpoint-dir", tmp_path / "run")
    assert code == 2
    assert_one_line(said)
    assert all(word in said for word in words), said


def test_without_text_and_without_the_hub_the_ways_out_are_said(tmp_path: Path) -> None:
    code, said = pretrain("--checkpoint-dir", tmp_path / "run")
    assert code == 3
    assert_one_line(said)
    assert "--train-dir" in said
    assert "--preset demo" in said


def test_every_field_is_a_flag_with_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parse_pretrain(["--help"])
    help_text = capsys.readouterr().out
    for _, each in fields_of(PretrainingConfig()):
        assert flag(each.name) in help_text
    assert "pretrain-mpnet --preset demo" in help_text


def test_other_spellings_mean_the_same() -> None:
    ours = "--normalize-before --weight-decay 0 --update-freq 2 --checkpoint-interval 9"
    theirs = "-prenorm -wd 0 -gc_steps 2 --save_steps 9"
    underscores = "--normalize_before --weight_decay 0 --update_freq 2 --checkpoint_interval 9"
    parsed = [parse_pretrain(line.split()) for line in (ours, theirs, underscores)]
    assert parsed[0] == parsed[1] == parsed[2]


def test_command_line_overrides_file_overrides_preset(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("[model]\nencoder_layers = 7\nencoder_ffn_dim = 99\n")
    settings = parse_pretrain(
        ["--encoder-ffn-dim", "11", "--preset", "demo", "--config", str(file)]
    ).settings
    assert settings.model.encoder_embed_dim == 128  # of the preset
    assert settings.model.encoder_layers == 7  # of the file
    assert settings.model.encoder_ffn_dim == 11  # typed
    assert settings.model.relative_attention_num_buckets == 32  # default


def test_a_written_configuration_reads_back_as_itself(tmp_path: Path) -> None:
    config = changed(PretrainingConfig(), train_dir=Path("a b"), dropout=0.0, normalize_before=True)
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config))
    assert parse_pretrain(["--config", str(file)]).settings == config


@pytest.mark.parametrize(
    "content", ["[model]\nlayers = 3\n", "[modle]\nencoder_layers = 3\n", "encoder_layers = \n"]
)
def test_a_wrong_configuration_file_is_refused_by_name(content: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"settings\.toml"):
        parse_pretrain(["--config", str(file)])


def test_print_config_prints_what_config_reads(capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain("--print-config", "--seed", "7")[0] == 0
    printed = capsys.readouterr().out
    wanted = changed(PretrainingConfig(), seed=7)
    assert parse_pretrain(arguments_from_toml(printed, "printed")).settings == wanted


def wait_for(path: Path, text: str, process: subprocess.Popen[str]) -> None:
    """Wait until a file holds a text."""
    for _ in range(600):
        if path.exists() and text in path.read_text():
            return
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.05)
    pytest.fail(f"{text!r} did not come")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_resumed_run_is_the_same(
    text: TinyText, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    config = changed(
        tiny_config(text, tmp_path / "run"), total_updates=300, test_file=None, export_hf=False
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command_of(config), stderr=subprocess.PIPE, text=True, env=environment
    )
    wait_for(tmp_path / "run" / "metrics.jsonl", '"step": 6', process)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert f"stopped by {number.name}" in said
    (stopped,) = (tmp_path / "run").glob("checkpoint[0-9]*")
    assert int(stopped.name.removeprefix("checkpoint")) < 300

    resumed = changed(config, resume=True)
    whole = changed(config, checkpoint_dir=tmp_path / "whole")
    for each in (resumed, whole):
        subprocess.run(command_of(each), check=True, env=environment, timeout=120)
    for name in ("model.safetensors", "optimizer.safetensors"):
        ends = [tmp_path / run / "checkpoint300" / name for run in ("run", "whole")]
        assert ends[0].read_bytes() == ends[1].read_bytes()


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    start = "from annotated_mpnet.cli import pretrain; pretrain()"
    process = subprocess.run(
        f"{sys.executable} -c '{start}' --print-config | head -1",
        shell=True,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert process.stdout == "[model]\n"
    assert process.stderr == ""


def test_defaults_are_written_once() -> None:
    # The configuration that the parser makes of nothing is that of the dataclasses.
    assert parse_pretrain([]).settings == PretrainingConfig()
    assert dataclasses.asdict(PretrainingConfig())["model"]["encoder_layers"] == 12
