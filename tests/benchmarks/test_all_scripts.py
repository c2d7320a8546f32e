"""What all benchmarks have in common: their doctests, and how they refuse wrong flags."""

import doctest
import importlib
import sys

import pytest
from scripts import BENCHMARKS

# `profile` would be Python's own module. It starts `step_profile`.
MODULES = sorted(path.stem for path in BENCHMARKS.glob("*.py") if path.stem != "profile")


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_the_script_hold(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize(
    ("script", "flags", "code", "said"),
    [
        ("data", "--waiting demo base4 --updates 3", 2, "--updates has 1 values; expected one for"),
        ("end_to_end", "--minutes 0", 2, "--minutes is 0"),
        ("end_to_end", "-- --lr fast", 2, "--lr"),
        ("objectives", "--minutes 0", 2, "--minutes is 0"),
        ("objectives", "--at 0.5 25", 2, "--at is 25"),
        ("objectives", "-- --lr fast", 2, "--lr"),
        ("optimizers", "--with adamw", 2, "is adamw; expected adamw:RATE"),
        ("optimizers", "--with adamw:1e-3:1e-3", 2, "expected adamw:RATE"),
        ("optimizers", "--with muon:fast", 2, "is muon:fast"),
        ("optimizers", "--with muon:nan", 2, "is muon:nan"),
        ("optimizers", "--with sgd:1", 2, "is sgd:1"),
        ("optimizers", "--updates 0", 2, "--updates is 0"),
        ("optimizers", "-- --lr fast", 2, "--lr"),
        ("probe", "nowhere.pt --examples 5", 2, "--examples is 5; expected at least 100"),
        ("probe", "nowhere.pt --examples 100", 4, "probe.py: 'nowhere.pt' does not exist"),
        ("probe", "nowhere.pt --stsb nowhere", 3, "no file *en-test.csv"),
        ("probe", "nowhere.pt --masked nowhere --examples 100", 3, "--masked"),
    ],
)
def test_a_wrong_flag_is_refused(
    script: str,
    flags: str,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags.split()])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(script).main()
    assert end.value.code == code
    assert said in capsys.readouterr().err
