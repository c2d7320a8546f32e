"""A short run of `tests/chaos.py`; docs/reliability.md has the figures of a long one."""

import pytest

import chaos


def test_a_run_that_is_interrupted_at_random_ends_in_the_same_bytes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert chaos.main(["--kills", "1", "--seed", "3", "--only-kills"]) == 0
    assert "\n1 interruptions of " in capsys.readouterr().out
