"""Attention on a CPU: one sample at a time, in memory that is used again.

`attention.attend_eager` is right and slow, and on a CPU PyTorch's `scaled_dot_product_attention`
takes the same steps while it trains, because none of its fused kernels sends a gradient into a
bias. The products are not the reason: two cores do them at full speed. What takes the time is
everything between them, which moves memory: for four rows of 512 tokens in MPNet-base, 12 heads,
the scores of one layer's dense block are 50 MB in float32,

>>> 4 * 12 * 512 * 512 * 4 / 1e6
50.331648

and the formula writes and reads them nine times on the way there and as often on the way back, each
time into memory that the system has to hand out anew, page by page. What is done here instead:

    forward     scores = bias + query key^T / sqrt(K)     one product, which adds while it writes
                weights = softmax(scores)                 kept for the way back
                gathered = (weights, dropped) value       1 / (1 - p) goes into the values: M x K
                                                          numbers instead of Q x M
    backward    d weights = d gathered value^T            all in the same scratch memory of one
                d scores = softmax'(d weights)            sample, 12.6 MB, which stays in the cache
                d bias += d scores                        shared by the batch: added up in place
                d query, d key, d value                   as always

In bfloat16 the products run in bfloat16, several times as fast; PyTorch's way computes them in
float32 there. Softmax and its derivative read and write bfloat16 and compute in float32.

The derivative of the softmax, for a row of weights w and the gradient g of each:

    d score_m = w_m (g_m - sum_k w_k g_k)

a score rises in vain where the others would have answered as well. With dropout, g is that of the
weights before it: zero where a weight was dropped.

Kept for the way back are the weights, whose signs say which were dropped: they are positive, and so
have their signs to spare. What dropout leaves is then what is larger than 0, the weights themselves
are the absolute values, and a gradient passes where ReLU would let it pass:

    weights                    0.2   0.5   0.1   0.2
    kept, the second dropped   0.2  -0.5   0.1   0.2
    behind dropout             0.2   0     0.1   0.2     times 1 / (1 - p)

PyTorch's way keeps three numbers for each weight. And to multiply by booleans, which was the way
here before, takes longer than all of this: on a CPU they are first made into numbers.

Next: `mpnet/encoder.py`.

    B batch   Q rows that ask   M keys   H heads   K head_dim
"""

import math

import torch

from annotated_mpnet.mpnet.dropout import mark_dropped, scale, threshold


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend_blocked(
    query_BHQK: torch.Tensor,
    key_BHMK: torch.Tensor,
    value_BHMK: torch.Tensor,
    bias: torch.Tensor | None,
    dropout: float,
) -> torch.Tensor:
    """Compute what `attention.attend_eager` computes; the arguments are the same.

    `torch.compile` leaves it as it is: what it could generate would be the formula again.
    """
    return _BlockedAttention.apply(  # type: ignore[no-untyped-call]
        query_BHQK, key_BHMK, value_BHMK, bias, dropout
    )


class _BlockedAttention(torch.autograd.Function):
    """The two passes, sample by sample."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        query_BHQK: torch.Tensor,
        key_BHMK: torch.Tensor,
        value_BHMK: torch.Tensor,
        bias: torch.Tensor | None,
        dropout: float,
    ) -> torch.Tensor:
        B, H, Q, K = query_BHQK.shape
        M = key_BHMK.shape[2]
        weights_BHQM = query_BHQK.new_empty(B, H, Q, M)
        scratch_HQM = query_BHQK.new_empty(H, Q, M)
        drops = threshold(dropout) > 0
        # With the heads side by side, as the next layer wants them; they are then a view.
        gathered_BHQK = query_BHQK.new_empty(B, Q, H, K).transpose(1, 2)
        for b in range(B):
            weights_HQM = weights_BHQM[b]
            _scores(query_BHQK[b], key_BHMK[b], _of_sample(bias, b), scratch_HQM)
            torch.softmax(scratch_HQM, dim=2, out=weights_HQM)
            value_HMK = value_BHMK[b]
            if drops:
                mark_dropped(weights_HQM, dropout)
                weights_HQM = torch.clamp(weights_HQM, min=0, out=scratch_HQM)
                value_HMK = value_HMK * scale(dropout)
            gathered_BHQK[b] = weights_HQM @ value_HMK
        ctx.save_for_backward(query_BHQK, key_BHMK, value_BHMK, weights_BHQM)
        ctx.bias_shape = None if bias is None else bias.shape  # type: ignore[attr-defined]
        ctx.scale, ctx.drops = scale(dropout), drops  # type: ignore[attr-defined]
        return gathered_BHQK

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, gradient_BHQK: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        query_BHQK, key_BHMK, value_BHMK, weights_BHQM = ctx.saved_tensors  # type: ignore[attr-defined]
        drops = ctx.drops  # type: ignore[attr-defined]
        d_query, d_key, d_value = (
            torch.empty_like(each) for each in (query_BHQK, key_BHMK, value_BHMK)
        )
        d_bias = None
        if ctx.bias_shape is not None and ctx.needs_input_grad[3]:  # type: ignore[attr-defined]
            # In float32 at least: with one bias for the batch, it is a sum over all samples.
            wide = torch.promote_types(weights_BHQM.dtype, torch.float32)
            d_bias = weights_BHQM.new_zeros(ctx.bias_shape, dtype=wide)  # type: ignore[attr-defined]
        scratch_HQM = torch.empty_like(weights_BHQM[0])
        absolute_HQM = torch.empty_like(weights_BHQM[0]) if drops else None
        root = 1 / math.sqrt(query_BHQK.shape[3])
        for b in range(len(query_BHQK)):
            weights_HQM = weights_BHQM[b]
            gradient_HQK = gradient_BHQK[b] * ctx.scale  # type: ignore[attr-defined]
            used_HQM = torch.clamp(weights_HQM, min=0, out=scratch_HQM) if drops else weights_HQM
            d_value[b] = used_HQM.transpose(1, 2) @ gradient_HQK
            d_weights_HQM = torch.bmm(gradient_HQK, value_BHMK[b].transpose(1, 2), out=scratch_HQM)
            if absolute_HQM is not None:
                torch.ops.aten.threshold_backward.grad_input(
                    d_weights_HQM, weights_HQM, 0, grad_input=d_weights_HQM
                )
                weights_HQM = torch.abs(weights_HQM, out=absolute_HQM)
            d_scores_HQM = torch._softmax_backward_data(
                d_weights_HQM, weights_HQM, 2, weights_HQM.dtype
            )
            if d_bias is not None:
                _add_to_sample(d_bias, b, d_scores_HQM)
            d_query[b] = (d_scores_HQM @ key_BHMK[b]).mul_(root)
            d_key[b] = (d_scores_HQM.transpose(1, 2) @ query_BHQK[b]).mul_(root)
        return d_query, d_key, d_value, d_bias, None


def _scores(
    query_HQK: torch.Tensor,
    key_HMK: torch.Tensor,
    bias: torch.Tensor | None,
    out_HQM: torch.Tensor,
) -> None:
    """Write bias + query key^T / sqrt(K); without a bias, whatever stands there is not read."""
    torch.baddbmm(
        out_HQM if bias is None else bias.expand_as(out_HQM),
        query_HQK,
        key_HMK.transpose(1, 2),
        beta=0 if bias is None else 1,
        alpha=1 / math.sqrt(query_HQK.shape[2]),
        out=out_HQM,
    )


def _of_sample(bias: torch.Tensor | None, b: int) -> torch.Tensor | None:
    """Return the bias of a sample: its own, or the one that all share."""
    if bias is None:
        return None
    return bias[b] if bias.shape[0] > 1 else bias[0]


def _add_to_sample(d_bias: torch.Tensor, b: int, d_scores_HQM: torch.Tensor) -> None:
    """Add the gradient of a sample's scores to that of its bias, over whatever it is spread."""
    target = d_bias[b] if d_bias.shape[0] > 1 else d_bias[0]
    spread = [i for i in range(3) if target.shape[i] == 1 and d_scores_HQM.shape[i] > 1]
    target.add_(d_scores_HQM.sum(dim=spread, keepdim=True) if spread else d_scores_HQM)
