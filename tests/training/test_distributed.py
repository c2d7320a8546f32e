"""Two ranks compute the same as one process: gradients, losses, errors."""

import os
import socket
import traceback
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import pytest
import torch

from annotated_mpnet.checkpoints.optimizer_state import optimizer_tensors
from annotated_mpnet.errors import ConfigError, DivergedError, UserError
from annotated_mpnet.mpnet.batch import Batch
from annotated_mpnet.mpnet.config import ModelConfig, OptimizationConfig, OptimizerName
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining
from annotated_mpnet.runs.run import explaining_memory
from annotated_mpnet.settings.config import PretrainingConfig
from annotated_mpnet.tracking.tracker import Tracker
from annotated_mpnet.training.distributed import SharedNetwork, World, full_tensor, open_world
from annotated_mpnet.training.muon import choose_optimizer
from annotated_mpnet.training.trainer import Trainer
from processes import forked
from ranks import environment, open_store
from waiting import HUNG

CPU = torch.device("cpu")
NETWORK = ModelConfig(
    vocab_size=97,
    encoder_layers=2,
    encoder_embed_dim=32,
    encoder_ffn_dim=64,
    encoder_attention_heads=4,
    max_positions=32,
    dropout=0.0,
    attention_dropout=0.0,
    activation_dropout=0.0,
)
PREDICTED = (1, 12, 3, 2)
"""Predicted tokens per sequence in the four micro-batches of an update: very unequal."""


def batch(number: int, num_predicted: int) -> Batch:
    generator = torch.Generator().manual_seed(number)
    ids_BL = torch.randint(5, 90, (2, 20), generator=generator)
    positions_BP = torch.stack([torch.randperm(20, generator=generator) for _ in range(2)])
    positions_BP = positions_BP[:, :num_predicted]
    predicted_BP = ids_BL.gather(1, positions_BP)
    return Batch(ids_BL, positions_BP, predicted_BP, None, 40, 2 * num_predicted)


def trainer_of(world: World, *, fsdp: bool, optimizer: OptimizerName = "adamw") -> Trainer:
    torch.manual_seed(0)
    network = SharedNetwork(MPNetForPretraining(NETWORK), world, CPU, fsdp=fsdp)
    # Without clipping, to compare gradients.
    optimization = OptimizationConfig(
        lr=1e-3, warmup_updates=0, clip_grad_norm=0, optimizer=optimizer
    )
    steps = choose_optimizer(network.model, optimization, CPU)
    return Trainer(network, steps, optimization, "mpnet", 12345, False, Tracker.silent())


def train(
    world: World, *, fsdp: bool, optimizer: OptimizerName = "adamw"
) -> dict[str, torch.Tensor]:
    """Return losses, and all weights, gradients and moments after three updates."""
    trainer = trainer_of(world, fsdp=fsdp, optimizer=optimizer)
    losses = []
    for update in range(3):
        batches = [batch(10 * update + m, count) for m, count in enumerate(PREDICTED)]
        losses.append(trainer.update(update, batches[world.rank :: world.size]).loss_sum)
    evaluation = trainer.evaluate(batches[world.rank :: world.size])
    found = {"losses": torch.tensor([*losses, evaluation.bits, evaluation.accuracy])}
    gradients = {n: each.grad for n, each in trainer.model.named_parameters()}
    for name, gradient in gradients.items():
        assert gradient is not None
        found[f"gradient.{name}"] = full_tensor(gradient)
    means = optimizer_tensors(trainer.optimizer, trainer.model)
    found |= {name: full_tensor(each) for name, each in means.items()}
    found |= {name: full_tensor(each) for name, each in trainer.model.state_dict().items()}
    trainer.network.close()
    return {name: each.detach().clone() for name, each in found.items()}


def train_and_save(world: World, directory: Path, fsdp: bool) -> None:
    torch.save(train(world, fsdp=fsdp), directory / f"rank{world.rank}.pt")


def load_again(world: World, directory: Path, fsdp: bool) -> None:
    """Load rank 0's weights into networks with different initial weights."""
    trainer = trainer_of(world, fsdp=fsdp)
    expected = {name: torch.full_like(each, 0.5) for name, each in full_tensors(trainer).items()}
    trainer.network.load(expected if world.is_first else {})
    assert all(torch.equal(each, expected[name]) for name, each in full_tensors(trainer).items())
    trainer.network.close()


def full_tensors(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: full_tensor(each) for name, each in trainer.model.state_dict().items()}


def diverge_on_rank_1(world: World, directory: Path, fsdp: bool) -> None:
    trainer = trainer_of(world, fsdp=fsdp)
    before = {name: each.clone() for name, each in full_tensors(trainer).items()}
    if world.rank == 1:
        next(trainer.model.parameters()).register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(DivergedError, match="gradient norm"):
        trainer.update(0, [batch(world.rank, 3)])
    assert all(torch.equal(each, before[name]) for name, each in full_tensors(trainer).items())
    trainer.network.close()


def diverge_on_rank_1_with_the_deferred_check(world: World, directory: Path, fsdp: bool) -> None:
    trainer = trainer_of(world, fsdp=fsdp)
    trainer.look_later()
    trainer.update(0, [batch(world.rank, 3)])
    before = {name: each.clone() for name, each in full_tensors(trainer).items()}
    for update in (1, 2):
        # Only the loss of one rank in one update is bad; the gradient is good.
        with pytest.MonkeyPatch.context() as patch:
            if (world.rank, update) == (1, 1):
                patch.setattr(torch.Tensor, "detach", lambda self: self * float("inf"))
            trainer.update(update, [batch(world.rank, 3)])
    with pytest.raises(DivergedError, match="the loss of update 2 is inf"):
        trainer.catch_up()
    assert all(torch.equal(each, before[name]) for name, each in full_tensors(trainer).items())
    trainer.network.close()


def agree(world: World, directory: Path, fsdp: bool) -> None:
    assert world.gather(world.rank, 7) == [(0, 7), (1, 7)]
    assert world.sum(world.rank + 1) == [3]
    assert world.on_rank_0(lambda: f"said by {world.rank}") == "said by 0"
    assert world.gather_objects({"rank": world.rank}) == [{"rank": 0}, {"rank": 1}]


def fail_one_after_the_other(world: World, directory: Path, fsdp: bool) -> None:
    if world.rank == 1:
        raise ConfigError("rank 1 has another file")
    world.on_rank_0(lambda: None)


def hit_a_bug_on_rank_1(world: World, directory: Path, fsdp: bool) -> None:
    trainer = trainer_of(world, fsdp=fsdp)
    with closing(trainer.network):
        if world.rank == 1:
            raise KeyError("a bug of ours")
        trainer.update(0, [batch(0, 3)])


def run_out_of_memory_on_rank_1(world: World, directory: Path, fsdp: bool) -> None:
    trainer = trainer_of(world, fsdp=fsdp)
    with closing(trainer.network), explaining_memory(PretrainingConfig(), CPU, world.size):
        if world.rank == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        trainer.update(0, [batch(0, 3)])


def in_process(
    action: Callable[[World, Path, bool], None],
    rank: int,
    variables: dict[str, str],
    directory: Path,
    fsdp: bool,
) -> None:
    os.environ |= variables
    try:
        with open_world(HUNG) as world:
            action(world, directory, fsdp)
    except UserError as error:
        (directory / f"error{rank}").write_text(f"{type(error).__name__} {error.exit_code} {error}")
    except BaseException:
        (directory / f"failed{rank}").write_text(traceback.format_exc())
        raise


def on_two_ranks(
    action: Callable[[World, Path, bool], None],
    directory: Path,
    *,
    fsdp: bool = False,
    codes: Sequence[int] = (0, 0),
) -> None:
    store = open_store()
    processes = [
        forked(in_process, action, rank, environment(rank, 2, store.port), directory, fsdp)
        for rank in range(2)
    ]
    for process in processes:
        process.join(HUNG)
    said = [path.read_text() for path in directory.glob("failed*")]
    assert [process.exitcode for process in processes] == list(codes), said


@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_two_ranks_have_the_gradients_of_one_process(tmp_path: Path, fsdp: bool) -> None:
    on_two_ranks(train_and_save, tmp_path, fsdp=fsdp)
    alone = train(World(), fsdp=False)
    for rank in range(2):
        shared = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert shared.keys() == alone.keys()
        for name, expected in alone.items():
            torch.testing.assert_close(shared[name], expected, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_weights_of_rank_0_reach_all(tmp_path: Path, fsdp: bool) -> None:
    on_two_ranks(load_again, tmp_path, fsdp=fsdp)


def test_a_nan_gradient_on_one_rank_stops_all_before_the_update(
    tmp_path: Path,
) -> None:
    on_two_ranks(diverge_on_rank_1, tmp_path)


def test_an_infinite_loss_on_one_rank_stops_all_with_the_deferred_check(
    tmp_path: Path,
) -> None:
    on_two_ranks(diverge_on_rank_1_with_the_deferred_check, tmp_path)


def test_ranks_agree(tmp_path: Path) -> None:
    on_two_ranks(agree, tmp_path)


def test_only_the_first_rank_to_fail_reports_and_all_exit_with_its_code(tmp_path: Path) -> None:
    on_two_ranks(fail_one_after_the_other, tmp_path)
    assert (tmp_path / "error1").read_text() == "ConfigError 2 rank 1 has another file"
    assert (
        tmp_path / "error0"
    ).read_text() == "FailedElsewhereError 2 rank 1: rank 1 has another file"


def test_a_bug_on_one_rank_keeps_its_traceback_and_the_other_does_not_wait(tmp_path: Path) -> None:
    on_two_ranks(hit_a_bug_on_rank_1, tmp_path, codes=(0, 1))
    assert "KeyError: 'a bug of ours'" in (tmp_path / "failed1").read_text()
    assert (tmp_path / "error0").read_text().startswith("ProcessLostError 1 rank 0 of 2 lost")


def test_out_of_memory_on_one_rank_ends_all_with_the_flags_to_try(tmp_path: Path) -> None:
    on_two_ranks(run_out_of_memory_on_rank_1, tmp_path)
    said = (tmp_path / "error1").read_text()
    assert said.startswith("OutOfMemoryError 7 out of memory on cpu")
    assert "--batch-size 8 --update-freq 16" in said
    assert "--fsdp" in said
    assert (tmp_path / "error0").read_text().startswith("FailedElsewhereError 7 rank 1: out of")


def test_a_rank_that_finds_no_other_gives_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        # Nothing listens on this port, and while it is taken nothing else can.
        taken.bind(("127.0.0.1", 0))
        for name, value in environment(1, 2, taken.getsockname()[1]).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ConfigError, match="rank 1 of 2 did not find the others"), open_world(2):
            pass


def test_alone_nothing_is_exchanged() -> None:
    with open_world(1) as world:
        assert world == World()
        assert world.gather(1, 2) == [(1, 2)]
        assert world.sum(3) == [3]
        assert world.on_rank_0(lambda: "x") == "x"
