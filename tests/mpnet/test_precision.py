"""bfloat16 stays close to float32, and is used only where it should be.

Under autocast, matrix products run in bfloat16 (8 bits of precision). Float32 remain: weights and
their gradients, embeddings, the residual stream and its norms, the softmax of attention, and the
loss. The head's norm returns bfloat16 on a CPU and float32 on a GPU; the product after it is the
same.
"""

import pytest
import torch
from samples import (
    GOLDEN_NAMES,
    Golden,
    load_golden,
    logits_of,
    relative_difference,
    without_prefix,
)

from annotated_mpnet.fast.attention import ATTENTIONS, AttentionName
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining

# Relative to float32. Measured over all files and both attention implementations: 7e-4, 0.043,
# 0.024. A random network is a hard case, because it has not learned to be robust.
LOSS_SHARE = 2e-3
LOGIT_SHARE = 0.06
GRADIENT_SHARE = 0.04


def model_under_test(golden: Golden, attention: AttentionName) -> MPNetForPretraining:
    model = MPNetForPretraining(golden.config)
    model.load_state_dict(without_prefix(golden.weights))
    model.use_attention(ATTENTIONS[attention])
    return model


@pytest.mark.parametrize("attention", ["eager", "sdpa", "blocked"])
@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_bfloat16_stays_close_to_the_original(name: str, attention: AttentionName) -> None:
    golden = load_golden(name)
    model = model_under_test(golden, attention)
    with torch.autocast("cpu", torch.bfloat16):
        loss_sum = model.loss_sum(golden.batch, golden.input_mode)
        logits_BPV = logits_of(model, golden.batch, golden.input_mode)
    loss_sum.backward()  # type: ignore[no-untyped-call]

    assert loss_sum.dtype == torch.float32
    assert loss_sum.item() == pytest.approx(golden.loss_sum, rel=LOSS_SHARE)
    worst = (logits_BPV.float() - golden.logits).abs().max()
    assert worst < LOGIT_SHARE * golden.logits.std()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.dtype == torch.float32, key
        wanted = golden.gradients[f"decoder.{key}"]
        assert relative_difference(parameter.grad, wanted) < GRADIENT_SHARE, key


def test_products_run_in_bfloat16_but_the_residual_stream_does_not() -> None:
    golden = load_golden("mpnet_rel")
    model = model_under_test(golden, "sdpa")
    types = {}

    def note(name: str) -> None:
        def hook(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
            types[name] = output.dtype

        model.sentence_encoder.get_submodule(name).register_forward_hook(hook)

    bf16, fp32 = ["layers.0.self_attn", "layers.0.fc1", "layers.0.fc2"], ["embed_tokens"]
    fp32 += ["layers.0.self_attn_layer_norm", "layers.0.final_layer_norm", "layers.0", "layers.2"]
    for name in bf16 + fp32:
        note(name)
    with torch.autocast("cpu", torch.bfloat16):
        model.loss_sum(golden.batch)
    assert {types[name] for name in bf16} == {torch.bfloat16}
    assert {types[name] for name in fp32} == {torch.float32}


def test_the_loss_is_computed_in_float32() -> None:
    # In bfloat16, the sum of 42 losses of 5 nats would be rounded to about a multiple of 1.
    golden = load_golden("mpnet_rel")
    model = model_under_test(golden, "sdpa")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits_BPV = logits_of(model, golden.batch)
        loss_sum = model.loss_sum(golden.batch)
    wanted = torch.nn.functional.cross_entropy(
        logits_BPV.double().flatten(0, 1), golden.batch.predicted_ids.flatten(), reduction="sum"
    )
    assert loss_sum.item() == pytest.approx(wanted.item(), rel=1e-6)
