"""Attention on a CPU: one sample at a time, in memory that is used again.

While it trains on a CPU, PyTorch's `scaled_dot_product_attention` takes the steps of the formula,
because no fused kernel sends a gradient into the bias. The matrix products are not what is slow.
The rest moves memory: for four sequences of 512 tokens in MPNet-base the scores of a layer's first
block are 50 MB, written and read nine times in the forward pass and as often in the backward pass,
each time in new memory. Here instead:

    forward     scores = bias + query key^T / sqrt(K)     one product, which adds as it writes
                weights = softmax(scores)                 kept for the backward pass
                attended = (weights, dropped) value       1 / (1 - p) goes into the values: M x K
                                                          numbers, not Q x M
    backward    d weights = d attended value^T            all in the same 12.6 MB of one sample,
                d scores = softmax'(d weights)            which stay in the cache
                d bias += d scores                        shared by the batch: added up in place
                d query, d key, d value                   as usual

In bfloat16 the products run in bfloat16, several times as fast; PyTorch computes them in float32.

The derivative of the softmax, for one query's weights w and their gradient g:

    d score_m = w_m (g_m - sum_k w_k g_k)

Raising one score lowers the other weights, so only its advantage over the mean counts.

**Dropout** is kept in the signs of the weights, which softmax makes positive:

    weights                    0.2   0.5   0.1   0.2
    kept, the second dropped   0.2  -0.5   0.1   0.2
    after dropout              0.2   0     0.1   0.2     times 1 / (1 - p)

What dropout leaves is max(w, 0), the weights themselves are |w|, and a gradient passes where ReLU
would let it pass. PyTorch keeps three numbers for each weight.
"""

import math

import torch
from torch import Tensor

from annotated_mpnet.mpnet.dropout import LEVELS, draw_levels, scale, threshold


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend_blocked(
    query_BHQK: Tensor, key_BHMK: Tensor, value_BHMK: Tensor, bias: Tensor | None, dropout: float
) -> Tensor:
    """Compute attention as `attend_eager` in `mpnet/attention.py` does."""
    return _BlockedAttention.apply(  # type: ignore[no-untyped-call]
        query_BHQK, key_BHMK, value_BHMK, bias, dropout
    )


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        query_BHQK: Tensor,
        key_BHMK: Tensor,
        value_BHMK: Tensor,
        bias: Tensor | None,
        dropout: float,
    ) -> Tensor:
        B, H, Q, K = query_BHQK.shape
        weights_BHQM = query_BHQK.new_empty(B, H, Q, key_BHMK.shape[2])
        scratch_HQM = query_BHQK.new_empty(weights_BHQM.shape[1:])
        drops = threshold(dropout) > 0
        # In memory, the heads lie side by side, as the next layer wants them.
        attended_BHQK = query_BHQK.new_empty(B, Q, H, K).transpose(1, 2)
        for b in range(B):
            weights_HQM, value_HMK = weights_BHQM[b], value_BHMK[b]
            _scores(query_BHQK[b], key_BHMK[b], bias, b, scratch_HQM)
            torch.softmax(scratch_HQM, dim=2, out=weights_HQM)
            if drops:
                mark_dropped(weights_HQM, dropout)
                weights_HQM = torch.clamp(weights_HQM, min=0, out=scratch_HQM)
                value_HMK = value_HMK * scale(dropout)
            attended_BHQK[b] = weights_HQM @ value_HMK
        ctx.save_for_backward(query_BHQK, key_BHMK, value_BHMK, weights_BHQM)
        ctx.bias_shape = None if bias is None else bias.shape
        ctx.scale, ctx.drops = scale(dropout), drops
        return attended_BHQK

    @staticmethod
    def backward(ctx, gradient_BHQK: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        query_BHQK, key_BHMK, value_BHMK, weights_BHQM = ctx.saved_tensors
        d_query, d_key, d_value = map(torch.empty_like, (query_BHQK, key_BHMK, value_BHMK))
        d_bias = None
        if ctx.bias_shape is not None and ctx.needs_input_grad[3]:
            # At least float32: a bias for the whole batch gets a sum over all samples.
            wide = torch.promote_types(weights_BHQM.dtype, torch.float32)
            d_bias = weights_BHQM.new_zeros(ctx.bias_shape, dtype=wide)
        scratch_HQM = torch.empty_like(weights_BHQM[0])
        absolute_HQM = torch.empty_like(scratch_HQM) if ctx.drops else None
        root = 1 / math.sqrt(query_BHQK.shape[3])
        for b in range(len(query_BHQK)):
            weights_HQM = weights_BHQM[b]
            gradient_HQK = gradient_BHQK[b] * ctx.scale
            used_HQM = weights_HQM
            if ctx.drops:
                used_HQM = torch.clamp(weights_HQM, min=0, out=scratch_HQM)
            d_value[b] = used_HQM.transpose(1, 2) @ gradient_HQK
            d_weights_HQM = torch.bmm(gradient_HQK, value_BHMK[b].transpose(1, 2), out=scratch_HQM)
            if ctx.drops:
                torch.ops.aten.threshold_backward.grad_input(
                    d_weights_HQM, weights_HQM, 0, grad_input=d_weights_HQM
                )
                weights_HQM = torch.abs(weights_HQM, out=absolute_HQM)
            d_scores_HQM = torch._softmax_backward_data(
                d_weights_HQM, weights_HQM, 2, weights_HQM.dtype
            )
            if d_bias is not None:
                target = d_bias[_index(d_bias, b)]
                target.add_(d_scores_HQM.sum_to_size(target.shape))
            d_query[b] = (d_scores_HQM @ key_BHMK[b]).mul_(root)
            d_key[b] = (d_scores_HQM.transpose(1, 2) @ query_BHQK[b]).mul_(root)
        return d_query, d_key, d_value, d_bias, None


def _scores(
    query_HQK: Tensor, key_HMK: Tensor, bias: Tensor | None, b: int, out_HQM: Tensor
) -> None:
    """Write bias + query key^T / sqrt(K) of sample b."""
    torch.baddbmm(
        out_HQM if bias is None else bias[_index(bias, b)].expand_as(out_HQM),
        query_HQK,
        key_HMK.transpose(1, 2),
        beta=0 if bias is None else 1,
        alpha=1 / math.sqrt(query_HQK.shape[2]),
        out=out_HQM,
    )


def _index(bias: Tensor, b: int) -> int:
    """Return where sample b finds its bias, which may be one for the whole batch."""
    return b if bias.shape[0] > 1 else 0


def mark_dropped(positive: Tensor, p: float) -> None:
    """Draw what dropout drops, and make those numbers negative, in place.

    >>> _ = torch.manual_seed(8)
    >>> weights = torch.full((2, 6), 0.25)
    >>> mark_dropped(weights, 0.5)
    >>> weights
    tensor([[ 0.2500,  0.2500,  0.2500,  0.2500, -0.2500,  0.2500],
            [ 0.2500,  0.2500, -0.2500,  0.2500, -0.2500,  0.2500]])

    Args:
        positive: contiguous, of a floating-point type, whose first bit is the sign.
        p: the probability to drop a number.
    """
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[positive.element_size()]
    # Compared in place, the 16-bit numbers become ones and zeros. Booleans would be slower.
    dropped = draw_levels(positive).lt_(threshold(p) - LEVELS // 2)
    sign = dropped.to(whole).bitwise_left_shift_(8 * positive.element_size() - 1)
    positive.view(whole).bitwise_or_(sign)
