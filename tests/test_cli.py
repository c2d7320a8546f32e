"""The commands as a shell sees them: exit codes, one line per error, signals."""

import contextlib
import dataclasses
import io
import os
import pty
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import annotated_mpnet
from annotated_mpnet import cli
from annotated_mpnet.errors import ConfigError, FailedElsewhereError
from annotated_mpnet.mpnet.config import flag
from annotated_mpnet.settings.commands import (
    ConvertCommand,
    ExplainCommand,
    PretrainCommand,
    TokenizerCommand,
)
from annotated_mpnet.settings.config import PretrainingConfig, fields_of
from annotated_mpnet.settings.config_file import ACTIONS, arguments_from_toml, to_toml
from annotated_mpnet.settings.fields import all_settings
from annotated_mpnet.settings.parsing import parse, parse_pretrain
from annotated_mpnet.tracking.sinks import read_metrics
from processes import Command
from ranks import arguments_of, environment
from tiny_run import TinyText, changed, tiny_config
from waiting import HUNG, holds, wait_for

COMMANDS = [PretrainCommand, ConvertCommand, TokenizerCommand, ExplainCommand]
NUMERIC = [
    (each.name, value)
    for group, each in fields_of(PretrainingConfig())
    if (value := vars(vars(PretrainingConfig())[group])[each.name]) is not None
    and isinstance(value, int | float)
    and not isinstance(value, bool)
]


def pretrain(*arguments: str | Path) -> tuple[int, str]:
    """Run the command in this process; return its exit code and stderr."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = cli._ending("pretrain-mpnet", cli._pretrain, [str(each) for each in arguments])
    return code, said.getvalue()


START = "from annotated_mpnet.cli import pretrain; pretrain()"


def command_of(config: PretrainingConfig, start: str = START) -> list[str]:
    """Return the command that runs a configuration in a new process."""
    return [sys.executable, "-c", start, *arguments_of(config)]


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
        (["--muon-lr", "1e-3"], ["--muon-lr is 0.001", "give --optimizer muon too"]),
        (["--decay-updates", "20"], ["--decay-updates is 20", "--schedule wsd"]),
        (
            ["--schedule", "wsd", "--warmup-updates", "900", "--total-updates", "1000"],
            ["--warmup-updates 900", "--decay-updates 200", "--total-updates 1000"],
        ),
        (["--keep-prob", "0.6", "--rand-prob", "0.6"], ["--keep-prob", "--rand-prob"]),
        (["--autoresume", "--resume"], ["--autoresume and --resume exclude each other"]),
        (["--autoresume", "--overwrite"], ["--autoresume and --overwrite exclude each other"]),
        (["--autoresume", "--no-save-optimizer-state"], ["cannot be resumed; give one of them"]),
        (["--resume", "--overwrite"], ["--resume", "--overwrite"]),
        (["--wandb-watch", "--fsdp"], ["--wandb-watch", "--fsdp"]),
        (["--relative-attention-num-buckets", "31"], ["--relative-attention-num-buckets"]),
        (["--encoder-layer", "3"], ["--encoder-layer", "perhaps you meant --encoder-layers"]),
        (["--enc", "3"], ["--enc"]),
        (["-preno"], ["-preno"]),
        (["--lr"], ["--lr has no value", "a number, >0 to 1"]),
        (["--resume=yes"], ["--resume is 'yes'", "--no-resume"]),
        (["three"], ["unrecognized arguments: three"]),
        (["--preset", "giant"], ["--preset"]),
        (["--config", "nowhere.toml"], ["--config nowhere.toml cannot be read: No such file"]),
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


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("kind", COMMANDS)
def test_help_fits_and_shows_each_setting_with_its_range(
    kind: type, width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit, match="0"):
        parse(kind, ["--help"], "program")
    help_text = capsys.readouterr().out
    assert max(len(line) for line in help_text.splitlines()) <= width
    whole = " ".join(help_text.split())
    for each in all_settings(kind):
        assert each.help in whole
        assert each.hint in whole
    for group in fields_of(PretrainingConfig()):
        assert kind is not PretrainCommand or f"{group[0]} options" in help_text


@pytest.mark.parametrize("value", ["x", "--lr=x", "'", "a " * 50])
def test_a_wrong_value_is_shown_and_cut(value: str) -> None:
    code, said = pretrain("--lr", value)
    assert code == 2
    assert_one_line(said)
    assert "--lr" in said
    assert "a number, >0 to 1" in said
    assert len(said) < 250


def test_messages_survive_any_terminal_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding in ("ascii", "utf-8"):
        with io.TextIOWrapper(io.BytesIO(), encoding=encoding) as stdout:
            monkeypatch.setattr(sys, "stdout", stdout)
            code, said = pretrain("--encoder-layer", "3")
            monkeypatch.undo()
        assert code == 2
        assert "--encoder-layer 3 (perhaps you meant --encoder-layers)" in said


def test_an_error_is_one_line_on_a_real_terminal_too() -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "annotated_mpnet", "--encoder-layer", "3"]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80"}
    environment.pop("NO_COLOR", None)
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        assert process.wait(timeout=HUNG) == 2
    # A terminal may return a line in parts. Reading after the last one is an error on Linux.
    parts = []
    with contextlib.suppress(OSError):
        while part := os.read(ours, 10_000):
            parts.append(part)
    said = b"".join(parts).decode()
    os.close(ours)
    assert said.strip().count("\n") == 0
    assert "unrecognized arguments: --encoder-layer" in said
    assert "(perhaps you meant --encoder-layers)" in said
    assert "│" not in said
    assert "\x1b" not in said


@pytest.mark.parametrize("kind", COMMANDS)
def test_the_version_is_printed_alone(kind: type, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parse(kind, ["--version"], "program")
    said = capsys.readouterr().out
    version = re.escape(annotated_mpnet.__version__)
    assert re.fullmatch(rf"annotated-mpnet {version} \(Python 3\.\S+, torch .*\)\n", said)
    with pytest.raises(ConfigError, match="--version: ignored explicit argument '3'"):
        parse(kind, ["--version=3"], "program")


def test_missing_flags_are_named() -> None:
    with pytest.raises(ConfigError, match=r"^--mpnet-checkpoint-path and --hf-"):
        parse(ConvertCommand, [], "convert-to-hf")


# Files.


def test_command_line_overrides_file_overrides_preset(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("[model]\nencoder_layers = 7\nencoder_ffn_dim = 99\n")
    typed = ["--encoder-ffn-dim", "11", "--preset", "demo", "--config", str(file)]
    model = parse_pretrain(typed).settings.model
    assert model.encoder_embed_dim == 128  # from the preset
    assert model.encoder_layers == 7  # from the file
    assert model.encoder_ffn_dim == 11  # typed
    assert model.relative_attention_num_buckets == 32  # default


def test_a_resumed_run_does_not_begin_with_the_weights_of_its_preset_again(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('[run]\nhf_model_path = "weights"\n')
    typed = ["--hf-model-path", "weights"]
    assert parse_pretrain(["--preset", "continue"]).settings.run.initial_weights is not None
    for layer in (["--preset", "continue"], ["--config", str(file)], typed):
        for resume in (["--resume"], ["--resume-checkpoint", str(tmp_path)]):
            settings = parse_pretrain([*layer, *resume]).settings
            settings.validate()
            assert settings.run.initial_weights is None


def test_a_written_configuration_reads_back_as_itself(tmp_path: Path) -> None:
    config = changed(PretrainingConfig(), train_dir=Path("a b"), dropout=0.0, normalize_before=True)
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config))
    assert parse_pretrain(["--config", str(file)]).settings == config


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("[model]\nlayers = 3\n", "--encoder-layers is encoder_layers in [model]"),
        ("[modle]\nencoder_layers = 3\n", "in [model]"),
        ("[model]\nlr = 1e-3\n", "--lr is lr in [optimization]"),
        ("encoder_layers = 3\n", "outside of a table"),
        ("encoder_layers = \n", "not valid TOML"),
        ("[model]\nnormalize_before = 'yes'\n", "true or false"),
        ("[model]\nencoder_layers = true\n", "a number or a text"),
        ("[model]\nencoder_layers = [3]\n", "a number or a text"),
        ("[model]\nencoder_layers = 0\n", "--encoder-layers is 0"),
        ("[model]\nencoder_layers = 'three'\n", "--encoder-layers is 'three'"),
        ("[optimization]\nlr = nan\n", "--lr is nan"),
    ],
)
def test_an_error_in_a_file_names_the_file(content: str, word: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(content)
    # The typed value overrides the file's, but the file is still wrong.
    code, said = pretrain("--config", file, "--encoder-layers", "3", "--lr", "0.1")
    assert code == 2
    assert_one_line(said)
    assert "settings.toml" in said
    assert word in said


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("model: [", "not valid YAML"),
        ("- 3", "expected tables such as [model]"),
        ("model: 3", "outside of a table"),
        ("model: {1: 2}", "[model] has no setting 1"),
        ("model: {encoder_layers: null}", "encoder_layers is None"),
        ("optimization: !!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_an_error_in_yaml_names_the_file(content: str, word: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.yml"
    file.write_text(content)
    code, said = pretrain("--config", file)
    assert code == 2
    assert_one_line(said)
    assert "settings.yml" in said
    assert word in said


def test_yaml_means_the_same_as_toml(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(
        "[model]\nencoder_layers = 3\nnormalize_before = true\n[optimization]\nlr = 3e-4\n"
    )
    (tmp_path / "a.yaml").write_text(
        "model:\n  encoder_layers: 3\n  normalize_before: yes\n"
        "optimization:\n  lr: 3e-4\n  warmup_updates: null\n"
    )
    (tmp_path / "empty.YML").write_text("")
    toml, yaml = (parse_pretrain(["--config", str(tmp_path / f"a.{e}")]) for e in ("toml", "yaml"))
    assert toml.settings == yaml.settings
    empty = parse_pretrain(["--config", str(tmp_path / "empty.YML")])
    assert empty.settings == PretrainingConfig()


def test_print_config_prints_what_config_reads(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert (
        pretrain("--preset", "demo", "--print-config", "--seed", "7", "--allow-change=-x")[0] == 0
    )
    printed = capsys.readouterr().out
    (tmp_path / "printed.toml").write_text(printed)
    read = parse_pretrain(["--config", str(tmp_path / "printed.toml")]).settings
    demo = parse_pretrain(["--preset", "demo"]).settings
    assert read == changed(demo, seed=7)
    assert printed == to_toml(read, commented=True)
    # Every setting is there with its explanation; unset ones are comments to fill in.
    whole = " ".join(line.removeprefix("# ") for line in printed.splitlines())
    for each in all_settings(PretrainingConfig):
        assert (each.help in whole) == (each.name not in ACTIONS)
        assert (f"{each.name} = " in whole) == (each.name not in ACTIONS)
    assert "\n# max_positions = INT\n" in printed
    assert '\n# hf_model_path = "TEXT"\n' in printed


# Without characters that names may not have, or that would be removed as a password.
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0@")
TEXTS = st.text(CHARACTERS, min_size=1, max_size=20)


@given(name=TEXTS, field=TEXTS, lr=st.floats(1e-300, 1), seed=st.integers(0, 2**63 - 1))
@settings(max_examples=30)
def test_any_text_and_number_comes_back_exactly(
    name: str, field: str, lr: float, seed: int
) -> None:
    assume(name != "None")  # On a command line that is how to say "unset".
    config = changed(PretrainingConfig(), wandb_name=name, text_field=field, lr=lr, seed=seed)
    for commented in (False, True):
        arguments = arguments_from_toml(to_toml(config, commented=commented), "test")
        assert parse_pretrain(arguments).settings == config


def test_the_reference_is_what_the_program_says() -> None:
    docs = Path(__file__).parents[1] / "docs"
    written = runpy.run_path(str(docs / "configuration.py"))["configuration_markdown"]()
    assert (docs / "configuration.md").read_text(encoding="utf-8") == written, (
        "run: python docs/configuration.py > docs/configuration.md"
    )


# Endings.


@pytest.mark.parametrize("rank", [None, "0", "1", "7"])
def test_of_several_processes_the_first_prints_the_error_and_the_others_wait(
    rank: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    if rank is not None:
        for name, value in environment(int(rank), 8, 29500).items():
            monkeypatch.setenv(name, value)
    for arguments in (["--lr", "-1"], ["--nonsense"]):
        code, said = pretrain(*arguments)
        assert code == 2
        assert_one_line(said)
    # torchrun ends the others while they wait. If it does not, rank 0 did not have this error.
    assert waited == ([] if rank in (None, "0") else [cli.SILENT_RANKS_WAIT] * 2)


def test_the_demo_is_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment(0, 2, 29500).items():
        monkeypatch.setenv(name, value)
    code, said = pretrain("--preset", "demo")
    assert code == 2
    assert "one process, and torchrun has started 2" in said


def test_an_error_that_another_process_has_printed_is_not_printed_again(
    debugged: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "SILENT_RANKS_WAIT", 0)

    def fail(arguments: Sequence[str]) -> None:
        raise FailedElsewhereError("said on rank 0", 7)

    assert cli._ending("pretrain-mpnet", fail, ["--debug"]) == 7
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("where", ["command line", "nowhere"])
def test_debug_logs_progress_and_the_traceback_of_an_error(
    debugged: None, text: TinyText, tmp_path: Path, where: str
) -> None:
    config = changed(tiny_config(text, tmp_path / "run"), tokenizer_name="nowhere/at/all")
    (tmp_path / "mine.toml").write_text(to_toml(config))
    typed = ["--debug"] if where == "command line" else []
    code, said = pretrain("--config", tmp_path / "mine.toml", *typed)
    assert code == 2
    *logged, last = said.splitlines()
    assert last.startswith("pretrain-mpnet: error: --tokenizer-name")
    if where == "nowhere":
        assert logged == []
        return
    assert "annotated_mpnet.runs.run: reading text and tokenizer, to compute on cpu" in said
    assert "Traceback" in said
    assert os.environ["DATASETS_VERBOSITY"] == "debug"


@pytest.mark.parametrize("preset", [[], ["--preset", "tiny"]])
def test_a_dry_run_is_passed_on(preset: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def record(settings: PretrainingConfig, *, dry_run: bool, notes: Sequence[str]) -> None:
        assert not notes
        asked.append((settings.model.encoder_layers, dry_run))

    monkeypatch.setattr("annotated_mpnet.runs.run.run_pretraining", record)
    for arguments in (["--dry-run"], []):
        assert pretrain(*preset, *arguments)[0] == 0
    layers = 4 if preset else 12
    assert asked == [(layers, True), (layers, False)]


# Update 20 waits for the end of standard input, so a signal always comes during the run.
HELD = f"""
import sys
from annotated_mpnet.mpnet import loop as trainer
function, free = trainer.set_learning_rate, iter(range(19))
def held(*arguments):
    if next(free, None) is None:
        sys.stdin.read()
    return function(*arguments)
trainer.set_learning_rate = held
{START}
"""


ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def config_of(text: TinyText, directory: Path) -> PretrainingConfig:
    return changed(tiny_config(text, directory), total_updates=40, test_file=None, export_hf=False)


@pytest.fixture(scope="module")
def whole(text: TinyText, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a run without a signal, in a process that did nothing else."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    command = command_of(config_of(text, directory))
    subprocess.run(command, check=True, env=ONE_THREAD, timeout=HUNG)
    return directory


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_resumed_run_is_the_same(
    text: TinyText, tmp_path: Path, whole: Path, number: signal.Signals, code: int
) -> None:
    config = config_of(text, tmp_path / "run")
    process = subprocess.Popen(
        command_of(config, HELD),
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ONE_THREAD,
    )
    wait_for(holds(tmp_path / "run" / "metrics.jsonl", '"step": 6'), process)
    process.send_signal(number)
    _, said = process.communicate(timeout=HUNG)
    assert process.returncode == code, said
    assert f"stopped by {number.name}" in said
    (stopped,) = (tmp_path / "run").glob("checkpoint[0-9]*")
    assert int(stopped.name.removeprefix("checkpoint")) <= 20

    resumed = Command(arguments_of(changed(config, resume=True)))
    assert resumed.wait(HUNG) == 0
    for name in ("model.safetensors", "optimizer.safetensors"):
        ends = [run / "checkpoint40" / name for run in (tmp_path / "run", whole)]
        assert ends[0].read_bytes() == ends[1].read_bytes()


def test_a_command_takes_about_as_much_memory_as_its_plan_said(whole: Path) -> None:
    plan = re.search(r"memory: about ([\d.]+) ([MG])B of", (whole / "log.txt").read_text())
    assert plan
    planned = float(plan[1]) * {"M": 1e-3, "G": 1}[plan[2]]
    records = read_metrics(whole / "metrics.jsonl")
    measured = max(each.get("memory/peak_gb", 0) for each in records)
    assert 3 / 4 < planned / measured < 4 / 3


def test_a_closed_pipe_is_not_an_error(tmp_path: Path) -> None:
    process = subprocess.run(
        f"{sys.executable} -c '{START}' --print-config | head -1",
        shell=True,
        capture_output=True,
        text=True,
        timeout=HUNG,
        check=True,
    )
    assert process.stdout.startswith("# All settings of pretrain-mpnet")
    assert process.stderr == ""


def test_defaults_are_written_once() -> None:
    # Without arguments, the parser gives the defaults of the dataclasses.
    assert parse_pretrain([]).settings == PretrainingConfig()
    assert dataclasses.asdict(PretrainingConfig())["model"]["encoder_layers"] == 12
