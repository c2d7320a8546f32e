"""Our model gives the logits, loss and gradients of Microsoft's original."""

import pytest
import torch
from samples import (
    GOLDEN_NAMES,
    GRADIENT_TOLERANCE,
    LOGIT_TOLERANCE,
    LOSS_TOLERANCE,
    Golden,
    load_golden,
    logits_of,
    relative_difference,
    without_prefix,
)

from annotated_mpnet.fast.attention import ATTENTIONS, AttentionName
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining


def golden_model(golden: Golden, attention: AttentionName = "sdpa") -> MPNetForPretraining:
    model = MPNetForPretraining(golden.config)
    model.load_state_dict(without_prefix(golden.weights))
    model.use_attention(ATTENTIONS[attention])
    return model


@pytest.mark.parametrize("attention", ["eager", "sdpa", "blocked"])
@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_logits_and_loss_equal_the_originals(name: str, attention: AttentionName) -> None:
    golden = load_golden(name)
    model = golden_model(golden, attention)
    with torch.no_grad():
        logits_BPV = logits_of(model, golden.batch, golden.input_mode)
        loss_sum = model.loss_sum(golden.batch, golden.input_mode)
    assert logits_BPV.shape == golden.logits.shape
    assert (logits_BPV - golden.logits).abs().max() < LOGIT_TOLERANCE
    assert loss_sum.shape == ()
    assert abs(loss_sum.item() - golden.loss_sum) < LOSS_TOLERANCE


@pytest.mark.parametrize("attention", ["eager", "sdpa", "blocked"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_every_gradient_equals_the_originals(
    name: str, recompute: bool, attention: AttentionName
) -> None:
    golden = load_golden(name)
    model = golden_model(golden, attention)
    model.use_gradient_checkpointing(recompute)
    model.loss_sum(golden.batch, golden.input_mode).backward()

    ours = {f"decoder.{key}": parameter.grad for key, parameter in model.named_parameters()}
    assert ours.keys() == golden.gradients.keys()
    for key, wanted in golden.gradients.items():
        gradient = ours[key]
        assert gradient is not None, key
        assert relative_difference(gradient, wanted) < GRADIENT_TOLERANCE, key


def test_state_dict_has_the_originals_names_and_no_others() -> None:
    golden = load_golden("mpnet_rel")
    names = MPNetForPretraining(golden.config).state_dict().keys()
    assert {f"decoder.{name}" for name in names} == golden.weights.keys()


def test_a_relative_bias_in_the_weights_is_not_ignored_silently() -> None:
    golden = load_golden("mpnet_rel")
    without = MPNetForPretraining(load_golden("mpnet_norel").config)
    with pytest.raises(RuntimeError, match="relative_attention_bias"):
        without.load_state_dict(without_prefix(golden.weights))
