"""Any path, flag, file or standard output: one line and the documented exit code."""

import contextlib
import errno
import io
import math
import os
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from annotated_mpnet import cli
from annotated_mpnet.errors import UserError, printable, without_password
from annotated_mpnet.mpnet.config import flag
from annotated_mpnet.settings.commands import ConvertCommand, ExplainCommand, TokenizerCommand
from annotated_mpnet.settings.config import PretrainingConfig, fields_of
from annotated_mpnet.settings.config_file import to_toml
from annotated_mpnet.settings.fields import all_settings
from annotated_mpnet.settings.parsing import parse_pretrain
from folders import tree
from ranks import arguments_of, environment
from tiny_run import TinyText, changed, run, tiny_config
from waiting import HUNG

PROGRAMS = {
    "pretrain-mpnet": cli._pretrain,
    "convert-to-hf": cli._convert,
    "train-mpnet-tokenizer": cli._train_tokenizer,
    "explain-mpnet": cli._explain,
}


def refused(*arguments: str | Path, program: str = "pretrain-mpnet", code: int = 2) -> str:
    """Run a command that must fail with this exit code and one line; return the line."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        found = cli._ending(program, PROGRAMS[program], list(map(str, arguments)))
    assert found == code, said.getvalue()
    (line,) = said.getvalue().splitlines()
    assert line.startswith(f"{program}: error: ")
    assert len(line) < 600
    return line


NUMERIC = [
    each.name
    for group, each in fields_of(PretrainingConfig())
    if isinstance(vars(vars(PretrainingConfig())[group])[each.name], int | float)
    and each.type is not bool
]
HUGE = ["1" + "0" * 400, "9" * 5000, "-" + "1" * 400]


@pytest.mark.parametrize("value", [*HUGE, "1e999", "-1e999", "nan", "inf", "0x10", "1_0_", "٣x"])
def test_no_number_is_too_long_for_a_message(value: str) -> None:
    for name in NUMERIC:
        assert flag(name) in refused(f"{flag(name)}={value}")


def test_zero_and_minus_one_are_refused_where_the_range_begins_above_them() -> None:
    bounds = {
        each.name: each.metadata["bounds"]
        for _, each in fields_of(PretrainingConfig())
        if each.name in NUMERIC
    }
    checked = 0
    for name, value in ((name, value) for name in bounds for value in (0, -1)):
        if value <= bounds[name].get(">", -math.inf) or value < bounds[name].get(">=", -math.inf):
            assert f"{flag(name)} is {value}" in refused(f"{flag(name)}={value}")
            checked += 1
    assert checked > 40


@pytest.mark.parametrize("value", HUGE)
@pytest.mark.parametrize("form", ["a.toml", "a.yaml"])
def test_no_number_in_a_file_is_too_long_either(tmp_path: Path, value: str, form: str) -> None:
    written = f"[run]\nseed = {value}\n" if form == "a.toml" else f"run:\n  seed: {value}\n"
    (tmp_path / form).write_text(written)
    assert str(tmp_path / form) in refused("--config", tmp_path / form)


BROKEN = {
    "toml": [
        *("[run", "x", "seed = 1", "[run]\nseed = 1\nseed = 2", "[run]\nseed = 2024-01-01"),
        *("[run]\nseed = " + "[" * 2000, "[run]\nhf_model_path = '\0'", "[run]\nseed = {a = 1}"),
        '[run]\nhf_model_path = "\\u0000"',
    ],
    "yaml": [
        *("[run", "x", "seed: 1", "run:\n  seed: 1\n  seed: 2\n", "run: {seed: 2024-01-01}"),
        *("optimization: {lr: 2024-13-45}", "run: {seed: !!int abc}", "run: {seed: !!int '_'}"),
        *("optimization: {lr: !!float abc}", "run: {debug: !!bool abc}", "run: {seed: !!x y}"),
        *("run: {seed: !!python/object/apply:os.system ['true']}", "run: " + "[" * 900),
        *('run: {hf_model_path: "\\ud800"}', 'run: {checkpoint_dir: "a\\0b"}', "run: {seed: [1]}"),
        *("? [a]\n: b", "run: &a\n  seed: *a", "- run", "a: 1\n--- \nb: 2", "\t", "run: {1: 2}"),
        "\n".join(
            ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
            + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
        ),
    ],
}


@pytest.mark.parametrize(
    ("kind", "written"), [(kind, each) for kind, texts in BROKEN.items() for each in texts]
)
def test_a_broken_configuration_is_one_line_that_names_the_file(
    tmp_path: Path, kind: str, written: str
) -> None:
    file = tmp_path / f"mine.{kind}"
    file.write_text(written)
    assert str(file) in refused("--config", file)


def test_a_configuration_is_a_small_regular_file_in_utf_8(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.toml")
    (tmp_path / "latin.toml").write_bytes(b"[run]\nhf_model_path = 'caf\xe9'\n")
    with (tmp_path / "large.toml").open("wb") as file:
        file.truncate(2**40)
    for name in ("fifo.toml", "latin.toml", "large.toml", ".", "missing.toml"):
        assert "--config" in refused("--config", tmp_path / name)
    assert "--config" in refused("--config", "/dev/zero")
    (tmp_path / "marked.toml").write_bytes(b"\xef\xbb\xbf[run]\nseed = -1\n")
    assert "--seed is -1" in refused("--config", tmp_path / "marked.toml")


@pytest.mark.parametrize(
    ("arguments", "first", "second"),
    [
        (["--lr", "1e-3", "--lr=1e-4"], "1e-3", "1e-4"),
        (["--train-dir", "a", "--train_dir", "b"], "a", "b"),
        (["-wd", "0.1", "--weight-decay", "0.2"], "0.1", "0.2"),
        (["--resume", "--no-resume"], "--resume", "--no-resume"),
    ],
)
def test_a_flag_is_given_once(arguments: list[str], first: str, second: str) -> None:
    said = refused(*arguments)
    assert "is given twice" in said
    assert repr(first) in said
    assert repr(second) in said


def test_a_value_that_is_spelled_like_a_flag_is_no_flag() -> None:
    settings = parse_pretrain(["--allow-change", "seed", "--seed", "3"]).settings
    assert (settings.run.allow_change, settings.run.seed) == ("seed", 3)


def test_a_second_file_after_a_flag_is_explained() -> None:
    assert "for several files give their directory" in refused("--valid-file", "a.txt", "b.txt")


COMMANDS: dict[str, type] = {
    "pretrain-mpnet": PretrainingConfig,
    "convert-to-hf": ConvertCommand,
    "train-mpnet-tokenizer": TokenizerCommand,
    "explain-mpnet": ExplainCommand,
}
PATHS = [
    (program, each.flag)
    for program, kind in COMMANDS.items()
    for each in all_settings(kind)
    if each.type is Path
    or each.name in ("tokenizer_name", "hf_model_path", "dataset_name", "checkpoint")
] + [("pretrain-mpnet", "--config"), ("pretrain-mpnet", "--train-dir")]
OTHERS = {
    "convert-to-hf": ["--mpnet-checkpoint-path=a", "--hf-model-folder-path=b"],
    "train-mpnet-tokenizer": ["--output=a", "b"],
    "explain-mpnet": ["a word"],
}


def with_path(program: str, name: str, path: str) -> list[str]:
    others = [each for each in OTHERS.get(program, []) if not each.startswith(f"{name}=")]
    if name == "FILES":
        return [*(each for each in others if each.startswith("--")), path]
    return [*others, f"{name}={path}"]


@pytest.mark.parametrize(("program", "name"), PATHS)
def test_a_path_that_no_file_can_have_is_refused_at_once(
    program: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    wrong = ["x" * 300, "a/" * 3000, "a\0b", "caf\udce9", "loop"]
    for path in wrong if name == "--dataset-name" else [*wrong, ""]:
        assert name in refused(*with_path(program, name, path), program=program)
    assert [each.name for each in tmp_path.iterdir()] == ["loop"]


@pytest.mark.parametrize(("program", "name"), PATHS)
def test_a_directory_that_may_not_be_entered_is_one_line(
    program: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.stat

    # Root may enter any directory, so this fakes the system's refusal.
    def stat_as_user(path: object, *arguments: object, **options: object) -> os.stat_result:
        if str(path).startswith("/priv"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path, *arguments, **options)  # type: ignore[arg-type,no-any-return]

    monkeypatch.setattr(os, "stat", stat_as_user)
    said = refused(*with_path(program, name, "/priv/sub"), program=program)
    assert f"{name} is '/priv/sub', which cannot be looked at: Permission denied" in said


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), "Permission denied: a/b"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device: no file"),
        (OSError(errno.EXDEV, "Invalid link", "a", None, "b"), None),
    ],
)
def test_what_the_machine_refuses_is_one_line_and_what_it_cannot_mean_is_a_bug(
    error: OSError, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(arguments: Sequence[str]) -> None:
        raise error

    monkeypatch.setitem(PROGRAMS, "pretrain-mpnet", fail)
    if said is None:
        with pytest.raises(OSError, match="Invalid link"):
            refused()
    else:
        assert said in refused(code=6)


@pytest.mark.parametrize(
    "error", [MemoryError(), ImportError("x.so: failed to map segment from shared object")]
)
def test_a_machine_without_memory_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(arguments: Sequence[str]) -> None:
        raise error

    monkeypatch.setitem(PROGRAMS, "pretrain-mpnet", fail)
    assert "out of memory" in refused(code=7)


def test_a_file_neither_keeps_nor_gives_what_is_done_in_one_start(
    text: TinyText, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(text, tmp_path / "run")
    run(changed(config, overwrite=True, debug=True))
    written = (tmp_path / "run" / "config.toml").read_text()
    for name in ("overwrite", "resume", "debug", "allow_change", "resume_checkpoint"):
        assert f"\n{name} = " not in written
    # As written by older versions: its directory is refused like any other with a run.
    old = tmp_path / "old.toml"
    old.write_text(written.replace("[run]", "[run]\noverwrite = true\nresume = false"))
    before = tree(tmp_path / "run")
    code = cli._ending("pretrain-mpnet", cli._pretrain, ["--config", str(old)])
    assert code == 4
    assert tree(tmp_path / "run") == before
    said = capsys.readouterr().err
    assert "overwrite is ignored in a file; give --overwrite on the command line if you" in said
    assert "already holds" in said.splitlines()[-1]


WAYS = {
    "closed output": ">&-",
    "closed error": "2>&-",
    "all closed": "<&- >&- 2>&-",
    "full output": ">/dev/full",
    "full error": "2>/dev/full",
}


def shell(command: str, *arguments: str, **options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", f'"$@" {command}', "sh", sys.executable, "-m", "annotated_mpnet", *arguments],
        capture_output=True,
        text=True,
        timeout=HUNG,
        env={**os.environ, **options},
    )


@pytest.mark.parametrize("way", ["all closed", "full output"])
def test_what_is_only_said_neither_ends_a_run_nor_changes_its_code(
    text: TinyText, tmp_path: Path, way: str
) -> None:
    config = tiny_config(text, tmp_path / "rün")
    done = shell(WAYS[way], *arguments_of(config), PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "rün" / "report.md").exists()
    assert (tmp_path / "rün" / "hf").is_dir()


def test_ascii_output_gets_names_escaped_and_the_run_goes_on(
    text: TinyText, tmp_path: Path
) -> None:
    done = shell("", *arguments_of(tiny_config(text, tmp_path / "rün")), PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "r\\xfcn/best_checkpoint" in done.stdout
    assert "rün/best_checkpoint" in (tmp_path / "rün" / "log.txt").read_text()


@pytest.mark.parametrize("flag", ["--print-config", "--help", "--preset=list"])
def test_requested_output_is_printed_or_the_command_fails(flag: str) -> None:
    done = shell(WAYS["full output"], flag)
    assert done.returncode == 6
    assert done.stderr == (
        "pretrain-mpnet: error: standard output cannot be written: No space left on device\n"
    )
    assert shell(WAYS["closed error"], flag).returncode == 0
    assert shell(WAYS["full error"], "--lr=-1").returncode == 2


TWO = environment(1, 2, 29500)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"RANK": "x"}, "RANK is 'x'; expected a whole number"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE is '-1'; expected a whole number"),
        ({"WORLD_SIZE": "1"}, "RANK is 1; expected at most 0"),
        ({"RANK": "2"}, "RANK is 2; expected at most 1"),
        ({"LOCAL_RANK": "5"}, "LOCAL_RANK is 5; expected at most 1"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT is 99999; expected at most 65535"),
        ({"MASTER_PORT": "abc"}, "MASTER_PORT is 'abc'; expected a whole number"),
        ({"MASTER_ADDR": None}, "but MASTER_ADDR is not set; start the processes with torchrun"),
        ({"LOCAL_RANK": ""}, "but LOCAL_RANK is not set"),
        ({"RANK": "٣"}, "RANK is '٣'; expected a whole number"),
    ],
)
def test_torchruns_variables_make_sense_or_are_one_line(
    changes: dict[str, str | None], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "SILENT_RANKS_WAIT", 0)
    for name, value in (TWO | changes).items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert said in refused("--train-dir", "x")


SECRET = "hunter2"


@pytest.mark.parametrize(("program", "name"), PATHS)
def test_a_password_in_a_path_is_not_repeated(
    program: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    said = io.StringIO()
    arguments = with_path(program, name, f"https://me:{SECRET}@example.org/x")
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        assert cli._ending(program, PROGRAMS[program], arguments) in (2, 3, 4)
    assert SECRET not in said.getvalue()


def test_no_secret_is_in_any_file_of_a_run_or_in_what_it_says(
    debugged: None,
    text: TinyText,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, SECRET)
    address = f"https://me:{SECRET}@example.org"
    monkeypatch.setenv("HTTPS_PROXY", address)
    config = changed(
        tiny_config(text, tmp_path / "run"),
        wandb_project=address,
        wandb_name=address,
        dataset_revision=address,
        debug=True,
    )
    for resume in (False, True):
        arguments = arguments_of(changed(config, resume=resume))
        # As typed, because the helper above writes a file, which would not have the password.
        arguments = [f"--wandb-project={address}" if "project" in x else x for x in arguments]
        assert cli._ending("pretrain-mpnet", cli._pretrain, arguments) == 0
    said = capsys.readouterr()
    assert SECRET not in said.out + said.err
    assert "wandb_project" in to_toml(config)
    for name, content in tree(tmp_path / "run").items():
        assert SECRET.encode() not in content, name


@pytest.mark.parametrize(
    ("foreign", "shown"),
    [
        ("a\nb\r\tc", "a\\nb\\r\\tc"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("\u202etxt.exe", "\\u202etxt.exe"),
        ("caf\udce9", "caf\\udce9"),
        ("\u2028x\x85", "\\u2028x\\x85"),
        ("naïve 日本 “q”", "naïve 日本 “q”"),
    ],
)
def test_foreign_text_cannot_write_on_the_terminal(foreign: str, shown: str) -> None:
    assert printable(foreign) == shown

    def fail(arguments: Sequence[str]) -> None:
        raise UserError(foreign)

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        assert cli._ending("pretrain-mpnet", fail, []) == 1
    assert said.getvalue() == f"pretrain-mpnet: error: {shown}\n"


def test_passwords_are_cut_out_and_nothing_else_is() -> None:
    for address in (
        f"https://me:{SECRET}@h/x",
        f"https:/me:{SECRET}@h/x",
        f"ftp://{SECRET}@h",
        f"x=https://me:%20{SECRET}@h",
        f"'s3://me:{SECRET}@@h'",
        f"me:{SECRET}@h:22/x",
    ):
        assert SECRET not in without_password(f"cannot read {address}: no")
    for harmless in ("a@b.org", "C:/x", "3:4", "see: me@h", "https://h/x@y", "12:30 @ noon"):
        assert without_password(harmless) == harmless


def test_closed_streams_are_not_taken_by_files_that_are_opened() -> None:
    code = (
        "import os, sys\nfrom annotated_mpnet import cli\ncli._open_standard_streams()\n"
        "file = open(sys.argv[1], 'w')\nprint('to the output')\nfile.flush()\n"
        "sys.exit(file.fileno() < 3)"
    )
    command = ["sh", "-c", '"$@" <&- >&- 2>&-', "sh", sys.executable, "-c", code, os.devnull]
    assert subprocess.run(command, timeout=HUNG).returncode == 0
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
