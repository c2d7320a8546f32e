"""Our entries in natural order equal the paper's permuted two streams, in any shape and setting.

In float64, rounding cannot hide a difference of formulas: the two must agree to 1e-10. Only the
model's sinusoids are a float32 table.
"""

import dataclasses
import itertools
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import oracle_encode, oracle_logits
from samples import (
    INPUT_MODES,
    TINY,
    logits_of,
    random_batch,
    random_model,
    relative_difference,
)

from annotated_mpnet.fast.attention import ATTENTIONS, AttentionName
from annotated_mpnet.mpnet.batch import NOT_PREDICTED
from annotated_mpnet.mpnet.config import ActivationName, InputMode, ModelConfig, PositionEmbedding

RELATIVE = ((32, 128), (0, 128), (8, 12))
PADDED = (False, True)


@dataclasses.dataclass(frozen=True)
class Case:
    input_mode: InputMode
    activation_fn: ActivationName
    normalize_before: bool
    relative: tuple[int, int]
    position_embedding: PositionEmbedding
    padded: bool

    @property
    def config(self) -> ModelConfig:
        return dataclasses.replace(
            TINY,
            activation_fn=self.activation_fn,
            normalize_before=self.normalize_before,
            relative_attention_num_buckets=self.relative[0],
            relative_attention_max_distance=self.relative[1],
            position_embedding=self.position_embedding,
        )

    @property
    def tolerance(self) -> float:
        return 1e-10 if self.position_embedding == "learned" else 1e-4

    def __str__(self) -> str:
        norm = "prenorm" if self.normalize_before else "postnorm"
        padded = "padded" if self.padded else "full"
        buckets = f"{self.relative[0]}buckets"
        position = self.position_embedding
        return f"{self.input_mode}-{self.activation_fn}-{norm}-{buckets}-{position}-{padded}"


def cases() -> list[Case]:
    """Combine every mode, activation and norm, and vary the other settings with them."""
    everything = itertools.product(
        enumerate(INPUT_MODES), enumerate(get_args(ActivationName)), enumerate((False, True))
    )
    positions: tuple[PositionEmbedding, ...] = ("learned", "sinusoidal")
    return [
        Case(
            input_mode,
            activation,
            norm,
            relative=RELATIVE[(m + a + n) % 3],
            position_embedding=positions[(m // 2 + a // 3 + n) % 2],
            padded=PADDED[(m + a // 2) % 2],
        )
        for (m, input_mode), (a, activation), (n, norm) in everything
    ]


def test_cases_cover_every_pair_of_settings() -> None:
    columns = list(zip(*map(dataclasses.astuple, cases()), strict=True))
    for one, other in itertools.combinations(columns, 2):
        missing = set(itertools.product(one, other)) - set(zip(one, other, strict=True))
        assert not missing


@pytest.mark.parametrize("attention", ["eager", "sdpa", "blocked"])
@pytest.mark.parametrize("case", cases(), ids=str)
def test_model_equals_oracle(case: Case, attention: AttentionName) -> None:
    model = random_model(case.config).double()
    model.use_attention(ATTENTIONS[attention])
    lengths = [17, 23, 9] if case.padded else [23, 23, 23]
    batch = random_batch(7, lengths, [3, 5, 1], input_mode=case.input_mode)
    with torch.no_grad():
        actual_BPV = logits_of(model, batch, case.input_mode)
        wanted_BPV = oracle_logits(model.state_dict(), case.config, batch, case.input_mode)
    torch.testing.assert_close(actual_BPV, wanted_BPV, rtol=0, atol=case.tolerance, equal_nan=True)


@settings(max_examples=60)
@given(data=st.data(), input_mode=st.sampled_from(INPUT_MODES), pre_norm=st.booleans())
def test_model_equals_oracle_on_any_shape(
    data: st.DataObject, input_mode: InputMode, pre_norm: bool
) -> None:
    lengths = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=4), label="lengths")
    if input_mode == "plm":
        # The first query sees only tokens that are not predicted. There must be one (usually
        # `<s>`), or the result is 0 / 0.
        lengths = [length + 1 for length in lengths]
    spare = 1 if input_mode == "plm" else 0
    counts = [data.draw(st.integers(0, n - spare), label="predicted") for n in lengths]
    counts[0] = max(counts[0], 1)
    num_layers = data.draw(st.integers(1, 3), label="layers")
    config = dataclasses.replace(TINY, normalize_before=pre_norm, encoder_layers=num_layers)
    model = random_model(config).double()
    batch = random_batch(data.draw(st.integers(0, 999)), lengths, counts, input_mode=input_mode)
    with torch.no_grad():
        actual_BPV = logits_of(model, batch, input_mode)
        wanted_BPV = oracle_logits(model.state_dict(), config, batch, input_mode)
    torch.testing.assert_close(actual_BPV, wanted_BPV, rtol=0, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("case", cases()[::5], ids=str)
def test_gradients_equal_the_oracles(case: Case) -> None:
    model = random_model(case.config).double()
    batch = random_batch(11, [13, 19, 19], [2, 4, 3], input_mode=case.input_mode)
    used_BP = batch.predicted_ids != NOT_PREDICTED
    targets = batch.predicted_ids[used_BP]

    # Not `loss_sum`, which computes in float32 and would limit the comparison.
    ours = logits_of(model, batch, case.input_mode)[used_BP]
    F.cross_entropy(ours, targets, reduction="sum").backward()
    weights = {k: v.detach().clone().requires_grad_() for k, v in model.named_parameters()}
    theirs = oracle_logits(weights, case.config, batch, case.input_mode)[used_BP]
    F.cross_entropy(theirs, targets, reduction="sum").backward()

    for name, parameter in model.named_parameters():
        wanted = weights[name].grad
        assert parameter.grad is not None, name
        assert wanted is not None, name
        assert relative_difference(parameter.grad, wanted) < case.tolerance, name


@pytest.mark.parametrize("pre_norm", [False, True])
def test_encode_equals_the_oracle_without_a_head(pre_norm: bool) -> None:
    config = dataclasses.replace(TINY, normalize_before=pre_norm)
    model = random_model(config).double()
    batch = random_batch(3, [21, 30, 1], [1, 1, 1])
    mask = batch.attention_mask
    assert mask is not None
    with torch.no_grad():
        actual_BLD = model.encode(batch.input_ids, mask)
        wanted_BLD = oracle_encode(model.state_dict(), config, batch.input_ids, mask)
    real_BL = mask != 0
    torch.testing.assert_close(actual_BLD[real_BL], wanted_BLD[real_BL], rtol=0, atol=1e-10)


@pytest.mark.parametrize("input_mode", INPUT_MODES)
def test_loss_is_the_cross_entropy_of_the_oracle(input_mode: InputMode) -> None:
    model = random_model(TINY)
    batch = random_batch(5, [12, 20], [4, 2], input_mode=input_mode)
    with torch.no_grad():
        loss_sum = model.loss_sum(batch, input_mode)
        logits_BPV = oracle_logits(model.state_dict(), TINY, batch, input_mode)
    used_BP = batch.predicted_ids != NOT_PREDICTED
    log_probabilities = logits_BPV[used_BP].log_softmax(dim=1)
    targets = batch.predicted_ids[used_BP]
    wanted = -sum(each[target] for each, target in zip(log_probabilities, targets, strict=True))
    torch.testing.assert_close(loss_sum, wanted, rtol=1e-5, atol=1e-4)
