"""The benchmark gives each optimizer the same time, and keeps what it has measured."""

import doctest
import shutil
import sys
from pathlib import Path

import pytest
from scripts import checked, run_main
from test_end_to_end import TINY_FLAGS

import optimizers
from tiny_run import write_text


def test_examples_hold() -> None:
    assert doctest.testmod(optimizers).failed == 0


def test_the_script_gives_muon_as_many_updates_as_fit_and_measures_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = write_text(tmp_path / "text")

    def prepare(folder: Path, *_: object) -> tuple[Path, str]:
        shutil.copytree(tiny.train_dir.parent, folder / "novels")
        return folder / "novels" / "train", str(tiny.tokenizer)

    monkeypatch.setattr(optimizers, "prepare", prepare)
    kept = tmp_path / "kept.jsonl"
    flags = ["--updates", "4", "--rounds", "2", "--keep", str(kept), "--seeds", "1", "2"]
    flags += ["--with", "adamw:1e-2", "muon:1e-2:1e-3", "--", *TINY_FLAGS]
    cost, *rows = run_main(optimizers.main, flags, tmp_path, monkeypatch)
    fewer = max(1, round(4 / cost["quotient"]))
    assert [(row["contestant"], row["seed"], row["updates"]) for row in rows] == [
        (name, seed, updates)
        for seed in (1, 2)
        for name, updates in (("adamw:0.01", 4), ("muon:0.01:0.001", fewer))
    ]
    assert len({row["bits"] for row in rows}) == 4
    assert all(len(row["curve"]) == row["updates"] for row in rows)
    assert "mean of 2, muon:0.01:0.001" in checked(capsys.readouterr().out)

    monkeypatch.setattr(optimizers, "train", None)
    monkeypatch.setattr(optimizers, "cost_of_muon", None)
    assert run_main(optimizers.main, flags, tmp_path, monkeypatch) == [cost, *rows]
    assert len(kept.read_text().splitlines()) == 5


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--with", "adamw"], "is adamw; expected adamw:RATE"),
        (["--with", "adamw:1e-3:1e-3"], "expected adamw:RATE"),
        (["--with", "muon:fast"], "is muon:fast"),
        (["--with", "muon:nan"], "is muon:nan"),
        (["--with", "sgd:1"], "is sgd:1"),
        (["--updates", "0"], "--updates is 0"),
        (["--", "--lr", "fast"], "--lr"),
    ],
)
def test_a_wrong_flag_is_refused_before_anything_is_done(
    flags: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["optimizers.py", *flags])
    with pytest.raises(SystemExit) as end:
        optimizers.main()
    assert end.value.code == 2
    assert said in capsys.readouterr().err
