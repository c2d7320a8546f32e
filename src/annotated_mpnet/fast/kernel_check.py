"""Do the Triton kernels compute the formula here, on this card and with this version of Triton?

The tests say so in Triton's interpreter. A compiler can still be wrong on one card, or a tile may
not fit into its memory; the loss of such a run would look a little too high, and nothing else. So a
run that wants the kernels first computes the gradient of a small network both ways. It takes about
as long as compiling the kernels, which the run needs anyway.
"""

import dataclasses
import importlib.util
from contextlib import nullcontext

import torch

from annotated_mpnet.fast.attention import ATTENTIONS, AttentionName
from annotated_mpnet.mpnet.batch import Batch
from annotated_mpnet.mpnet.config import ModelConfig
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining

TOLERANCE = {True: 0.05, False: 1e-3}
"""The largest difference that rounding explains, of the length of each gradient: in bfloat16, and
in float32. A wrong sign or a missing tile gives 0.1 and more."""


def kernel_fault(config: ModelConfig, device: torch.device, bf16: bool) -> str | None:
    """Return why the kernels cannot be used for heads as those of a network; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is missing: pip install triton"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "the card is older than Ampere"
    from annotated_mpnet.fast.triton_kernels import FAULTS

    heads = 2
    head_dim = config.encoder_embed_dim // config.encoder_attention_heads
    small = dataclasses.replace(
        config,
        vocab_size=99,
        max_positions=192,
        encoder_layers=2,
        encoder_embed_dim=heads * head_dim,
        encoder_ffn_dim=16,
        encoder_attention_heads=heads,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        model = MPNetForPretraining(small)
        # A fresh table is nearly zero, and so would be its share of the result.
        if (table := model.sentence_encoder.relative_attention_bias) is not None:
            torch.nn.init.normal_(table.weight)
        batch = _batch(vocab_size=small.vocab_size).to(device)
    model.to(device)
    try:
        found, wanted = (_gradients(model, batch, name, bf16) for name in ("triton", "eager"))
    except FAULTS as error:
        return " ".join(f"{type(error).__name__}: {error}".split())[:200]
    for name, gradient in wanted.items():
        difference = (found[name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
        if not difference < TOLERANCE[bf16]:
            return f"the gradient of {name} is wrong by {difference:.1g} of its length"
    return None


def _batch(vocab_size: int) -> Batch:
    """Return two sequences of 192 tokens with 23 predictions each: tiles of all kinds."""
    ids_BL = torch.randint(5, vocab_size, (2, 192))
    positions_BP = torch.stack([torch.randperm(192)[:23] for _ in range(2)])
    return Batch(ids_BL, positions_BP, ids_BL.gather(1, positions_BP), None, 384, 46)


def _gradients(
    model: MPNetForPretraining, batch: Batch, name: AttentionName, bf16: bool
) -> dict[str, torch.Tensor]:
    model.use_attention(ATTENTIONS[name])
    with torch.autocast(batch.input_ids.device.type, torch.bfloat16) if bf16 else nullcontext():
        loss = model.loss_sum(batch)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {
        name: gradient
        for name, gradient in zip(names, gradients, strict=True)
        if gradient is not None
    }
