"""The checkpoint benchmark makes real updates and real checkpoints."""

from pathlib import Path

import pytest
from scripts import checked, run_main

import checkpoints
from common import SHAPES, Shape


def test_updates_are_timed_with_each_kind_of_checkpoint_and_no_files_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = Shape(layers=1, width=16, ffn=32, heads=2, vocab=400, batch=2, length=32)
    monkeypatch.setitem(SHAPES, "demo", tiny)
    flags = ["--shape", "demo", "--length", "32", "--rounds", "2", "--directory", str(tmp_path)]
    results = run_main(checkpoints.main, flags, tmp_path, monkeypatch)
    assert results["parameters"] > 0  # type: ignore[operator]
    rounds = results["rounds"]
    assert isinstance(rounds, list)
    assert [set(each) for each in rounds] == 2 * [set(checkpoints.KINDS)]
    assert all(seconds > 0 for each in rounds for seconds in each.values())
    assert set(results["cost"]) == {"waiting", "overlapped"}  # type: ignore[call-overload]
    checked(capsys.readouterr().out)
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
