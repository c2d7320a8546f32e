"""The predictions follow from the package's own counts."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from scripts import checked, run_main

import scaling
from annotated_mpnet.mpnet.config import ModelConfig
from annotated_mpnet.training.throughput import training_flops
from common import SHAPES, num_predicted
from contestants import Setting

PERFORMANCE = Path(__file__).parents[2] / "docs" / "performance.md"


@pytest.mark.parametrize(("length", "width"), [(512, 768), (128, 256)])
def test_the_formulas_of_a_layer_and_the_head_match_the_counts(length: int, width: int) -> None:
    L, P, D, V = length, num_predicted(length), width, 1000

    def flops(layers: int, vocab: int) -> float:
        sizes = {"encoder_layers": layers, "encoder_embed_dim": D, "encoder_ffn_dim": 4 * D}
        config = ModelConfig(**sizes, encoder_attention_heads=4, vocab_size=vocab)
        return training_flops(config, "mpnet", 1, L, P)

    layer = D**2 * (72 * L + 132 * P) + 12 * D * (L**2 + 2 * P * L + 2 * P**2)
    assert flops(13, V) - flops(12, V) == layer
    # Only the part of the head that depends on the vocabulary.
    assert flops(12, 2 * V) - flops(12, V) == 6 * P * D * V


@pytest.mark.parametrize("table", scaling.TABLES, ids=lambda table: table.__name__)
def test_the_documentation_has_the_scripts_tables(table: object) -> None:
    assert callable(table)
    printed = "\n".join(table())
    checked(printed)
    assert printed in PERFORMANCE.read_text()


def test_a_ring_sends_less_than_twice_the_gradients() -> None:
    sent = [scaling.traffic(1000, ranks) for ranks in (1, 2, 4, 1000)]
    assert sent == [0, 4000, 6000, pytest.approx(8000, rel=0.01)]


def test_time_is_work_at_the_product_rate_plus_memory_at_the_bandwidth() -> None:
    cost = scaling.StepCost(flops=1e9, weights=1000, activation_bytes=1e6)
    assert cost.seconds(product_rate=1e9, bandwidth=1e30) == pytest.approx(1)
    assert cost.seconds(product_rate=1e30, bandwidth=1.0) == pytest.approx(4e6 + 28_000)
    assert cost.memory_bytes == 16_000 + 1e6


def test_measured_ratios_are_shown_next_to_predicted_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shape = SHAPES["demo"]
    shapes = {"base": shape, "batch": replace(shape, batch=2 * shape.batch)}
    workers = {
        "base": SimpleNamespace(seconds=[1.0, 2.0, 1.0], memory_gb=1.0),
        "batch": SimpleNamespace(seconds=[2.1, 4.0, 1.9], memory_gb=1.5),
    }
    results = scaling.compare(Setting(shape), shapes, workers, (1e12, 1e11))  # type: ignore[arg-type]
    batch = results["batch"]
    assert isinstance(batch, dict)
    assert (batch["time_measured"], batch["memory_measured"]) == (2.0, 1.5)
    assert batch["work"] == 2
    assert 1 < batch["memory_predicted"] < 2
    checked(capsys.readouterr().out)


def test_the_script_measures_four_doublings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FakeWorker:
        def __init__(self, name: str, flags: list[str]) -> None:
            # "Uses" as many GB as it has layers.
            self.seconds: list[float] = []
            self.memory_gb = float(flags[flags.index("--layers") + 1])

        def take_a_turn(self) -> None:
            self.seconds.append(1.0)

        def end(self) -> None:
            pass

    monkeypatch.setattr(scaling, "Worker", FakeWorker)
    for name in ("measure_product_rate", "measure_bandwidth"):
        monkeypatch.setattr(scaling, name, lambda *_: 1e9)
    results = run_main(scaling.main, ["--pairs", "2"], tmp_path, monkeypatch)
    assert {"base", "layers", "width", "length", "batch"} <= set(results)
    layers = results["layers"]
    assert layers["memory_measured"] == 2
