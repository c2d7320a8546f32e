"""The attention benchmark measures implementations that agree, and shows it."""

from pathlib import Path

import pytest
from scripts import run_main

from interpreted import triton_runs

FLAGS = ["--shape", "demo", "--length", "20", "--batch", "1", "--rounds", "2"]


@triton_runs
@pytest.mark.interpreted
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
def test_all_implementations_are_timed_and_agree_with_the_formula(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from attention import main

    names = ["eager", "sdpa", "blocked", "triton"]
    flags = [*FLAGS, "--device", "cpu", "--precision", "fp32", "--with", *names]
    results = run_main(main, flags, tmp_path, monkeypatch)
    assert list(results) == names
    for each in results.values():
        assert len(each["seconds"]) == 2
        assert each["off_by"] < 1e-5
        assert each["same_bits"]
    assert "triton" in capsys.readouterr().out
