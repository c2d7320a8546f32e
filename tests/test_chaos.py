"""A short run of `tests/chaos.py`; docs/reliability.md has the figures of a long one."""

import pytest

import chaos
from processes import Command
from ranks import arguments_of


def test_a_run_that_is_interrupted_at_random_ends_in_the_same_bytes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without the time in which a command imports everything, and is not interrupted here.
    monkeypatch.setattr(chaos.Chaos, "start", lambda _, config: Command(arguments_of(config)))
    assert chaos.main(["--kills", "1", "--seed", "3", "--only-kills"]) == 0
    assert "\n1 interruptions of " in capsys.readouterr().out
