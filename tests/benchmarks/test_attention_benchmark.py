"""The benchmark of attention measures ways that agree, and says so."""

from pathlib import Path

import pytest
from scripts import run_main

FLAGS = ["--shape", "demo", "--length", "20", "--batch", "1", "--pairs", "2", "--tiles", "32x16"]


@pytest.mark.interpreted
def test_all_ways_are_timed_and_agree_with_the_formula(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from annotated_mpnet.fast import triton_attention
    from attention import main

    monkeypatch.setattr(triton_attention, "TILES", triton_attention.TILES)  # put back afterwards
    ways = ["eager", "sdpa", "blocked", "triton"]
    flags = [*FLAGS, "--device", "cpu", "--precision", "fp32", "--with", *ways]
    results = run_main(main, flags, tmp_path, monkeypatch)
    assert list(results) == ["eager", "sdpa", "blocked", "triton 32x16"]
    for each in results.values():
        assert len(each["seconds"]) == 2
        assert each["off_by"] < 1e-5
        assert each["same_bits"]
    assert "triton 32x16" in capsys.readouterr().out
