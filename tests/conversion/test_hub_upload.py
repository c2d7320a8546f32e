"""`convert-to-hf --push-to-hub`: what arrives at the Hub, and each way in which it can fail."""

import shlex
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from fake_hub import FakeHub, hub
from tiny_models import convert_to_hf, save_tiny_checkpoint, tiny_model

from annotated_mpnet import cli
from folders import tree

NAME = "me/mine"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    save_tiny_checkpoint(tmp_path / "run", 7, "checkpoint7", tiny_model())
    return tmp_path / "run"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with hub(monkeypatch) as server:
        yield server


def convert(run: Path, *flags: str) -> int | str | None:
    """Run the command, with its export in `hf` next to the run; return the exit code."""
    return convert_to_hf(run, run.parent / "hf", *flags)


def test_command_of_the_guide_does_it(
    run: Path, server: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    guide = Path(__file__).parents[2] / "docs" / "guide" / "export.md"
    (command,) = [line for line in guide.read_text().splitlines() if "--push-to-hub OW" in line]
    run.parent.joinpath("checkpoints").mkdir()
    run.rename(run.parent / "checkpoints" / "mine")
    monkeypatch.chdir(run.parent)
    program, *words = shlex.split(command)
    assert cli._ending(program, cli._convert, words) == 0
    assert list(server.files) == ["OWNER/my-mpnet"]


def test_export_is_uploaded_whole_with_its_name_in_the_card(
    run: Path, server: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(run, "--push-to-hub", NAME, "--private") == 0
    assert f"uploaded: {server.address}/{NAME}" in capsys.readouterr().out
    assert server.files == {NAME: tree(run.parent / "hf")}
    assert "private" in str(server.created)
    card = server.files[NAME]["README.md"].decode()
    assert "# mine" in card
    assert f"SentenceTransformer({NAME!r})" in card
    assert f'pipeline("fill-mask", {NAME!r})' in card


def test_upload_replaces_an_older_export_and_nothing_else(run: Path, server: FakeHub) -> None:
    others = {"picture.png": b"a picture", "onnx/model.onnx": b"a graph", ".gitattributes": b"x"}
    stale = {"pytorch_model.bin": b"old", "modules.json": b"old", "1_Pooling/config.json": b"old"}
    server.files[NAME] = {**others, **stale, "config.json": b"old"}
    assert convert(run, "--push-to-hub", NAME) == 0
    assert server.files[NAME] == {**others, **tree(run.parent / "hf")}
    assert "private" not in str(server.created)


@pytest.mark.parametrize("name", ["mine", "me/mi ne", "./me/mine", "me/-mine", "a/b/c", "me/x.git"])
def test_name_that_no_repository_can_have_is_refused_at_once(
    run: Path, server: FakeHub, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert convert(run, "--push-to-hub", name) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"--push-to-hub is {name!r}; expected OWNER/NAME" in said
    assert server.asked == []
    assert not (run.parent / "hf").exists()


@pytest.mark.parametrize(
    ("flags", "offline", "message"),
    [
        (["--push-to-hub", NAME], False, "needs a token, and there is none; log in with"),
        (["--push-to-hub", NAME], True, "needs the Hub, and HF_HUB_OFFLINE is set"),
        (["--private"], False, "--private is about the repository of --push-to-hub"),
    ],
)
def test_what_cannot_be_uploaded_is_not_converted(
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    offline: bool,
    message: str,
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert convert(run, *flags) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert message in said
    assert not (run.parent / "hf").exists()


@pytest.mark.parametrize(
    ("part", "status", "message"),
    [
        ("create", 401, "answers 401: it does not know the token; log in with"),
        ("create", 403, "answers 403: the token may not write there"),
        ("commit", 403, "answers 403: the token may not write there"),
        ("preupload", 404, "answers 404: there is no such owner or repository"),
        ("commit", 400, "answers 400: "),
    ],
)
def test_refusal_of_the_hub_leaves_the_export_and_says_how_to_upload_it(
    run: Path,
    server: FakeHub,
    capsys: pytest.CaptureFixture[str],
    part: str,
    status: int,
    message: str,
) -> None:
    server.refusals = {part: status}
    assert convert(run, "--push-to-hub", NAME) == 6
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert message in said
    assert f"The export is complete in {run.parent / 'hf'}; to upload it: hf upload {NAME}" in said
    assert "model.safetensors" in tree(run.parent / "hf")


def test_hub_out_of_reach_is_one_line(
    run: Path,
    server: FakeHub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # A port of this machine at which nothing listens.
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    assert convert(run, "--push-to-hub", NAME) == 6
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "the upload failed (" in said
    assert "check the connection. The export is complete" in said
