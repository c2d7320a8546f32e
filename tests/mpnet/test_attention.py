"""All attention implementations agree, and the choice is not part of the network."""

from functools import partial
from typing import get_args

import pytest
import torch
from samples import TINY, random_batch, random_model, relative_difference

from annotated_mpnet.fast.attention import ATTENTIONS, AttentionName
from annotated_mpnet.mpnet.attention import (
    EAGER,
    SDPA,
    Attention,
    BiasedBlock,
    attend_blocks,
    attend_eager,
    attend_sdpa,
)

NAMES: tuple[AttentionName, ...] = get_args(AttentionName)


def random_attention(dtype: torch.dtype) -> list[torch.Tensor]:
    """Return queries, keys, values and a bias that masks some keys."""
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4), (2, 3, 5, 7)
    tensors = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    tensors[3][torch.rand(shapes[3], generator=generator) < 0.3] = -torch.inf
    tensors[3][..., 0] = 0.5
    return [tensor.requires_grad_() for tensor in tensors]


def test_names_and_implementations_match() -> None:
    assert set(ATTENTIONS) == set(NAMES)


def test_eager_and_sdpa_agree_in_value_and_gradient() -> None:
    results = []
    for attend in (attend_eager, attend_sdpa):
        tensors = random_attention(torch.float64)
        attend(*tensors, dropout=0.0).square().sum().backward()
        results.append([tensor.grad for tensor in tensors])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"triton"}))
def test_dropout_removes_weights_and_keeps_their_mean(name: AttentionName) -> None:
    # With values of 1 the output is the sum of the remaining weights.
    query, key = torch.zeros(1, 1, 2000, 8), torch.randn(1, 1, 10, 8)
    torch.manual_seed(0)
    blocks = (BiasedBlock(2000, 10, bias=None),)
    sums = ATTENTIONS[name].attend(query, key, torch.ones_like(key), blocks, 0.5)[..., 0]
    assert sums.mean().item() == pytest.approx(1.0, abs=0.03)
    # Ten weights of 0.1, each doubled or dropped, have a standard deviation of 0.1 * sqrt(10).
    assert sums.std().item() == pytest.approx(0.316, abs=0.02)


def test_the_eager_softmax_is_as_exact_as_float32_under_autocast() -> None:
    # 512 keys with similar weights. Rounded to 8 bits, each weight and their sum would be off by up
    # to 0.4 %. With values of 1 the output is the sum.
    query, key = torch.full((1, 1, 1, 4), 0.5), torch.full((1, 1, 512, 4), 0.5)
    bias = torch.linspace(0, 1, 512).to(torch.bfloat16)
    seen = []
    softmax = torch.Tensor.softmax

    def watch(self: torch.Tensor, dim: int, dtype: torch.dtype) -> torch.Tensor:
        result = softmax(self, dim, dtype=dtype)
        seen.append(result)
        return result

    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(torch.Tensor, "softmax", watch)
        attend_eager(query, key, torch.ones_like(key), bias, dropout=0.0)
    assert seen[0].dtype == torch.float32
    assert seen[0].sum().item() == pytest.approx(1.0, abs=1e-6)


def test_the_choice_reaches_every_layer_and_may_change_at_any_time() -> None:
    model, batch = random_model(TINY), random_batch(0, [9, 12], [2, 1])
    calls = []

    def watch(*arguments: torch.Tensor | None, dropout: float, bias: torch.Tensor) -> torch.Tensor:
        calls.append(len(arguments))
        return attend_eager(*arguments, bias=bias, dropout=dropout)

    with torch.no_grad():
        sdpa = model.loss_sum(batch)
        model.use_attention(Attention(partial(attend_blocks, watch)))
        eager = model.loss_sum(batch)
        model.use_attention(SDPA)
        again = model.loss_sum(batch)
    # Two blocks in each layer, but one in the last.
    assert len(calls) == 2 * (TINY.encoder_layers - 1) + 1
    assert relative_difference(eager, sdpa) < 1e-5
    assert torch.equal(again, sdpa)


def test_the_choice_is_not_stored_in_checkpoints() -> None:
    names = random_model(TINY).state_dict().keys()
    chosen = random_model(TINY)
    chosen.use_attention(EAGER)
    chosen.use_gradient_checkpointing(True)
    assert chosen.state_dict().keys() == names
    assert chosen.config == TINY
