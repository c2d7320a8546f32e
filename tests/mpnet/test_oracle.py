"""The oracle gives Microsoft's numbers."""

import pytest
import torch
import torch.nn.functional as F
from oracle import oracle_logits
from samples import (
    GOLDEN_NAMES,
    GRADIENT_TOLERANCE,
    LOGIT_TOLERANCE,
    LOSS_TOLERANCE,
    load_golden,
    relative_difference,
)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_oracle_equals_the_original(name: str) -> None:
    golden = load_golden(name)
    weights = {
        key.removeprefix("decoder."): tensor.double().requires_grad_()
        for key, tensor in golden.weights.items()
    }
    logits_BPV = oracle_logits(weights, golden.config, golden.batch, golden.input_mode)
    loss_sum = F.cross_entropy(
        logits_BPV.flatten(0, 1), golden.batch.predicted_ids.flatten(), reduction="sum"
    )
    loss_sum.backward()

    assert (logits_BPV - golden.logits).abs().max() < LOGIT_TOLERANCE
    assert abs(loss_sum.item() - golden.loss_sum) < LOSS_TOLERANCE
    assert golden.gradients.keys() == golden.weights.keys()
    for key, wanted in golden.gradients.items():
        gradient = weights[key.removeprefix("decoder.")].grad
        assert gradient is not None, key
        assert relative_difference(gradient, wanted) < GRADIENT_TOLERANCE, key


def test_golden_files_reach_every_bucket() -> None:
    golden = load_golden("mpnet_rel")
    gradient_of_buckets = golden.gradients[
        "decoder.sentence_encoder.relative_attention_bias.weight"
    ]
    # Bucket 16 would be "to the right, at distance 0", which no key is.
    unused = (gradient_of_buckets.abs().sum(dim=1) == 0).nonzero().flatten().tolist()
    assert unused == [16]
    assert torch.isfinite(gradient_of_buckets).all()
