"""Muon is Muon, its rest is AdamW, and the benchmark keeps what it has measured."""

import doctest
import shutil
import sys
from pathlib import Path

import pytest
import torch
from scripts import checked, run_main
from test_end_to_end import TINY_FLAGS

import muon
import optimizers
from annotated_mpnet.mpnet.config import ModelConfig, OptimizationConfig
from annotated_mpnet.mpnet.optimizer import build_optimizer
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining
from muon import Muon, hidden_matrices, newton_schulz
from tiny_run import write_text

CPU = torch.device("cpu")
CONFIG = OptimizationConfig(lr=0.01, warmup_updates=0, weight_decay=0.1)


@pytest.mark.parametrize("module", [muon, optimizers])
def test_examples_hold(module: object) -> None:
    assert doctest.testmod(module).failed == 0  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 16, 64)])
def test_newton_schulz_agrees_with_an_svd(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    assert (values[:, 0] > 2 * values[:, -1]).all()
    turned = left.mT @ newton_schulz(matrices) @ right.mT
    near_one = turned.diagonal(dim1=1, dim2=2)
    assert near_one.min() > 0.6
    assert near_one.max() < 1.25
    torch.testing.assert_close(turned, torch.diag_embed(near_one), atol=1e-4, rtol=0)


def small_model() -> MPNetForPretraining:
    torch.manual_seed(1)
    return MPNetForPretraining(
        ModelConfig(
            encoder_layers=2,
            encoder_embed_dim=16,
            encoder_ffn_dim=32,
            encoder_attention_heads=2,
            vocab_size=40,
            max_positions=32,
            mask_token_id=39,
        )
    )


def test_each_matrix_takes_the_steps_of_pytorchs_muon_and_all_else_those_of_adamw() -> None:
    model, plain = small_model(), small_model()
    ours = Muon(model, CONFIG, ratio=2.0)
    hidden = hidden_matrices(model)
    assert len(hidden) == 2 * 4 + 1
    assert not any("embed" in name or "bias" in name for name in hidden)
    adamw = build_optimizer(plain, CONFIG, CPU)
    # Queries, keys and values are parameters of their own for PyTorch.
    alone = {
        name: [
            torch.nn.Parameter(part.clone())
            for part in weight.detach().chunk(3 if "in_proj" in name else 1)
        ]
        for name, weight in hidden.items()
    }
    theirs = torch.optim.Muon(
        [part for each in alone.values() for part in each],
        lr=2 * CONFIG.lr, weight_decay=CONFIG.weight_decay, adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    others = dict(plain.named_parameters())
    for _ in range(3):
        for name, weight in model.named_parameters():
            weight.grad = torch.randn_like(weight)
            others[name].grad = weight.grad.clone()
            for part, gradient in zip(
                alone.get(name, []), weight.grad.chunk(len(alone.get(name, [0]))), strict=False
            ):
                part.grad = gradient.clone()
        for optimizer in (ours, theirs, adamw):
            optimizer.step()
    for name, weight in model.named_parameters():
        if name in hidden:
            # bfloat16 rounds products of a batch in another order.
            torch.testing.assert_close(weight, torch.cat(alone[name]), atol=2e-3, rtol=0)
        else:
            assert torch.equal(weight, others[name]), name


def test_the_script_gives_muon_as_many_updates_as_fit_and_measures_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = write_text(tmp_path / "text")

    def prepare(folder: Path, *_: object) -> tuple[Path, str]:
        shutil.copytree(tiny.train_dir.parent, folder / "novels")
        return folder / "novels" / "train", str(tiny.tokenizer)

    monkeypatch.setattr(optimizers, "prepare", prepare)
    kept = tmp_path / "kept.jsonl"
    flags = ["--updates", "4", "--rounds", "2", "--keep", str(kept), "--seeds", "1", "2"]
    flags += ["--with", "adamw:1e-2", "muon:1e-2:1e-3", "--", *TINY_FLAGS]
    cost, *rows = run_main(optimizers.main, flags, tmp_path, monkeypatch)
    fewer = max(1, round(4 / cost["quotient"]))
    assert [(row["contestant"], row["seed"], row["updates"]) for row in rows] == [
        (name, seed, updates)
        for seed in (1, 2)
        for name, updates in (("adamw:0.01", 4), ("muon:0.01:0.001", fewer))
    ]
    assert len({row["bits"] for row in rows}) == 4
    assert all(len(row["curve"]) == row["updates"] for row in rows)
    assert "mean of 2, muon:0.01:0.001" in checked(capsys.readouterr().out)

    monkeypatch.setattr(optimizers, "train", None)
    monkeypatch.setattr(optimizers, "cost_of_muon", None)
    assert run_main(optimizers.main, flags, tmp_path, monkeypatch) == [cost, *rows]
    assert len(kept.read_text().splitlines()) == 5


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--with", "adamw"], "is adamw; expected adamw:RATE"),
        (["--with", "adamw:1e-3:1e-3"], "expected adamw:RATE"),
        (["--with", "muon:fast"], "is muon:fast"),
        (["--with", "muon:nan"], "is muon:nan"),
        (["--with", "sgd:1"], "is sgd:1"),
        (["--updates", "0"], "--updates is 0"),
        (["--", "--lr", "fast"], "--lr"),
    ],
)
def test_a_wrong_flag_is_refused_before_anything_is_done(
    flags: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["optimizers.py", *flags])
    with pytest.raises(SystemExit) as end:
        optimizers.main()
    assert end.value.code == 2
    assert said in capsys.readouterr().err
