"""Attention on a GPU in tiles that work out the bias and the staircase themselves.

None of PyTorch's fastest kernels takes a bias that needs a gradient. The one that MPNet gets reads
the bias as a matrix, and writes a gradient of the same size: 0.4 GB per layer in bfloat16, for 64
sequences of 512 tokens. Nearly all of it is there to be added up into a table of 32 x 12 numbers.
But the bias is a function of two positions, and so is who sees whom. A kernel that knows both rules
needs no matrix.

**In tiles** (FlashAttention: Dao, Fu, Ermon, Rudra, Re, arXiv 2205.14135). A program holds 64
queries and goes through the keys, 64 at a time. For each query it keeps the largest score so far,
the sum of the exponentials, and the sum of the values weighted by them. When a larger score comes,
both sums shrink by the factor in between:

    scores 1, 3 | 2        after two keys       largest 3    sum e^-2 + e^0
                           after the third      largest 3    sum e^-2 + e^0 + e^-1
    scores 1, 2 | 3        after two keys       largest 2    sum e^-1 + e^0
                           after the third      largest 3    sum (e^-1 + e^0) e^-1 + e^0

Scores are never written to memory. The backward pass computes them again, from the logarithm of the
sum, which is kept for each query.

**The bias in steps.** T5's buckets are intervals of distances, so the bias of a head is a step
function of the distance. It has 31 steps, of which the two outer ones begin at 91:

>>> steps = bias_steps(num_buckets=32, max_distance=128, device=torch.device("cpu"))
>>> len(steps.bucket_S), steps.bucket_S[:3].tolist(), steps.bucket_S[-3:].tolist()
(31, [15, 14, 13], [29, 30, 31])
>>> steps.first[1:4].tolist(), steps.first[-4:-1].tolist()
([-90, -63, -45], [46, 64, 91])

In natural order, a tile away from the diagonal lies within one outer step, and its whole bias is
one number: 30 of the 64 tiles of 512 tokens. In a permuted sentence there would be none.

**The gradient of the table.** A program of the backward pass adds up the gradients of its scores
for each step that its tiles meet, and writes them to a place of its own. One sum over all programs
ends it, always in the same order, so the gradient is the same to the last bit each time. (Atomic
additions, as in FlexAttention, come in any order.)

**Who sees whom** is the rule of `mpnet/two_stream.py`. Both of its sides are intervals of time:

    key                               visible since   until
    position p of the masked sentence 0               order(p)
    content of number k               k               NEVER

A query sees a key if since <= tau < until and the documents are the same.

**Dropout** decides by a hash of the pair of query and key and two random words for each sample and
head. The words come from PyTorch's generator; the backward pass computes the hash again.

**Tile sizes are fixed.** Choosing the fastest by measurement would let noise choose the order of
sums, and a resumed run might choose another.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from annotated_mpnet.mpnet.dropout import LEVELS, threshold
from annotated_mpnet.mpnet.positions import RelativePositionBias, relative_position_bucket
from annotated_mpnet.mpnet.two_stream import NEVER, Block


class Tiles(NamedTuple):
    """Queries and keys that a program holds at a time: powers of two, at least 16."""

    queries: int = 64
    keys: int = 64


TILES = Tiles()
"""They take 64 kB of the 227 kB of shared memory that an H100 has. Others were not measured."""


class BiasSteps(NamedTuple):
    """The relative bias as a step function of the distance.

    Attributes:
        bucket_S: (S,) int64, the bucket of each step, from far left to far right.
        first: (S + 1,) int32, the distance at which each step begins, and where the last one ends.
        step_W: (W,) int32, the step of each distance from -max_distance to max_distance.
    """

    bucket_S: Tensor
    first: Tensor
    step_W: Tensor


@cache
def bias_steps(num_buckets: int, max_distance: int, device: torch.device) -> BiasSteps:
    """Return the steps of T5's buckets. A bucket without a distance has no step."""
    distance_W = torch.arange(-max_distance, max_distance + 1)
    bucket_W = relative_position_bucket(distance_W, num_buckets, max_distance)
    bucket_S, step_W, size_S = torch.unique_consecutive(bucket_W, True, True)
    first = torch.cat([distance_W[:1], distance_W[0] + size_S.cumsum(0)])
    first[0], first[-1] = -NEVER, NEVER  # the outer steps go on
    return BiasSteps(bucket_S.to(device), first.int().to(device), step_W.int().to(device))


class BiasRule(NamedTuple):
    """What is added to the scores of a block, as a rule in place of a matrix.

    Attributes:
        by_step_HS: (H, S), each head's bias for each step; None without a relative bias.
        step_of_distance: `BiasSteps.step_W`, or None.
        first_distance: `BiasSteps.first`, or None.
        query_facts: (3, B, Q) int32: position, tau, document.
        key_facts: (4, B, M) int32: position, since, until, document.
        hides: whether there is anything that a query must not see.
    """

    by_step_HS: Tensor | None
    step_of_distance: Tensor | None
    first_distance: Tensor | None
    query_facts: Tensor
    key_facts: Tensor
    hides: bool


def bias_rule(block: Block, table: RelativePositionBias | None, hidden: Tensor) -> BiasRule:
    """Return the rule of a block; called as `bias_matrix` in `mpnet/attention.py` is."""
    # The kernels read all query facts, even where nothing is hidden and they are not used.
    zero = torch.zeros_like(block.query_positions[:1, :1])
    query_facts, key_facts = [block.query_positions, zero, zero], [block.key_positions]
    visibility = block.visibility
    if visibility is not None:
        order, rank = visibility.order, visibility.rank
        since = torch.cat([torch.zeros_like(order), rank], dim=1)
        until = torch.cat([order, torch.full_like(rank, NEVER)], dim=1)
        query_document, key_document = visibility.documents or (zero + 1, zero + 1)
        query_facts[1:] = visibility.tau, query_document
        key_facts += [since, until, key_document]

    def written_out(facts: list[Tensor]) -> Tensor:
        return torch.stack([each.expand(len(hidden), facts[0].shape[1]).int() for each in facts])

    facts = written_out(query_facts), written_out(key_facts)
    if table is None:
        return BiasRule(None, None, None, *facts, visibility is not None)
    steps = bias_steps(table.num_embeddings, table.max_distance, hidden.device)
    by_step_HS = table(steps.bucket_S).T
    return BiasRule(by_step_HS, steps.step_W, steps.first, *facts, visibility is not None)


def attend_triton(
    query_BHQK: Tensor, key_BHMK: Tensor, value_BHMK: Tensor, bias: BiasRule, dropout: float
) -> Tensor:
    """Compute attention as `attend_eager` in `mpnet/attention.py` does, with the bias as a rule.

    Needs Triton and CUDA tensors, or TRITON_INTERPRET=1 and any.
    """
    seeds = None
    if threshold(dropout) > 0:
        shape = (*query_BHQK.shape[:2], 2)
        seeds = torch.randint(2**31 - 1, shape, dtype=torch.int32, device=query_BHQK.device)
    attended_BQHK, _ = torch.ops.annotated_mpnet.attend(
        query_BHQK.transpose(1, 2), key_BHMK.transpose(1, 2), value_BHMK.transpose(1, 2),
        *bias, seeds, threshold(dropout),
    )  # fmt: skip
    return attended_BQHK.transpose(1, 2)


# Custom operators: autograd and `torch.compile` see one call with known shapes, and do not look
# inside. Queries, keys and values are (B, Q or M, H, K) here.
@torch.library.custom_op("annotated_mpnet::attend", mutates_args=())
def _attend(
    query: Tensor, key: Tensor, value: Tensor, by_step: Tensor | None,
    step_of_distance: Tensor | None, first_distance: Tensor | None,
    query_facts: Tensor, key_facts: Tensor, hides: bool, seeds: Tensor | None, dropped: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the results (B, Q, H, K), and log2 of each query's sum of exponentials (B, H, Q)."""
    from annotated_mpnet.fast.triton_kernels import attend_forward

    query, key, value = map(_heads_side_by_side, (query, key, value))
    B, Q, H, K = query.shape
    out = query.new_empty(B, Q, H, K)
    log_sum_BHQ = query.new_empty(B, H, Q, dtype=torch.float32)
    attend_forward[_num_tiles(Q, TILES.queries), B * H](
        query, key, value, out, log_sum_BHQ, query_facts, key_facts,
        _by_distance(by_step, step_of_distance), seeds, *_strides(query, key, value),
        *_numbers(query, key, step_of_distance, dropped), **_constants(K, by_step, hides, seeds),
    )  # fmt: skip
    return out, log_sum_BHQ


@torch.library.custom_op("annotated_mpnet::attend_backward", mutates_args=())
def _attend_backward(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, d_out: Tensor, log_sum: Tensor,
    by_step: Tensor | None, step_of_distance: Tensor | None, first_distance: Tensor | None,
    query_facts: Tensor, key_facts: Tensor, hides: bool, seeds: Tensor | None, dropped: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of queries, keys, values, and of the steps (H, S)."""
    from annotated_mpnet.fast import triton_kernels

    query, key, value, d_out = map(_heads_side_by_side, (query, key, value, d_out))
    B, Q, H, K = query.shape
    S = 0 if by_step is None else by_step.shape[1]
    mean_BHQ = (out.float() * d_out.float()).sum(dim=3).transpose(1, 2).contiguous()
    d_query, d_key, d_value = (
        torch.empty_like(each, memory_format=torch.contiguous_format)
        for each in (query, key, value)
    )
    inputs = query, key, value, d_out, log_sum, mean_BHQ
    rule = query_facts, key_facts, _by_distance(by_step, step_of_distance)
    sizes = *_strides(query, key, value, d_out), *_numbers(query, key, step_of_distance, dropped)
    constants = _constants(K, by_step, hides, seeds)
    triton_kernels.attend_backward_keys[_num_tiles(key.shape[1], TILES.keys), B * H](
        *inputs, d_key, d_value, *rule, seeds, *sizes, **constants
    )
    num_tiles, wide_S = _num_tiles(Q, TILES.queries), _power_of_two(S)
    d_by_step = query.new_zeros(B, H, num_tiles, wide_S, dtype=torch.float32)
    triton_kernels.attend_backward_queries[num_tiles, B * H](
        *inputs, d_query, d_by_step, *rule, step_of_distance, first_distance, seeds, *sizes,
        **constants, STEPS=wide_S,
    )  # fmt: skip
    return d_query, d_key, d_value, d_by_step.sum(dim=(0, 2))[:, :S].contiguous()


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


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, hides, seeds, dropped = inputs
    ctx.save_for_backward(*tensors, seeds, *output)
    ctx.hides, ctx.dropped = hides, dropped


def _backward(ctx, d_out, _):  # type: ignore[no-untyped-def]
    query, key, value, *rule, seeds, out, log_sum = ctx.saved_tensors
    *d_heads, d_by_step = torch.ops.annotated_mpnet.attend_backward(
        query, key, value, out, d_out, log_sum, *rule, ctx.hides, seeds, ctx.dropped
    )
    return (*d_heads, None if rule[0] is None else d_by_step, *[None] * 7)


_attend.register_autograd(_backward, setup_context=_setup_context)


def _heads_side_by_side(each: Tensor) -> Tensor:
    """Return (B, Q or M, H, K) with its heads side by side in memory, as a projection leaves it."""
    return each if each.stride()[2:] == (each.shape[3], 1) else each.contiguous()


def _by_distance(by_step_HS: Tensor | None, step_W: Tensor | None) -> Tensor | None:
    """Return each head's bias for each distance (H, W)."""
    if by_step_HS is None or step_W is None:
        return None
    return by_step_HS.float()[:, step_W.long()].contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    """Return for each tensor the steps in memory to the next sample and to the next position."""
    return [each.stride(dim) for each in tensors for dim in (0, 1)]


def _numbers(query: Tensor, key: Tensor, step_W: Tensor | None, dropped: int) -> tuple[float, ...]:
    """Return the numbers that all kernels take: sizes, the far distance, scale, dropout."""
    B, Q, H, K = query.shape
    far = 0 if step_W is None else len(step_W) // 2
    return B, H, Q, key.shape[1], far, 1 / math.sqrt(K), dropped, LEVELS / (LEVELS - dropped)


def _constants(
    K: int, by_step: Tensor | None, hides: bool, seeds: Tensor | None
) -> dict[str, int | bool]:
    """Return what kernels are compiled for."""
    return {
        "K": K,
        # Tensor cores need at least 16 columns, and tiles are powers of two.
        "WIDE_K": max(16, _power_of_two(K)),
        "TILE_Q": TILES.queries,
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
