"""Muon: singular values near 1, PyTorch's steps, exact resumes, several ranks, and refusals."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_distributed import NETWORK, batch, on_two_ranks, train, trainer_of
from test_numerics import assert_same, everything, files_of, run_until

from annotated_mpnet.checkpoints.optimizer_state import load_optimizer_tensors, optimizer_tensors
from annotated_mpnet.errors import CheckpointError, DivergedError
from annotated_mpnet.mpnet.config import OptimizationConfig
from annotated_mpnet.mpnet.optimizer import build_optimizer
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining
from annotated_mpnet.settings.config import PretrainingConfig
from annotated_mpnet.training.distributed import World
from annotated_mpnet.training.muon import Muon, hidden_matrices, newton_schulz
from annotated_mpnet.training.trainer import Trainer
from tiny_run import TinyText, bare_runs, changed, run, tiny_config

CPU = torch.device("cpu")
CONFIG = OptimizationConfig(lr=0.01, warmup_updates=0, weight_decay=0.1)


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


def model_of(seed: int) -> MPNetForPretraining:
    torch.manual_seed(seed)
    return MPNetForPretraining(NETWORK)


def test_the_matrices_of_layers_and_head_go_to_muon_and_nothing_else() -> None:
    kinds = ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "fc1.weight", "fc2.weight")
    layers = [f"sentence_encoder.layers.{layer}.{kind}" for layer in range(2) for kind in kinds]
    model = model_of(1)
    assert list(hidden_matrices(model)) == [*layers, "lm_head.dense.weight"]
    updated = [each for group in Muon(model, CONFIG, CPU).param_groups for each in group["params"]]
    assert len(updated) == len(set(updated)) == len(list(model.parameters()))
    model.lm_head.requires_grad_(False)
    assert list(hidden_matrices(model)) == layers
    updated = [each for group in Muon(model, CONFIG, CPU).param_groups for each in group["params"]]
    assert all(each.requires_grad for each in updated)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this PyTorch has no Muon")
def test_each_matrix_takes_the_steps_of_pytorchs_muon_and_all_else_those_of_adamw() -> None:
    model, plain = model_of(1), model_of(1)
    ours, adamw = Muon(model, CONFIG, CPU), build_optimizer(plain, CONFIG, CPU)
    hidden, others = hidden_matrices(model), dict(plain.named_parameters())
    # For PyTorch, queries, keys and values are parameters of their own.
    count = {name: 3 if "in_proj" in name else 1 for name in hidden}
    alone = {
        name: [torch.nn.Parameter(part.detach().clone()) for part in weight.chunk(count[name])]
        for name, weight in hidden.items()
    }
    theirs = torch.optim.Muon(
        [part for each in alone.values() for part in each],
        lr=2 * CONFIG.lr, weight_decay=CONFIG.weight_decay, adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    for _ in range(3):
        for name, weight in model.named_parameters():
            weight.grad = torch.randn_like(weight)
            others[name].grad = weight.grad.clone()
            if name in hidden:
                for part, gradient in zip(alone[name], weight.grad.chunk(count[name]), strict=True):
                    part.grad = gradient.clone()
        for optimizer in (ours, theirs, adamw):
            optimizer.step()
    for name, weight in model.named_parameters():
        if name in hidden:
            # A step is about 0.004 long; bfloat16 has three digits, and each rounds on its own.
            torch.testing.assert_close(weight, torch.cat(alone[name]), atol=4e-4, rtol=0)
        else:
            assert torch.equal(weight, others[name]), name


def test_the_matrices_have_twice_the_rate_or_the_one_of_the_flag() -> None:
    steps = []
    for config in (
        CONFIG,
        replace(CONFIG, muon_lr=0.02),
        replace(CONFIG, muon_lr=0.005),
        replace(CONFIG, lr=0.005, muon_lr=0.01),
    ):
        model = model_of(1)
        before = [each.detach().clone() for each in model.parameters()]
        for each in model.parameters():
            each.grad = torch.ones_like(each)
        Muon(model, config, CPU).step()
        moved = [now - then for now, then in zip(model.parameters(), before, strict=True)]
        names = [name for name, _ in model.named_parameters()]
        steps.append([moved[names.index(f"lm_head.{each}")] for each in ("dense.weight", "bias")])
    (matrix, bias), (same, same_bias), (quarter, _), (half, half_bias) = steps
    torch.testing.assert_close(same, matrix)
    torch.testing.assert_close(same_bias, bias)
    torch.testing.assert_close(4 * quarter, matrix, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(2 * half, matrix, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(2 * half_bias, bias)


def updated(trainer: Trainer, first: int, last: int) -> Trainer:
    for update in range(first, last):
        trainer.update(update, [batch(update, 3)])
    return trainer


def test_state_has_names_and_comes_back_to_the_bit() -> None:
    trainer = updated(trainer_of(World(), fsdp=False, optimizer="muon"), 0, 2)
    state = {
        name: tensor.clone()
        for name, tensor in optimizer_tensors(trainer.optimizer, trainer.model).items()
    }
    hidden = {f"momentum.{name}" for name in hidden_matrices(trainer.model)}
    assert {name for name in state if name.startswith("momentum.")} == hidden
    assert len(state) == len(hidden) + 3 * (len(list(trainer.model.parameters())) - len(hidden))

    other = trainer_of(World(), fsdp=False, optimizer="muon")
    other.model.load_state_dict(trainer.model.state_dict())
    load_optimizer_tensors(other.optimizer, other.model, state)
    assert_same(everything(updated(other, 2, 4)), everything(updated(trainer, 2, 4)))


def test_the_state_of_the_other_optimizer_is_refused_with_both_names() -> None:
    adamw = updated(trainer_of(World(), fsdp=False), 0, 1)
    muon = updated(trainer_of(World(), fsdp=False, optimizer="muon"), 0, 1)
    for one, other, said in (
        (adamw, muon, "was trained with --optimizer adamw, and this run has --optimizer muon"),
        (muon, adamw, "was trained with --optimizer muon, and this run has --optimizer adamw"),
    ):
        before = everything(other)
        with pytest.raises(CheckpointError, match=said):
            load_optimizer_tensors(
                other.optimizer, other.model, optimizer_tensors(one.optimizer, one.model)
            )
        assert_same(everything(other), before)


def test_an_update_that_a_gpu_refuses_changes_nothing() -> None:
    trainer, plain = (trainer_of(World(), fsdp=False, optimizer="muon") for _ in range(2))
    trainer.look_later()
    updated(trainer, 0, 2)
    # The check itself changes no bit.
    assert_same(everything(trainer), everything(updated(plain, 0, 2)))
    before = everything(trainer)
    hook = trainer.model.lm_head.dense.weight.register_hook(lambda gradient: gradient * torch.inf)
    updated(trainer, 2, 3)
    hook.remove()
    updated(trainer, 3, 4)
    assert_same(everything(trainer), before)
    with pytest.raises(DivergedError, match="update 3"):
        trainer.catch_up()


def train_both_ways(world: World, directory: Path, fsdp: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        # In bfloat16, sums in another order are too far apart to compare.
        patch.setattr("annotated_mpnet.training.muon.fastest_dtype", lambda _: torch.float32)
        for sharded in (False, True):
            found = train(world, fsdp=sharded, optimizer="muon")
            torch.save(found, directory / f"{world.rank}{sharded}.pt")


def test_two_ranks_take_the_steps_of_one_process_with_whole_weights_and_with_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_two_ranks(train_both_ways, tmp_path)
    monkeypatch.setattr("annotated_mpnet.training.muon.fastest_dtype", lambda _: torch.float32)
    alone = train(World(), fsdp=False, optimizer="muon")
    for file in ("0False", "1False", "0True", "1True"):
        shared = torch.load(tmp_path / f"{file}.pt", weights_only=True)
        assert shared.keys() == alone.keys()
        for name, expected in alone.items():
            torch.testing.assert_close(shared[name], expected, rtol=1e-4, atol=1e-5, msg=name)


@pytest.fixture
def config(text: TinyText, tmp_path: Path) -> Iterator[PretrainingConfig]:
    with bare_runs():
        config = tiny_config(text, tmp_path / "run")
        yield changed(config, optimizer="muon", test_file=None, export_hf=False, total_updates=4)


def test_a_resumed_run_equals_the_uninterrupted_one(
    config: PretrainingConfig, tmp_path: Path
) -> None:
    whole = changed(config, checkpoint_dir=tmp_path / "whole")
    _, said = run(whole)
    assert "optimizer: Muon at 0.002 for the matrices of layers and head, AdamW at 0.001" in said
    assert "weights, gradients and Muon:" in said
    run_until(2, config)
    run(changed(config, resume=True))
    assert files_of(config, 4) == files_of(whole, 4)


def test_a_resume_with_another_optimizer_is_refused(config: PretrainingConfig) -> None:
    run_until(2, config)
    with pytest.raises(CheckpointError, match="--optimizer muon, and this run has --optimizer ad"):
        run(changed(config, resume=True, optimizer="adamw"))
