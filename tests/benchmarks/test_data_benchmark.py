"""The data benchmark measures all its parts, and takes the waiting time from the real loop."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from scripts import checked, in_this_process, run_main

import data
import data_parts
from common import SHAPES, Shape
from tiny_run import TinyText


def test_all_tables_have_numbers(
    text: TinyText,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # In this process, because new ones would import everything again.
    monkeypatch.setattr(data, "subprocess", SimpleNamespace(run=in_this_process(data.main), PIPE=0))
    tiny = Shape(layers=1, width=16, ffn=32, heads=2, vocab=400, batch=2, length=32)
    monkeypatch.setitem(SHAPES, "demo", tiny)
    flags = ["--text", str(text.train_dir), "--tokenizer", str(text.tokenizer), "--tokens", "32"]
    flags += ["--seconds", "0.05", "--waiting", "demo", "--updates", "8", "--batch-size", "4"]
    results = run_main(data.main, flags, tmp_path, monkeypatch)
    assert set(results) == {"parts", "start", "collating", "waiting"}
    parts, start, waiting = results["parts"], results["start"], results["waiting"]
    assert all(value > 0 for value in parts.values())
    # Each packing sees all tokens of the text.
    assert [line["tokens"] for line in start[:3]] == 3 * [parts["tokens"]]
    assert set(results["collating"]) == set(data_parts.OBJECTIVES)
    assert 0 <= waiting["demo"]["then"] < 1
    assert waiting["demo"]["seconds_per_update"] > 0
    checked(capsys.readouterr().out)


def test_one_line_has_the_text_of_all_documents(text: TinyText, tmp_path: Path) -> None:
    target = data_parts.write_one_line(text.train_dir, tmp_path / "one.txt")
    written = target.read_text()
    files = sorted(text.train_dir.iterdir())
    assert written.split() == " ".join(file.read_text() for file in files).split()
    assert written.count("\n") == 1
