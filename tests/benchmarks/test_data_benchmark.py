"""The benchmark of the data side measures all its parts, and reads waiting off the real loop."""

import argparse
import doctest
import sys
from pathlib import Path

import pytest
from scripts import checked, run_main

import data
import data_parts
from common import SHAPES, Shape
from tiny_run import TinyText, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TinyText:
    return write_text(tmp_path_factory.mktemp("text"))


def test_examples_hold() -> None:
    assert doctest.testmod(data_parts).failed == 0


def test_all_tables_are_filled(
    text: TinyText,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # In this process instead of one for each measurement, which would take imports each time.
    def run_child(arguments: object, *child: str, text: Path | None = None, **_: object) -> object:
        values = dict(vars(arguments))
        if text is not None:
            values["text"] = text
        return data.measure(argparse.Namespace(**values), *child)

    monkeypatch.setattr(data, "run_child", run_child)
    tiny = Shape(layers=1, width=16, ffn=32, heads=2, vocab=400, batch=2, length=32)
    monkeypatch.setitem(SHAPES, "demo", tiny)
    flags = ["--text", str(text.train_dir), "--tokenizer", str(text.tokenizer), "--tokens", "32"]
    flags += ["--seconds", "0.05", "--waiting", "demo", "--updates", "8", "--batch-size", "4"]
    results = run_main(data.main, flags, tmp_path, monkeypatch)
    assert set(results) == {"parts", "start", "collating", "waiting"}
    parts, start, waiting = results["parts"], results["start"], results["waiting"]
    assert isinstance(parts, dict)
    assert isinstance(start, list)
    assert isinstance(waiting, dict)
    assert all(value > 0 for value in parts.values())
    # The same text in four ways: each packing sees all of its tokens.
    assert [row["tokens"] for row in start[:3]] == 3 * [parts["tokens"]]
    assert set(results["collating"]) == set(data_parts.OBJECTIVES)  # type: ignore[call-overload]
    assert 0 <= waiting["demo"]["then"] < 1
    assert waiting["demo"]["seconds_per_update"] > 0
    checked(capsys.readouterr().out)


def test_a_child_measures_in_a_process_of_its_own(text: TinyText, tmp_path: Path) -> None:
    arguments = argparse.Namespace(
        text=text.train_dir, tokenizer=str(text.tokenizer), tokens=32, workers=0, batch_size=4,
        seconds=0.05, folder=tmp_path,
    )  # fmt: skip
    found = data.run_child(arguments, "parts", environment=data.ONE_CORE)
    assert {"reading", "tokenising", "cutting, full", "tokens"} <= set(found)


def test_one_line_is_all_documents_in_one(text: TinyText, tmp_path: Path) -> None:
    target = data_parts.write_one_line(text.train_dir, tmp_path / "one.txt")
    written = target.read_text()
    files = sorted(text.train_dir.iterdir())
    assert written.split() == " ".join(file.read_text() for file in files).split()
    assert written.count("\n") == 1


def test_a_shape_without_its_number_of_updates_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["data.py", "--waiting", "demo", "base4", "--updates", "3"])
    with pytest.raises(SystemExit) as end:
        data.main()
    assert end.value.code == 2
    assert "--updates has 1 numbers; expected one for each" in capsys.readouterr().err
