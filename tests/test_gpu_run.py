"""On a GPU with all defaults, a run, its repetition and its resume end in the same bytes."""

import shutil
from pathlib import Path

import pytest
import torch

from tiny_run import changed, run, tiny_config, write_text

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU; the same is tested on a CPU elsewhere"
)


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_run_again_and_a_resume_are_the_same(
    tmp_path: Path, recorded: bool, compiled: bool
) -> None:
    text = write_text(tmp_path)
    config = changed(
        tiny_config(text, tmp_path / "once"),
        device="cuda", compile=compiled, cuda_graph=recorded, total_updates=8,
        checkpoint_interval=4, keep_checkpoints=-1, export_hf=False,
    )  # fmt: skip
    _, said = run(config)
    assert ("micro-batches: recorded as a CUDA graph" in said) is recorded
    run(changed(config, checkpoint_dir=tmp_path / "again"))
    shutil.copytree(tmp_path / "once", tmp_path / "resumed")
    for name in ("checkpoint8", "best_checkpoint"):
        shutil.rmtree(tmp_path / "resumed" / name)
    run(changed(config, checkpoint_dir=tmp_path / "resumed", resume=True))
    once, again, resumed = (
        (tmp_path / name / "checkpoint8" / "model.safetensors").read_bytes()
        for name in ("once", "again", "resumed")
    )
    assert once == again
    assert once == resumed
