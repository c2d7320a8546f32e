"""The book's training loop alone: only `mpnet/` is imported."""

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from annotated_mpnet.mpnet.batch import NOT_PREDICTED, Batch
from annotated_mpnet.mpnet.config import ModelConfig, OptimizationConfig
from annotated_mpnet.mpnet.loop import (
    Evaluation,
    Hooks,
    Network,
    NonFiniteError,
    Progress,
    Setup,
    evaluate,
    train,
    update,
)
from annotated_mpnet.mpnet.optimizer import build_optimizer
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining

CPU = torch.device("cpu")
# Three sequences: the first predicts two tokens, the others one each.
INPUT_IDS = torch.tensor([[0, 4, 8, 4, 2], [0, 4, 8, 6, 2], [0, 5, 4, 9, 2]])
POSITIONS = torch.tensor([[3, 1], [1, 1], [2, 2]])
PREDICTED = torch.tensor([[9, 7], [5, NOT_PREDICTED], [8, NOT_PREDICTED]])


def sequences(first: int, end: int) -> Batch:
    tensors = (each[first:end] for each in (INPUT_IDS, POSITIONS, PREDICTED))
    num_predicted = int((PREDICTED[first:end] != NOT_PREDICTED).sum())
    return Batch(*tensors, None, 5 * (end - first), num_predicted)


ALL = sequences(0, 3)
CUT = [sequences(0, 1), sequences(1, 3)]


def new_setup(*, dropout: float = 0.0) -> Setup:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=20,
        encoder_layers=1,
        encoder_embed_dim=8,
        encoder_ffn_dim=8,
        encoder_attention_heads=2,
        max_positions=8,
        dropout=dropout,
        attention_dropout=0.0,
        activation_dropout=0.0,
    )
    optimization = OptimizationConfig(total_updates=5, lr=0.03, warmup_updates=0)
    network = Network(MPNetForPretraining(config), CPU)
    return Setup(network, build_optimizer(network.model, optimization, CPU), optimization)


class Recorder(Hooks):
    """Records the loop's calls, with a different interval for each kind."""

    log_every, evaluate_every, save_every = 4, 3, 2

    def __init__(self, bits: Iterator[float], stop_after: int | None = None) -> None:
        self.said: list[str] = []
        self.bits = bits
        self.stop_after = stop_after
        self.progress = Progress()

    def updated(self, progress: Progress, *_: object) -> None:
        self.progress = progress

    def log(self, progress: Progress) -> None:
        self.said.append(f"log {progress.update}")

    def evaluate(self, progress: Progress) -> float:
        self.said.append(f"evaluate {progress.update}")
        return next(self.bits)

    def save(self, progress: Progress, best: bool) -> None:
        known = f" knowing {progress.best_valid_bits}"
        self.said.append(f"save {'best' if best else progress.update}{known}")

    def should_stop(self) -> bool:
        return self.progress.update == self.stop_after


def endless() -> Iterator[tuple[list[Batch], str]]:
    number = 0
    while True:
        number += 1
        yield CUT, f"after update {number}"


def test_without_dropout_an_update_does_not_depend_on_its_micro_batches() -> None:
    results = []
    weights = []
    for micro_batches in ([ALL], CUT):
        setup = new_setup()
        results.append(update(setup, 0, micro_batches))
        weights.append(setup.network.model.state_dict())
    at_once, cut = results
    assert at_once.num_predicted == cut.num_predicted == 4
    torch.testing.assert_close(at_once.loss_sum, cut.loss_sum)
    torch.testing.assert_close(at_once.gradient_norm, cut.gradient_norm)
    torch.testing.assert_close(weights[0], weights[1], atol=1e-4, rtol=1e-3)


def test_a_new_network_needs_log2_of_the_vocabulary_in_bits() -> None:
    assert evaluate(new_setup(), [ALL]).bits == pytest.approx(math.log2(20), abs=0.2)


def test_an_evaluation_does_not_depend_on_its_micro_batches() -> None:
    setup = new_setup()
    at_once, cut = evaluate(setup, [ALL]), evaluate(setup, CUT)
    assert at_once.bits == pytest.approx(cut.bits, rel=1e-6)
    assert at_once.accuracy == cut.accuracy


def test_an_evaluation_has_no_dropout_and_changes_nothing() -> None:
    setup = new_setup(dropout=0.5)
    update(setup, 0, CUT)
    weights = {name: each.clone() for name, each in setup.network.model.state_dict().items()}
    generator = torch.get_rng_state()
    assert evaluate(setup, CUT) == evaluate(setup, CUT)
    assert torch.equal(torch.get_rng_state(), generator)
    after = setup.network.model.state_dict()
    assert all(torch.equal(after[name], each) for name, each in weights.items())


def test_an_evaluation_of_nothing_is_nan() -> None:
    result = evaluate(new_setup(), [])
    assert isinstance(result, Evaluation)
    assert math.isnan(result.bits)
    assert math.isnan(result.accuracy)


def test_the_last_update_is_logged_evaluated_and_saved_in_this_order() -> None:
    hooks = Recorder(iter([4.5, 4.0]))
    progress = train(new_setup(), Progress(), endless(), hooks)
    assert hooks.said == [
        "save 2 knowing inf",
        "evaluate 3",
        "save best knowing 4.5",
        "log 4",
        "save 4 knowing 4.5",
        "log 5",
        "evaluate 5",
        "save best knowing 4.0",
        "save 5 knowing 4.0",
    ]
    assert progress == Progress(5, 75, 20, 4.0, "after update 5")


@pytest.mark.parametrize("bits", [math.nan, 4.5, 5.0])
def test_only_a_lower_loss_is_the_best(bits: float) -> None:
    hooks = Recorder(iter([bits]))
    start = Progress(update=4, best_valid_bits=4.5)
    assert train(new_setup(), start, endless(), hooks).best_valid_bits == 4.5
    assert hooks.said == ["log 5", "evaluate 5", "save 5 knowing 4.5"]


def test_a_stop_comes_after_a_checkpoint_between_two_updates() -> None:
    hooks = Recorder(iter([4.5]), stop_after=3)
    progress = train(new_setup(), Progress(), endless(), hooks)
    assert progress.update == 3
    assert hooks.said[-1] == "save 3 knowing 4.5"


def test_continuing_from_a_progress_gives_the_same_run() -> None:
    whole, parts = new_setup(dropout=0.5), new_setup(dropout=0.5)
    train(whole, Progress(), endless(), Hooks())
    first = train(parts, Progress(), endless(), Recorder(iter([4.5]), stop_after=2))
    torch.rand(10)
    train(parts, first, endless(), Hooks())
    expected = whole.network.model.state_dict()
    found = parts.network.model.state_dict()
    assert all(torch.equal(found[name], each) for name, each in expected.items())


def test_a_nan_loss_is_refused_before_the_step() -> None:
    setup = new_setup()
    before = {name: each.clone() for name, each in setup.network.model.state_dict().items()}

    class Spoilt(Network):
        def loss_sum(self, *arguments: object) -> torch.Tensor:
            return super().loss_sum(*arguments) * math.nan  # type: ignore[arg-type]

    spoilt = replace(setup, network=Spoilt(setup.network.model, CPU))
    with pytest.raises(NonFiniteError, match="the loss of update 4 is nan"):
        update(spoilt, 3, CUT)
    after = setup.network.model.state_dict()
    assert all(torch.equal(after[name], each) for name, each in before.items())
