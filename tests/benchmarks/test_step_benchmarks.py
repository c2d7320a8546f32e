"""The benchmarks of a training step report and count what they promise."""

from pathlib import Path

import pytest
import torch
from scripts import TINY, checked, run_main, run_script

from annotated_mpnet.training.throughput import training_flops


def test_throughput_measures_a_contestant_in_its_own_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import throughput

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = [*TINY, "--pairs", "2", "--with", "ours"]
    results = run_main(throughput.main, flags, tmp_path, monkeypatch)
    assert set(results) == {"shape", "ours"}
    ours = results["ours"]
    assert len(ours["seconds"]) == 2
    assert ours["tokens_per_second"] == pytest.approx(2 * 32 / ours["median"])
    assert ours["memory_gb"] > 0
    assert "predicted/s" in checked(capsys.readouterr().out)


def test_a_worker_that_fails_ends_the_benchmark(tmp_path: Path) -> None:
    from contestants import Worker

    script = tmp_path / "ends.py"
    script.write_text("raise SystemExit(3)")
    with pytest.raises(SystemExit, match="a worker failed with exit code 3"):
        Worker("ours", [], str(script))


def test_a_ratio_is_the_median_of_the_ratios_within_rounds() -> None:
    from types import SimpleNamespace

    from common import SHAPES
    from contestants import Setting
    from throughput import table

    # In the second round the machine is three times as slow, for both.
    first = SimpleNamespace(seconds=[1.0, 3.0, 1.0], memory_gb=1.0)
    second = SimpleNamespace(seconds=[2.0, 6.0, 2.4], memory_gb=1.0)
    results = table(Setting(SHAPES["demo"]), {"ours": first, "hf": second})  # type: ignore[dict-item]
    hf = results["hf"]
    assert isinstance(hf, dict)
    assert (hf["ratio_to_first"], hf["median"]) == (2.0, 2.4)


def test_profile_gives_each_part_a_floor(tmp_path: Path) -> None:
    # In a new process, because there the script's name could hide Python's `profile`.
    flags = [*TINY, "--steps", "1", "--rate-size", "64"]
    results, printed = run_script("profile.py", flags, tmp_path)
    parts, total = results["parts"], results["total"]
    assert {"products", "softmax", "random numbers", "copies", "loss", "optimizer"} <= set(parts)
    assert all((part["floor"] is None) == (name == "other") for name, part in parts.items())
    assert sum(part["share"] for part in parts.values()) == pytest.approx(1)
    floors = sum(part["floor"] or 0 for part in parts.values())
    assert floors == pytest.approx(total["floor"])
    assert "ratio" in printed


@pytest.mark.parametrize("name", ["ours", "ours-mlm"])
def test_operations_count_the_work_of_a_step(name: str) -> None:
    from common import Shape, model_config, num_predicted
    from contestants import Setting, build, mode_of
    from roofline import Operations

    shape = Shape(2, 32, 64, 2, 50, 2, 20)
    step = build(name, Setting(shape))
    step()
    with Operations() as operations:
        step()
    config = model_config(shape, 0.0)
    expected = training_flops(config, mode_of(name), shape.batch, 20, num_predicted(20))
    assert sum(operations.flops.values()) == expected
    # AdamW reads weights, gradients and two moments, and writes all but the gradients.
    weights = sum(each.numel() for each in _parameters(config))
    assert operations.bytes["aten::_fused_adamw_"] == pytest.approx(28 * weights, rel=0.01)


def _parameters(config: object) -> list[torch.nn.Parameter]:
    from annotated_mpnet.mpnet.config import ModelConfig
    from annotated_mpnet.mpnet.pretraining import MPNetForPretraining

    assert isinstance(config, ModelConfig)
    return list(MPNetForPretraining(config).parameters())


def test_operations_in_place_read_and_write_their_operand() -> None:
    from roofline import Operations

    values = torch.ones(100)
    with Operations() as operations:
        values.add_(1)
        values.copy_(torch.zeros(1).expand(100))
        torch.nn.functional.embedding(torch.tensor([3, 4]), torch.ones(1000, 10))
    assert operations.bytes["aten::add_"] == 2 * 400
    assert operations.bytes["aten::copy_"] == 400 + 4
    assert operations.bytes["aten::embedding"] == 2 * 2 * 10 * 4


def test_a_floor_is_the_larger_of_arithmetic_and_memory() -> None:
    from roofline import Operations

    with Operations() as operations:
        torch.ones(64, 64) @ torch.ones(64, 64)
    by_arithmetic = operations.floors(product_rate=1.0, bandwidth=1e12)["products"]
    by_memory = operations.floors(product_rate=1e12, bandwidth=1.0)["products"]
    assert (by_arithmetic, by_memory) == (2 * 64**3, 3 * 64**2 * 4)


@pytest.mark.parametrize(
    ("operation", "part"),
    [
        ("aten::mm", "products"),
        ("aten::baddbmm", "products"),
        ("aten::_scaled_dot_product_flash_attention", "fused attention"),
        ("aten::_log_softmax_backward_data", "loss"),
        ("aten::_softmax_backward_data", "softmax"),
        ("aten::randint", "random numbers"),
        ("aten::native_layer_norm_backward", "norms"),
        ("aten::gelu_backward", "non-linearity"),
        ("aten::_fused_adamw_", "optimizer"),
        ("aten::embedding_dense_backward", "embeddings"),
        ("aten::slice_backward", "copies"),
        ("aten::mul_", "elementwise"),
        ("aten::sum", "elementwise"),
        ("aten::view", "other"),
        ("CompiledFunctionBackward", "generated kernels"),
        ("triton_per_fused_add_native_layer_norm_3", "generated kernels"),
        ("_BlockedAttention", "other"),
    ],
)
def test_an_operation_belongs_to_one_part(operation: str, part: str) -> None:
    from roofline import part_of

    assert part_of(operation) == part


def test_a_generated_kernel_has_no_floor_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    from step_profile import table

    times, floors = {"CompiledFunction": 3.0, "aten::mm": 1.0}, {"products": 0.5, "norms": 0.5}
    results = table(times, floors, by_part=False)
    assert results["total"] == {"seconds": 4.0, "floor": 1.0}
    parts = results["parts"]
    assert isinstance(parts, dict)
    assert [part["floor"] for part in parts.values()] == [None, None]
    assert "total                 4.0000  100.0%    1.0000    4.00" in capsys.readouterr().out


def test_flags_change_the_sizes_of_a_shape_in_proportion() -> None:
    import argparse

    from contestants import Setting, add_flags

    parser = argparse.ArgumentParser()
    add_flags(parser)
    shape = Setting.of(parser.parse_args(["--width", "384", "--layers", "2"])).shape
    assert (shape.width, shape.ffn, shape.heads, shape.layers) == (384, 1536, 6, 2)
    assert (shape.batch, shape.length) == (4, 512)
