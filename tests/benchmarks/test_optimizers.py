"""The benchmark gives each optimizer the same time, and keeps what it has measured."""

from pathlib import Path

import pytest
from scripts import TINY_FLAGS, checked, run_main, without_novels

import optimizers
from tiny_run import TinyText


@pytest.mark.parametrize(("quotient", "fewer"), [(1.4, 3), (14.1, 1)])
def test_the_script_gives_muon_as_many_updates_as_fit_and_measures_nothing_twice(
    text: TinyText,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    quotient: float,
    fewer: int,
) -> None:
    measure = optimizers.cost_of_muon
    # On a busy machine, the measured quotient may be anything.
    monkeypatch.setattr(
        optimizers, "cost_of_muon", lambda *given: {**measure(*given), "quotient": quotient}
    )
    without_novels(optimizers, text, monkeypatch)
    kept = tmp_path / "kept.jsonl"
    flags = ["--updates", "4", "--rounds", "2", "--keep", str(kept), "--seeds", "1", "2"]
    flags += ["--with", "adamw:1e-2", "muon:1e-2:1e-3", "--", *TINY_FLAGS]
    cost, *runs = run_main(optimizers.main, flags, tmp_path, monkeypatch)
    assert len(cost["quotients"]) == 2
    assert [(each["contestant"], each["seed"], each["updates"]) for each in runs] == [
        (name, seed, updates)
        for seed in (1, 2)
        for name, updates in (("adamw:0.01", 4), ("muon:0.01:0.001", fewer))
    ]
    assert len({each["bits"] for each in runs}) == 4
    assert all(len(each["curve"]) == each["updates"] for each in runs)
    assert "mean of 2, muon:0.01:0.001" in checked(capsys.readouterr().out)

    monkeypatch.setattr(optimizers, "train", None)
    monkeypatch.setattr(optimizers, "cost_of_muon", None)
    assert run_main(optimizers.main, flags, tmp_path, monkeypatch) == [cost, *runs]
    assert len(kept.read_text().splitlines()) == 5
