"""The GPU benchmark: all steps, rehearsed on a CPU."""

from pathlib import Path

import pytest
import torch
from scripts import checked, run_script

from tiny_run import write_text


def test_every_step_can_be_rehearsed_without_a_gpu(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    flags = ["--rehearse", "--rounds", "1", "--updates", "8"]
    flags += ["--text", str(text.train_dir), "--tokenizer", str(text.tokenizer)]
    results, printed = run_script("gpu.py", flags, tmp_path)
    assert set(results) == {"right", "same", "fast", "attention", "run"}
    assert len(set(results["same"].values())) == 1
    assert all(each["tokens_per_second"] > 0 for each in results["fast"].values())
    assert {"eager", "sdpa"} == set(results["attention"])
    assert sum("valid/bits" in line for line in results["run"]) == 4
    assert "two runs and a resumed one: 1 different" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_gpu_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import gpu

    monkeypatch.setattr("sys.argv", ["gpu.py"])
    assert gpu.main() == 2
    assert "no CUDA GPU" in checked(capsys.readouterr().err)


def test_operators_are_counted_with_and_without_recording(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from scripts import run_main

    import launches

    flags = ["--shape", "demo", "--rounds", "1"]
    results = run_main(launches.main, flags, tmp_path, monkeypatch)
    assert results["recorded"]["operators"] < results["written"]["operators"] / 2
    assert "no views" in checked(capsys.readouterr().out)
