"""`benchmarks/objectives.py` trains all in the same time and the same updates, and continues."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scripts import TINY_FLAGS, checked, in_this_process, run_main, without_novels

import objectives
import probe
from annotated_mpnet.conversion import load_any
from tiny_run import TinyText

NAMES = ["mpnet", "mlm", "plm", "hf"]


class Costs:
    """Workers that need a second for an update, MPNet's two."""

    def __init__(self, name: str, *_: object) -> None:
        self.seconds = [2.0 if name == "mpnet" else 1.0] * 3 + [100.0]

    def take_a_turn(self) -> None: ...

    def end(self) -> None: ...


def start(
    text: TinyText, folder: Path, monkeypatch: pytest.MonkeyPatch, *flags: str
) -> tuple[list[dict[str, Any]], list[str]]:
    """Run the script without a probe, and return its lines and the models that it would probe."""
    asked = []

    def ask(model: str, *_: object) -> probe.Scores:
        assert load_any(model).tokenizer is not None
        asked.append(model)
        return {"sts": [0.2], "novel": [0.3, 0.5]}

    monkeypatch.setattr(objectives, "Worker", Costs)
    without_novels(objectives, text, monkeypatch)
    monkeypatch.setattr(objectives, "read_tasks", lambda *_: None)
    monkeypatch.setattr(objectives, "probe", ask)

    def child(command: list[str], **options: object) -> SimpleNamespace:
        done = in_this_process(objectives.main)(command, **options)
        return SimpleNamespace(stdout=done.stdout, returncode=0)

    monkeypatch.setattr(objectives, "subprocess", SimpleNamespace(run=child, PIPE=0))
    command = ["--minutes", "0.1", "--at", "0.5", "--out", str(folder / "out"), *flags]
    results = run_main(objectives.main, [*command, "--", *TINY_FLAGS], folder, monkeypatch)
    return results, asked


def test_all_learners_are_probed_after_the_same_time_and_the_same_updates(
    text: TinyText,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    picture = tmp_path / "curves.svg"
    flags = ["--seeds", "1", "--picture", str(picture)]
    results, asked = start(text, tmp_path, monkeypatch, *flags)
    runs = [(each["learner"], each["updates"]) for each in results if each["kind"] == "run"]
    # Six seconds: three updates of MPNet, six of the others, which also make three.
    others = [(name, updates) for updates in (6, 3) for name in NAMES[1:]]
    assert runs == [("mpnet", 3), *others]
    scores = [each for each in results if each["kind"] == "scores"]
    assert [each["update"] for each in scores] == [2, 3] + [3, 6] * 3 + [2, 3] * 3
    assert [each["tokens"] for each in scores[:2]] == [2 * 4 * 32, 3 * 4 * 32]
    assert len(set(asked)) == len(asked) == len(scores)
    printed = checked(capsys.readouterr().out)
    assert "mpnet: 2000.0 ms an update, 3 updates" in printed
    assert "the same time" in printed
    assert "mlm, 3 updates" in printed
    assert "mlm, 6 updates" in printed
    assert "<svg" in picture.read_text()


def test_a_restart_measures_only_what_is_missing(
    text: TinyText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--learners", "mpnet", "mlm", "--seeds", "1"]
    whole, _ = start(text, tmp_path, monkeypatch, *flags)
    file = tmp_path / "out" / "results.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    assert [json.loads(line) for line in lines] == whole
    # Killed while the last line was written, and while the last run was trained.
    file.write_text("".join(lines[:-3]) + lines[-3][:20])
    shutil.rmtree(Path(tmp_path / "out" / "models" / "mlm-seed1-3"))
    again, asked = start(text, tmp_path, monkeypatch, *flags)
    assert again[:-3] == whole[:-3]
    assert [each["kind"] for each in again[-3:]] == ["run", "scores", "scores"]
    assert [Path(model).parent.name for model in asked] == ["mlm-seed1-3"] * 2
    # Nothing is missing now; then a seed is.
    assert start(text, tmp_path, monkeypatch, *flags) == (again, [])
    more, asked = start(text, tmp_path, monkeypatch, *flags, "2")
    assert {each["seed"] for each in more[len(again) :]} == {2}
    assert len(asked) == 6


def test_results_of_other_settings_are_not_continued(
    text: TinyText,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--learners", "mpnet", "--seeds", "1"]
    start(text, tmp_path, monkeypatch, *flags)
    before = (tmp_path / "out" / "results.jsonl").read_text()
    with pytest.raises(SystemExit) as end:
        start(text, tmp_path, monkeypatch, *flags, "--probe-lr", "0.1")
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "--probe-lr is 0.1, and" in said
    assert "was measured with 0.001; name another folder with --out" in said
    assert (tmp_path / "out" / "results.jsonl").read_text() == before


def test_a_wrong_text_is_named_and_the_folder_stays_usable(
    text: TinyText,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--learners", "mlm", "--seeds", "1"]
    with pytest.raises(SystemExit) as end:
        start(text, tmp_path, monkeypatch, *flags, "--text", "nowhere")
    assert end.value.code == 3
    said = capsys.readouterr().err
    assert said.startswith("objectives.py: --text 'nowhere' does not exist")
    assert said.count("\n") == 1
    results, _ = start(text, tmp_path, monkeypatch, *flags)
    assert results[0]["settings"]["text"] is None
