"""The schedule, which parameters decay, and the names of AdamW's state."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from annotated_mpnet.checkpoints.optimizer_state import load_optimizer_tensors, optimizer_tensors
from annotated_mpnet.errors import CheckpointError
from annotated_mpnet.mpnet.config import OptimizationConfig
from annotated_mpnet.mpnet.optimizer import (
    build_optimizer,
    learning_rate,
    parameter_groups,
    set_learning_rate,
)

CPU = torch.device("cpu")
CONFIG = OptimizationConfig(total_updates=100, warmup_updates=10, lr=0.01)


def rates(**changes: object) -> list[float]:
    config = OptimizationConfig(total_updates=100, warmup_updates=10, lr=0.01, **changes)  # type: ignore[arg-type]
    return [learning_rate(update, config) for update in range(101)]


def test_every_schedule_has_the_same_warm_up_and_never_rises_again() -> None:
    for changes in (
        {},
        {"power": 2.0},
        {"schedule": "cosine"},
        {"schedule": "wsd"},
        {"schedule": "wsd", "decay_updates": 90},
        {"schedule": "wsd", "decay_updates": 1, "end_learning_rate": 0.001},
    ):
        found = rates(**changes)
        assert found[:10] == rates()[:10]
        assert found[10] == 0.01
        assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(found[10:]))
        assert found[100] == changes.get("end_learning_rate", 0.0)


def test_wsd_is_flat_until_the_decay_and_with_a_decay_of_all_the_rest_it_is_the_polynomial() -> (
    None
):
    found = rates(schedule="wsd", decay_updates=20)
    assert set(found[10:81]) == {0.01}
    assert found[90] == pytest.approx(0.005)
    assert found == rates(schedule="wsd")
    assert rates(schedule="wsd", decay_updates=90) == rates()


def test_cosine_is_half_way_in_the_middle_of_the_decay() -> None:
    found = rates(schedule="cosine", end_learning_rate=0.002)
    assert found[55] == pytest.approx(0.006)
    assert found[32] == pytest.approx(0.002 + 0.008 * (1 + math.cos(math.pi * 22 / 90)) / 2)


class Network(nn.Module):
    """A table, a norm, and a head whose weight is tied to the table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.table(tokens)))
        return logits


@pytest.fixture
def model() -> Network:
    torch.manual_seed(3)
    return Network()


def step(model: Network, optimizer: Optimizer, update: int) -> None:
    generator = torch.Generator().manual_seed(update)
    tokens = torch.randint(7, (5,), generator=generator)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(tokens), tokens.roll(1)).backward()
    set_learning_rate(optimizer, learning_rate(update, CONFIG))
    optimizer.step()


def weights_of(model: Network) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_matrices_decay_and_biases_and_norms_do_not(model: Network) -> None:
    names = {parameter: name for name, parameter in model.named_parameters()}
    decaying, exempt = parameter_groups(model, 0.25)
    assert (decaying["weight_decay"], exempt["weight_decay"]) == (0.25, 0.0)
    assert [names[each] for each in decaying["params"]] == ["table.weight"]  # type: ignore[union-attr]
    assert {names[each] for each in exempt["params"]} == {  # type: ignore[union-attr]
        "norm.weight",
        "norm.bias",
        "head.bias",
    }


def test_decay_shrinks_a_matrix_and_leaves_a_norm_alone(model: Network) -> None:
    optimizer = build_optimizer(model, OptimizationConfig(weight_decay=0.5, lr=0.1), CPU)
    set_learning_rate(optimizer, 0.1)
    before = weights_of(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model.table.weight, before[0] * (1 - 0.1 * 0.5))
    assert torch.equal(model.norm.weight, before[1])


def test_frozen_parameters_are_left_out(model: Network) -> None:
    model.norm.requires_grad_(False)
    groups = parameter_groups(model, 0.1)
    assert [len(group["params"]) for group in groups] == [1, 1]  # type: ignore[arg-type]


def test_adamw_has_the_configured_values(model: Network) -> None:
    optimizer = build_optimizer(model, OptimizationConfig(), CPU)
    assert isinstance(optimizer, AdamW)
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.9, 0.98), 1e-6)
        assert group["fused"] is True


def test_first_step_is_the_equation_of_the_docstring(model: Network) -> None:
    optimizer = build_optimizer(model, CONFIG, CPU)
    before = weights_of(model)
    step(model, optimizer, 0)
    rate, gradient = learning_rate(0, CONFIG), model.table.weight.grad
    assert gradient is not None
    # After one step m / (1 - beta1) is the gradient and v / (1 - beta2) its square.
    move = gradient / (gradient.abs() + CONFIG.adam_eps) + CONFIG.weight_decay * before[0]
    torch.testing.assert_close(model.table.weight.detach(), before[0] - rate * move)


def test_learning_rate_rises_to_the_peak_and_falls_to_the_end() -> None:
    config = OptimizationConfig(total_updates=100, warmup_updates=10, lr=1, end_learning_rate=0.1)
    rates = [learning_rate(update, config) for update in range(102)]
    assert rates[:10] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert rates[10] == 1
    assert rates[55] == pytest.approx(0.1 + 0.9 / 2)
    assert rates[99] == pytest.approx(0.1 + 0.9 / 90)
    assert rates[100:] == [0.1, 0.1]


def test_decay_equals_fairseqs_polynomial() -> None:
    config = OptimizationConfig(total_updates=50, warmup_updates=20, lr=1, power=2.0)
    for done in range(20, 50):
        assert learning_rate(done, config) == pytest.approx((1 - (done - 20) / (50 - 20)) ** 2)


@pytest.mark.parametrize("warmup", [0, 7])
def test_runs_without_warm_up_or_without_decay_have_a_rate_for_each_update(warmup: int) -> None:
    config = OptimizationConfig(total_updates=7, warmup_updates=warmup, lr=1)
    rates = [learning_rate(update, config) for update in range(8)]
    assert max(rates) == 1
    assert min(rates[:7]) > 0
    assert rates[7] == 0


@given(
    total=st.integers(1, 10**9),
    share=st.floats(0, 1),
    power=st.floats(0.01, 100),
    place=st.floats(0, 1),
)
def test_learning_rate_is_never_negative_above_the_peak_or_nan(
    total: int, share: float, power: float, place: float
) -> None:
    config = OptimizationConfig(total_updates=total, warmup_updates=int(share * total), power=power)
    rate = learning_rate(int(place * total), config)
    assert math.isfinite(rate)
    assert 0 <= rate <= config.lr


def test_state_has_flat_names_and_one_for_a_tied_parameter(model: Network) -> None:
    optimizer = build_optimizer(model, CONFIG, CPU)
    step(model, optimizer, 0)
    assert set(optimizer_tensors(optimizer, model)) == {
        f"{key}.{name}"
        for key in ("exp_avg", "exp_avg_sq", "step")
        for name in ("table.weight", "norm.weight", "norm.bias", "head.bias")
    }


@pytest.mark.parametrize("kind", ["fused", "foreach", "plain"])
def test_resumed_optimizer_equals_the_uninterrupted_one_to_the_bit(
    model: Network, kind: str
) -> None:
    def build(network: Network) -> Optimizer:
        if kind == "fused":
            return build_optimizer(network, CONFIG, CPU)
        groups = parameter_groups(network, CONFIG.weight_decay)
        return AdamW(groups, foreach=kind == "foreach", fused=False)

    optimizer = build(model)
    for update in range(5):
        step(model, optimizer, update)
    resumed_model = copy.deepcopy(model)
    resumed = build(resumed_model)
    load_optimizer_tensors(resumed, resumed_model, optimizer_tensors(optimizer, model))
    for update in range(5, 10):
        step(model, optimizer, update)
        step(resumed_model, resumed, update)
    for left, right in zip(weights_of(model), weights_of(resumed_model), strict=True):
        assert torch.equal(left, right)
    left_state = optimizer_tensors(optimizer, model)
    right_state = optimizer_tensors(resumed, resumed_model)
    assert left_state.keys() == right_state.keys()
    assert all(torch.equal(left_state[name], right_state[name]) for name in left_state)


def test_loading_copies_the_tensors(model: Network) -> None:
    optimizer = build_optimizer(model, CONFIG, CPU)
    step(model, optimizer, 0)
    saved = {name: each.clone() for name, each in optimizer_tensors(optimizer, model).items()}
    kept = {name: each.clone() for name, each in saved.items()}
    load_optimizer_tensors(optimizer, model, saved)
    step(model, optimizer, 1)
    assert all(torch.equal(saved[name], kept[name]) for name in kept)


def test_loading_keeps_rate_and_decay_of_the_configuration(model: Network) -> None:
    optimizer = build_optimizer(model, CONFIG, CPU)
    step(model, optimizer, 0)
    other = build_optimizer(model, OptimizationConfig(weight_decay=0.9, lr=0.5), CPU)
    set_learning_rate(other, 0.125)
    load_optimizer_tensors(other, model, optimizer_tensors(optimizer, model))
    assert [group["lr"] for group in other.param_groups] == [0.125, 0.125]
    assert [group["weight_decay"] for group in other.param_groups] == [0.9, 0.0]


def test_state_before_the_first_step_is_empty_and_loads(model: Network) -> None:
    optimizer = build_optimizer(model, CONFIG, CPU)
    assert optimizer_tensors(optimizer, model) == {}
    # Reading must not add entries, although PyTorch's state is a defaultdict.
    assert len(optimizer.state) == 0
    step(model, optimizer, 0)
    load_optimizer_tensors(optimizer, model, {})
    assert optimizer_tensors(optimizer, model) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("exp_avg.norm.bias"), r"'exp_avg\.norm\.bias' has no tensor"),
        (lambda state: state.update(extra=torch.zeros(1)), r"shape \(1,\), expected no tensor"),
        (lambda state: state.update({"step.head.bias": torch.zeros(1)}), r"expected shape \(\)"),
        (lambda state: state.update({"exp_avg.norm.bias": torch.zeros(9)}), r"has shape \(9,\)"),
    ],
)
def test_state_of_another_network_is_refused_and_nothing_changed(
    model: Network, change: object, message: str
) -> None:
    optimizer = build_optimizer(model, CONFIG, CPU)
    step(model, optimizer, 0)
    before = {name: each.clone() for name, each in optimizer_tensors(optimizer, model).items()}
    state = dict(before)
    change(state)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=message):
        load_optimizer_tensors(optimizer, model, state)
    after = optimizer_tensors(optimizer, model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_parameter_without_a_gradient_is_found_when_saving_not_when_resuming(
    model: Network,
) -> None:
    optimizer = build_optimizer(model, CONFIG, CPU)
    model.table.weight.grad = torch.ones_like(model.table.weight)
    optimizer.step()
    with pytest.raises(RuntimeError, match="a parameter without a gradient"):
        optimizer_tensors(optimizer, model)
