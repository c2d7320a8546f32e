"""Attention on a GPU in tiles, with the bias and the staircase worked out inside.

On a GPU, `scaled_dot_product_attention` has fast kernels, and none of the fastest takes a bias that
wants a gradient. What is left to MPNet is a slower one, which reads the bias as a matrix of one
number for each pair, and writes a gradient for each of them: for 64 rows of 512 tokens and 12 heads
the gradient of the dense block alone is 0.4 GB in bfloat16, in each layer,

>>> 64 * 12 * 512 * 512 * 2 / 1e9
0.402653184

and nearly all of it is there to be added up into a table of 32 x 12 numbers. But the bias is a
function of two positions, and so is who sees whom. A kernel that knows the rules needs neither
matrix.

**In tiles.** (Dao, Fu, Ermon, Rudra, Re: "FlashAttention", arXiv 2205.14135.) A program holds 64
rows and goes through the keys, 64 at a time. Of all it has seen it keeps three things: each row's
largest score, the sum of the exponentials, and the sum of the values weighted by them. When a tile
brings a larger score, the former sums shrink by the factor in between:

    scores 1, 3 | 2        after two keys       largest 3    sum e^-2 + e^0
                           after the third      largest 3    sum e^-2 + e^0 + e^-1
    scores 1, 2 | 3        after two keys       largest 2    sum e^-1 + e^0
                           after the third      largest 3    sum (e^-1 + e^0) e^-1 + e^0

No score is ever written to memory. The way back computes them once more, from the logarithm of the
sum, which is kept for each row.

**The bias is a few steps.** T5's buckets are made of distances, and so the bias of a head is a
staircase over the distance, of 31 steps (bucket 16 is never used; `mpnet/positions.py`), with two long
ones at the ends, from 91 on:

>>> from annotated_mpnet.mpnet.positions import bias_steps
>>> steps = bias_steps(num_buckets=32, max_distance=128)
>>> len(steps.bucket_S), steps.bucket_S[:4].tolist(), steps.bucket_S[-4:].tolist()
(31, [15, 14, 13, 12], [28, 29, 30, 31])
>>> steps.first_E[1:5].tolist(), steps.first_E[-5:-1].tolist()
([-90, -63, -45, -31], [32, 46, 64, 91])

In natural order, a tile away from the diagonal lies within one of those two, so that its whole
bias is one number. That is seen from the maximal distance on, 128, without a look at any table. Of
the 64 tiles of a row of 512 tokens it is nearly half:

>>> starts = range(0, 512, 64)
>>> far = [abs(there - here) - 63 >= 128 for here in starts for there in starts]
>>> sum(far), len(far)
(30, 64)

In a permuted sentence it would be none.

**The gradient of the table.** Each program of the way back adds up the gradients of its scores for
each step that its tiles meet, writes 31 numbers to a place of its own, and one sum over all places
ends it. In this order, always: the gradient is the same to the last bit each time. Atomic additions
to one table, as in FlexAttention, come in the order in which programs happen to be ready. FAT5's
kernel (catie-aq, flashT5) writes the gradients of all scores, and its backward pass is slower than
PyTorch's for that.

**Who sees whom** is the rule of `two_stream.Visibility`: three comparisons of numbers that rows and
keys bring along, 12 bytes a row and 16 a key instead of a byte for each pair.

**Dropout** decides by a hash of the pair's number and of two random words for each sample and head.
These are drawn from PyTorch's generator, so that `seed_dropout` (`mpnet/loop.py`) decides
them, and the way back asks the hash again instead of keeping an answer for each pair.

**Tile sizes are fixed.** Triton could try several and keep the fastest. But sums would then be made
in an order that a noisy measurement has chosen, and a resumed run might choose another.

FlexAttention, PyTorch's own generator of such kernels, was left aside: it has no dropout, no
backward pass on a CPU, where this one is tested (Triton's interpreter), and the atomic additions.
`benchmarks/attention.py` measures it beside the others.

Next: `fast/triton_kernels.py`, the kernels; then `mpnet/encoder.py`.

    B batch   Q rows that ask   M keys   H heads   K head_dim   S steps of the bias   W distances
    T tiles of rows
"""

import math
from typing import NamedTuple

import torch

from annotated_mpnet.mpnet.dropout import LEVELS, threshold
from annotated_mpnet.mpnet.positions import RelativePositionBias
from annotated_mpnet.mpnet.two_stream import Block


class Tiles(NamedTuple):
    """How many rows and keys a program holds at a time: powers of two, 16 at least."""

    rows: int = 64
    keys: int = 64


TILES = Tiles()
"""Two tiles of 64 x 64 scores in float32 and four of 64 x 64 factors in bfloat16 are 64 kB, of the
227 kB that an H100 has for the programs of one of its processors. Not measured against others."""


class BiasRule(NamedTuple):
    """What is added to scores, as a rule in place of a matrix.

    Attributes:
        by_step_HS: (H, S) float32, each head's bias for each step of distance; None for no bias.
        step_of_distance: (W,) int32, the step of each distance up to the longest that matters.
        first_distance: (S + 1,) int32, where each step begins, and where the last one ends.
        rows: (3, B, Q) int32: position, time, document of each row that asks.
        keys: (4, B, M) int32: position, since, until, document of each key.
        hides: whether there is anything that a row must not see.
    """

    by_step_HS: torch.Tensor | None
    step_of_distance: torch.Tensor | None
    first_distance: torch.Tensor | None
    rows: torch.Tensor
    keys: torch.Tensor
    hides: bool

    @classmethod
    def of(cls, block: Block, table: RelativePositionBias | None, num_samples: int) -> "BiasRule":
        """Return the rule of a block.

        Args:
            block: who asks, who answers, who sees whom.
            table: the relative position bias, if the network has one.
            num_samples: B; what the samples share is written out for each, which is little.
        """
        visibility = block.visibility
        row_facts, key_facts = [block.query_positions], [block.key_positions]
        if visibility is not None:
            row_facts.append(visibility.time)
            key_facts += [visibility.since, visibility.until]
            documents = visibility.documents
            if documents is None:
                ones = torch.ones_like(block.query_positions[:1, :1])
                documents = ones, ones
            row_facts.append(documents[0])
            key_facts.append(documents[1])
        rows = _facts(row_facts, num_samples, block.query_positions.shape[1])
        keys = _facts(key_facts, num_samples, block.key_positions.shape[1])
        if table is None:
            return cls(None, None, None, rows, keys, visibility is not None)
        by_step_HS = table(table.bucket_of_step).T
        steps = table.step_of_distance, table.first_distance
        return cls(by_step_HS, *steps, rows, keys, visibility is not None)


def _facts(facts: list[torch.Tensor], num_samples: int, count: int) -> torch.Tensor:
    """Write facts (B or 1, count or 1) out, side by side: (kinds, B, count) int32."""
    return torch.stack([each.expand(num_samples, count).int() for each in facts])


def attend_triton(
    query_BHQK: torch.Tensor,
    key_BHMK: torch.Tensor,
    value_BHMK: torch.Tensor,
    bias: BiasRule,
    dropout: float,
) -> torch.Tensor:
    """Compute what `attention.attend_eager` computes; the bias comes as a rule.

    Needs Triton and CUDA tensors, or TRITON_INTERPRET=1 and any. The result is (B, H, Q, K) as
    there, a view of memory in which the heads lie side by side.
    """
    # Two words for each sample and head, drawn where they are needed: no value goes to the CPU.
    seeds = None
    if threshold(dropout) > 0:
        shape = (*query_BHQK.shape[:2], 2)
        seeds = torch.randint(2**31 - 1, shape, dtype=torch.int32, device=query_BHQK.device)
    gathered_BQHK, _ = torch.ops.annotated_mpnet.attend(
        query_BHQK.transpose(1, 2), key_BHMK.transpose(1, 2), value_BHMK.transpose(1, 2),
        *bias, seeds, threshold(dropout),
    )  # fmt: skip
    return gathered_BQHK.transpose(1, 2)


# An operator of PyTorch's own kind: autograd and `torch.compile` see one call with known shapes,
# and do not look inside.
@torch.library.custom_op("annotated_mpnet::attend", mutates_args=())
def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    by_step: torch.Tensor | None,
    step_of_distance: torch.Tensor | None, first_distance: torch.Tensor | None,
    rows: torch.Tensor, keys: torch.Tensor, hides: bool,
    seeds: torch.Tensor | None, dropped: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the results (B, Q, H, K), and the logarithms (B, H, Q) of the rows' sums, in bits.

    Queries, keys and values are (B, rows, H, K).
    """
    from annotated_mpnet.fast.triton_kernels import attend_forward

    query, key, value = (_heads_side_by_side(each) for each in (query, key, value))
    B, Q, H, K = query.shape
    out = query.new_empty(B, Q, H, K)
    log_sum_BHQ = query.new_empty(B, H, Q, dtype=torch.float32)
    attend_forward[_num_tiles(Q, TILES.rows), B * H](
        query, key, value, out, log_sum_BHQ, rows, keys, _by_distance(by_step, step_of_distance),
        seeds, *_strides(query, key, value), *_numbers(query, key, step_of_distance, dropped),
        **_constants(K, by_step, hides, seeds),
    )  # fmt: skip
    return out, log_sum_BHQ


@torch.library.custom_op("annotated_mpnet::attend_backward", mutates_args=())
def _attend_backward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    out: torch.Tensor, d_out: torch.Tensor, log_sum: torch.Tensor,
    by_step: torch.Tensor | None,
    step_of_distance: torch.Tensor | None, first_distance: torch.Tensor | None,
    rows: torch.Tensor, keys: torch.Tensor, hides: bool,
    seeds: torch.Tensor | None, dropped: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the gradients of queries, keys and values, and (H, S) that of the bias, or nothing."""
    from annotated_mpnet.fast import triton_kernels

    query, key, value, d_out = (_heads_side_by_side(each) for each in (query, key, value, d_out))
    B, Q, H, K = query.shape
    M = key.shape[1]
    S = 0 if by_step is None else by_step.shape[1]
    mean_BHQ = (out.float() * d_out.float()).sum(dim=3).transpose(1, 2).contiguous()
    d_query, d_key, d_value = (
        torch.empty_like(each, memory_format=torch.contiguous_format)
        for each in (query, key, value)
    )
    common = (rows, keys, _by_distance(by_step, step_of_distance))
    strides = _strides(query, key, value, d_out)
    numbers = _numbers(query, key, step_of_distance, dropped)
    constants = _constants(K, by_step, hides, seeds)
    triton_kernels.attend_backward_keys[_num_tiles(M, TILES.keys), B * H](
        query, key, value, d_out, log_sum, mean_BHQ, d_key, d_value, *common, seeds,
        *strides, *numbers, **constants,
    )  # fmt: skip
    num_tiles, wide_S = _num_tiles(Q, TILES.rows), _power_of_two(S)
    d_by_step_BHTS = query.new_zeros(B, H, num_tiles, wide_S, dtype=torch.float32)
    triton_kernels.attend_backward_queries[num_tiles, B * H](
        query, key, value, d_out, log_sum, mean_BHQ, d_query, d_by_step_BHTS, *common,
        step_of_distance, first_distance, seeds, *strides, *numbers, **constants, STEPS=wide_S,
    )  # fmt: skip
    return d_query, d_key, d_value, d_by_step_BHTS.sum(dim=(0, 2))[:, :S].contiguous()


@_attend.register_fake
def _(query, key, value, *_):  # type: ignore[no-untyped-def]
    B, Q, H, _K = query.shape
    return torch.empty_like(query, memory_format=torch.contiguous_format), query.new_empty(
        B, H, Q, dtype=torch.float32
    )


@_attend_backward.register_fake
def _(query, key, value, out, d_out, log_sum, by_step, *_):  # type: ignore[no-untyped-def]
    gradients = [
        torch.empty_like(each, memory_format=torch.contiguous_format)
        for each in (query, key, value)
    ]
    shape = (query.shape[2], 0 if by_step is None else by_step.shape[1])
    return (*gradients, query.new_empty(shape, dtype=torch.float32))


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    """Keep for the way back what went in and what came out; nothing of the size of the scores."""
    *heads, by_step, step_of_distance, first_distance, rows, keys, hides, seeds, dropped = inputs
    rule = by_step, step_of_distance, first_distance, rows, keys
    ctx.save_for_backward(*heads, *output, *rule, seeds)
    ctx.hides, ctx.dropped = hides, dropped


def _send_back(ctx, d_out, _):  # type: ignore[no-untyped-def]
    """Return a gradient for each input of `_attend`."""
    query, key, value, out, log_sum, *rule, seeds = ctx.saved_tensors
    *d_heads, d_by_step = torch.ops.annotated_mpnet.attend_backward(
        query, key, value, out, d_out, log_sum, *rule, ctx.hides, seeds, ctx.dropped
    )
    biased = rule[0] is not None
    return (*d_heads, d_by_step if biased else None, *[None] * 7)


_attend.register_autograd(_send_back, setup_context=_keep)


def _heads_side_by_side(rows_BRHK: torch.Tensor) -> torch.Tensor:
    """Return rows whose heads lie side by side, as views of a projection do; others are copied."""
    K = rows_BRHK.shape[3]
    if rows_BRHK.stride()[2:] == (K, 1):
        return rows_BRHK
    return rows_BRHK.contiguous()


def _by_distance(
    by_step_HS: torch.Tensor | None, step_of_distance_W: torch.Tensor | None
) -> torch.Tensor | None:
    """Return each head's bias for each distance that is looked up: (H, W)."""
    if by_step_HS is None or step_of_distance_W is None:
        return None
    return by_step_HS.float()[:, step_of_distance_W.long()].contiguous()


def _strides(*rows: torch.Tensor) -> list[int]:
    """Return for each of (B, rows, H, K) how far it is to the next sample and to the next row."""
    return [each.stride(dim) for each in rows for dim in (0, 1)]


def _numbers(
    query: torch.Tensor, key: torch.Tensor, step_of_distance: torch.Tensor | None, dropped: int
) -> tuple[float, ...]:
    """Return the numbers that all kernels take: sizes, the far distance, scale, dropout."""
    B, Q, H, K = query.shape
    far = 0 if step_of_distance is None else len(step_of_distance) // 2
    return B, H, Q, key.shape[1], far, 1 / math.sqrt(K), dropped, LEVELS / (LEVELS - dropped)


def _constants(
    K: int, by_step: torch.Tensor | None, hides: bool, seeds: torch.Tensor | None
) -> dict[str, int | bool]:
    """Return what kernels are compiled for."""
    return {
        "K": K,
        # Products on tensor cores take 16 columns at least, and tiles are powers of two.
        "WIDE_K": max(16, _power_of_two(K)),
        "TILE_Q": TILES.rows,
        "TILE_M": TILES.keys,
        "BIASED": by_step is not None,
        "HIDES": hides,
        "DROPS": seeds is not None,
    }


def _num_tiles(count: int, tile: int) -> int:
    return -(-count // tile)


def _power_of_two(number: int) -> int:
    """Return the smallest power of two that is not smaller."""
    return 1 << max(number - 1, 0).bit_length()
