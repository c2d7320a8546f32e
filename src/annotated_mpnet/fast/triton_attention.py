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
>>> steps.end[:3].tolist(), steps.end[27:30].tolist()
([-90, -63, -45], [46, 64, 91])

In natural order, a tile away from the diagonal lies within one outer step, and its whole bias is
one number: 30 of the 64 tiles of 512 tokens. In a permuted sentence there would be none. The
predicted tokens do come in any order, so the kernels take the staircase's queries and keys sorted
by position, from wherever they are in memory.

**The gradient of the table.** A pair adds the gradient of its score to the step that its distance
is in. With keys sorted, the steps cut the scores of a query into pieces, and the sum of a piece is
the difference of two cumulative sums, at its end and at its beginning. So each program adds up, for
each step, the cumulative sums at its end, and writes them to a place of its own. One sum over all
programs ends it, always in the same order, so the gradient is the same to the last bit each time.
(Atomic additions, as in FlexAttention, come in any order.)

**Who sees whom** is the rule of `mpnet/two_stream.py`. Both of its sides are intervals of time:

    key                               visible since   until
    position p of the masked sentence 0               order(p)
    content of number k               k               NEVER

A query sees a key if since <= tau < until and the documents are the same.

**Dropout** decides by a hash of the pair of query and key and two random words for each sample and
head. The words come from PyTorch's generator; the backward pass computes the hash again.

**Tile sizes are fixed**, in a table. Choosing the fastest by measurement would let noise choose the
order of sums, and a resumed run might choose another.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from annotated_mpnet.mpnet.attention import BiasedBlock
from annotated_mpnet.mpnet.dropout import LEVELS, threshold
from annotated_mpnet.mpnet.positions import RelativePositionBias, relative_position_bucket
from annotated_mpnet.mpnet.two_stream import NEVER, Block

LOG2_E = 1 / math.log(2)


class Launch(NamedTuple):
    """How a kernel is launched.

    Attributes:
        queries: of a tile; a power of two, at least 16.
        keys: of a tile, likewise.
        stages: tiles of keys (or queries) on their way from memory at a time.
        registers: the most for a thread; None as the compiler likes.
    """

    queries: int = 64
    keys: int = 64
    stages: int = 2
    registers: int | None = None


USUAL = Launch()
"""Fits into the shared memory of any card since Ampere."""

TUNED = {
    ("attend_forward", True): Launch(registers=128),
    ("attend_forward", False): Launch(keys=128),
    ("attend_backward_queries", True): Launch(registers=168),
    ("attend_backward_queries", False): Launch(stages=1, registers=168),
    ("attend_backward_keys", True): Launch(registers=168),
    ("attend_backward_keys", False): Launch(stages=1),
}
"""By kernel, and whether a block is in natural order: the fastest of those tried on an H200, with
heads of 64 in bfloat16 (`docs/performance.md`). With fewer registers, more programs run at a time.
"""

LARGEST_TILE = 128


def launch(kernel: str, natural: bool, query: Tensor) -> Launch:
    """Return how to launch a kernel for queries (B, Q, H, K)."""
    if query.dtype != torch.bfloat16 or not 32 < query.shape[3] <= 64 or not query.is_cuda:
        return USUAL
    hopper = torch.cuda.get_device_capability(query.device) == (9, 0)
    return TUNED[kernel, natural] if hopper else USUAL


class BiasSteps(NamedTuple):
    """The relative bias as a step function of the distance.

    Attributes:
        bucket_S: (S,) int64, the bucket of each step, from far left to far right.
        end: (power of two,) int32, the distance before which each step ends; the last goes on.
        step_W: (W,) int64, the step of each distance from -max_distance to max_distance.
        far: the distance from which on, on either side, all pairs are in the outer step.
    """

    bucket_S: Tensor
    end: Tensor
    step_W: Tensor
    far: int


@cache
def bias_steps(num_buckets: int, max_distance: int, device: torch.device) -> BiasSteps:
    """Return the steps of T5's buckets. A bucket without a distance has no step."""
    distance_W = torch.arange(-max_distance, max_distance + 1)
    bucket_W = relative_position_bucket(distance_W, num_buckets, max_distance)
    bucket_S, step_W, size_S = torch.unique_consecutive(bucket_W, True, True)
    end = torch.full((_power_of_two(len(bucket_S)),), NEVER)
    end[: len(bucket_S) - 1] = size_S.cumsum(0)[:-1] - max_distance
    far = max(1 - int(end[0]), int(end[len(bucket_S) - 2]))
    return BiasSteps(bucket_S.to(device), end.int().to(device), step_W.to(device), far)


@cache
def step_of_each_distance(
    num_buckets: int, max_distance: int, reach: int, device: torch.device
) -> Tensor:
    """Return the step of each distance from -reach to reach: (R,) int64."""
    distance_R = torch.arange(-reach, reach + 1, device=device)
    step_W = bias_steps(num_buckets, max_distance, device).step_W
    return step_W[distance_R.clamp(-max_distance, max_distance) + max_distance]


class BiasTable(NamedTuple):
    """The relative bias of a network, as the kernels read it.

    Attributes:
        by_step_HS: (H, S), each head's bias for each step.
        strip: (H, 2R + 1) float32, the bias in bits of each distance from -R to R.
        end_of_step: `BiasSteps.end`.
        far: `BiasSteps.far`.
    """

    by_step_HS: Tensor
    strip: Tensor
    end_of_step: Tensor
    far: int


class BiasRule(NamedTuple):
    """What is added to the scores of a block, as a rule in place of a matrix.

    Attributes:
        table: the bias; None without a relative bias.
        query_facts: (4, B, Q) int32: row, position, tau, document; sorted by position.
        key_facts: (5, B, M) int32: row, position, since, until, document; sorted by position.
        keys_before: (B, M + 1) int32, how many keys are before each position; empty if natural.
        natural: whether query i is row i at position i, and key m likewise.
        hides: whether there is anything that a query must not see.
        documents: whether documents decide it too.
    """

    table: BiasTable | None
    query_facts: Tensor
    key_facts: Tensor
    keys_before: Tensor
    natural: bool
    hides: bool
    documents: bool


def bias_rule(block: Block, table: RelativePositionBias | None, hidden: Tensor) -> BiasRule:
    """Return the rule of a block; called as `bias_matrix` in `mpnet/attention.py` is."""
    visibility = block.visibility
    tau = since = until = query_document = key_document = torch.zeros_like(
        block.key_positions[:1, :1]
    )
    documents = False
    if visibility is not None:
        order, rank, tau = visibility.order, visibility.rank, visibility.tau
        since = torch.cat([torch.zeros_like(order), rank], dim=1)
        until = torch.cat([order, torch.full_like(rank, NEVER)], dim=1)
        if visibility.documents is not None:
            documents = True
            query_document, key_document = visibility.documents
    # The sentence itself, which is in natural order already.
    natural = block.query_positions is block.key_positions
    query_facts = _facts(len(hidden), not natural, block.query_positions, tau, query_document)
    key_facts = _facts(len(hidden), not natural, block.key_positions, since, until, key_document)
    keys_before = query_facts.new_empty(0)
    if not natural:
        position = torch.arange(block.key_positions.shape[1] + 1, device=hidden.device)
        keys_before = torch.searchsorted(
            key_facts[1], position.int().repeat(len(hidden), 1), out_int32=True
        )
    hides = visibility is not None
    bias = None if table is None else _bias_table(table, block.key_positions.shape[1])
    return BiasRule(bias, query_facts, key_facts, keys_before, natural, hides, documents)


def _bias_table(table: RelativePositionBias, num_keys: int) -> BiasTable:
    device = table.weight.device
    steps = bias_steps(table.num_embeddings, table.max_distance, device)
    by_step_HS = table(steps.bucket_S).T
    # Positions are smaller than the number of keys, but tiles may stick out.
    reach = num_keys + LARGEST_TILE
    step_R = step_of_each_distance(table.num_embeddings, table.max_distance, reach, device)
    strip = (by_step_HS.detach().float() * LOG2_E)[:, step_R].contiguous()
    return BiasTable(by_step_HS, strip, steps.end, steps.far)


def _facts(batch_size: int, sort: bool, *facts: Tensor) -> Tensor:
    """Return the row, the position and the other facts of each query or key, by position."""
    row = torch.arange(facts[0].shape[1], device=facts[0].device)[None]
    stacked = torch.stack([each.expand(batch_size, row.shape[1]) for each in (row, *facts)])
    if sort:
        by_position = facts[0].argsort(dim=1, stable=True).expand(batch_size, -1)
        stacked = stacked.gather(2, by_position.expand(len(stacked), -1, -1))
    return stacked.int()


def attend_triton(
    query_BHQK: Tensor,
    key_BHMK: Tensor,
    value_BHMK: Tensor,
    blocks: tuple[BiasedBlock, ...],
    dropout: float,
) -> Tensor:
    """Compute the attention of a layer; called as `Attention.attend` in `mpnet/attention.py` is.

    Needs Triton and CUDA tensors, or TRITON_INTERPRET=1 and any.
    """
    seeds = None
    if threshold(dropout) > 0:
        shape = (len(blocks), *query_BHQK.shape[:2], 2)
        seeds = torch.randint(2**31 - 1, shape, dtype=torch.int32, device=query_BHQK.device)
    rules: list[BiasRule] = [block.bias for block in blocks]
    tables = [rule.table for rule in rules if rule.table is not None]
    attended_BQHK, _ = torch.ops.annotated_mpnet.attend(
        query_BHQK.transpose(1, 2),
        key_BHMK.transpose(1, 2),
        value_BHMK.transpose(1, 2),
        # All blocks have the same table, whose gradient is that of all of them.
        tables[0].by_step_HS if tables else None,
        tables[0].end_of_step if tables else None,
        tables[0].far if tables else 0,
        [table.strip for table in tables],
        [rule.query_facts for rule in rules],
        [rule.key_facts for rule in rules],
        [rule.keys_before for rule in rules],
        [flag for rule in rules for flag in (rule.natural, rule.hides, rule.documents)],
        seeds,
        threshold(dropout),
    )
    return attended_BQHK


# Custom operators: autograd and `torch.compile` see one call with known shapes, and do not look
# inside. Queries, keys and values are (B, Q or M, H, K) here, those of all blocks.
@torch.library.custom_op("annotated_mpnet::attend", mutates_args=())
def _attend(
    query: Tensor, key: Tensor, value: Tensor,
    by_step: Tensor | None, end_of_step: Tensor | None, far: int, strips: Sequence[Tensor],
    query_facts: Sequence[Tensor], key_facts: Sequence[Tensor], keys_before: Sequence[Tensor],
    flags: Sequence[bool], seeds: Tensor | None, dropped: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the results (B, Q, H, K), and log2 of each query's sum of exponentials.

    The logarithms are (B, H, Q) of one block after the other, in the order of its facts.
    """
    from annotated_mpnet.fast.triton_kernels import attend_forward

    query, key, value = map(_heads_side_by_side, (query, key, value))
    out = query.new_empty(query.shape)
    log_sum = query.new_empty(query.shape[:3].numel(), dtype=torch.float32)
    for each in _launches(query, strips, query_facts, key_facts, keys_before, flags, seeds):
        how = launch("attend_forward", each.natural, query)
        of_block = query[:, each.queries], key[:, : each.num_keys], value[:, : each.num_keys]
        attend_forward[_num_tiles(each.num_queries, how.queries), each.programs](
            *of_block, out[:, each.queries], each.part(log_sum),
            *each.facts, each.strip, each.seeds, *_strides(query, key, value, out),
            *each.sizes(query, far, dropped), **each.constants(how, query),
        )  # fmt: skip
    return out, log_sum


@torch.library.custom_op("annotated_mpnet::attend_backward", mutates_args=())
def _attend_backward(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, d_out: Tensor, log_sum: Tensor,
    by_step: Tensor | None, end_of_step: Tensor | None, far: int, strips: Sequence[Tensor],
    query_facts: Sequence[Tensor], key_facts: Sequence[Tensor], keys_before: Sequence[Tensor],
    flags: Sequence[bool], seeds: Tensor | None, dropped: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of queries, keys, values, and of the steps (H, S)."""
    from annotated_mpnet.fast.triton_kernels import attend_backward_keys, attend_backward_queries

    query, key, value, d_out = map(_heads_side_by_side, (query, key, value, d_out))
    B, _, H, _ = query.shape
    d_query, d_key, d_value = (each.new_empty(each.shape) for each in (query, key, value))
    mean = torch.empty_like(log_sum)
    S = 0 if by_step is None else by_step.shape[1]
    d_until_HS = query.new_zeros(H, S, dtype=torch.float32)
    launches = _launches(query, strips, query_facts, key_facts, keys_before, flags, seeds)
    # The last block has all the keys. The others come after it, and add to its gradients.
    for each in reversed(launches):
        of_block = query[:, each.queries], key[:, : each.num_keys], value[:, : each.num_keys]
        logs = each.part(log_sum), each.part(mean)
        how = launch("attend_backward_queries", each.natural, query)
        num_tiles = _num_tiles(each.num_queries, how.queries)
        d_until = query.new_empty(B, H, num_tiles, _power_of_two(S), dtype=torch.float32)
        attend_backward_queries[num_tiles, each.programs](
            *of_block, out[:, each.queries], d_out[:, each.queries], *logs,
            d_query[:, each.queries], d_until, *each.facts, each.strip,
            end_of_step, each.keys_before, each.seeds,
            *_strides(query, key, value, out, d_out), *each.sizes(query, far, dropped),
            **each.constants(how, query), STEPS=_power_of_two(S),
        )  # fmt: skip
        d_until_HS += d_until.sum(dim=(0, 2))[:, :S]
        how = launch("attend_backward_keys", each.natural, query)
        attend_backward_keys[_num_tiles(each.num_keys, how.keys), each.programs](
            *of_block, d_out[:, each.queries], *logs, d_key, d_value, *each.facts, each.strip,
            each.seeds, *_strides(query, key, value, d_out), d_key.stride(0),
            *each.sizes(query, far, dropped),
            **each.constants(how, query), ADDS=each is not launches[-1],
        )  # fmt: skip
    d_by_step_HS = d_until_HS.diff(dim=1, prepend=d_until_HS.new_zeros(H, 1))
    return d_query, d_key, d_value, d_by_step_HS


@_attend.register_fake
def _(query, key, value, *_):  # type: ignore[no-untyped-def]
    log_sum = query.new_empty(query.shape[:3].numel(), dtype=torch.float32)
    return query.new_empty(query.shape), log_sum


@_attend_backward.register_fake
def _(query, key, value, out, d_out, log_sum, by_step, *_):  # type: ignore[no-untyped-def]
    shape = query.shape[2], 0 if by_step is None else by_step.shape[1]
    d_by_step = query.new_empty(shape, dtype=torch.float32)
    return (*(each.new_empty(each.shape) for each in (query, key, value)), d_by_step)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    query, key, value, by_step, end, far, strips, queries, keys, before, *rest = inputs
    flags, seeds, dropped = rest
    ctx.save_for_backward(
        query, key, value, by_step, end, seeds, *output, *strips, *queries, *keys, *before
    )
    ctx.numbers = far, flags, dropped


def _backward(ctx, d_out, _):  # type: ignore[no-untyped-def]
    query, key, value, by_step, end, seeds, out, log_sum, *lists = ctx.saved_tensors
    far, flags, dropped = ctx.numbers
    count = len(flags) // 3
    strips = lists[: len(lists) - 3 * count]
    of_blocks = [lists[len(strips) + i * count :][:count] for i in range(3)]
    *d_heads, d_by_step = torch.ops.annotated_mpnet.attend_backward(
        query, key, value, out, d_out, log_sum,
        by_step, end, far, strips, *of_blocks, flags, seeds, dropped,
    )  # fmt: skip
    no_lists = [None] * len(strips), *[[None] * count] * 3
    d_by_step = None if by_step is None else d_by_step
    return *d_heads, d_by_step, None, None, *no_lists, None, None, None


_attend.register_autograd(_backward, setup_context=_setup_context)


class _BlockLaunch(NamedTuple):
    """What the kernels are told about a block."""

    start: int
    num_queries: int
    num_keys: int
    programs: int
    strip: Tensor | None
    facts: tuple[Tensor, Tensor]
    keys_before: Tensor
    natural: bool
    hides: bool
    documents: bool
    seeds: Tensor | None

    @property
    def queries(self) -> slice:
        """Which of the queries are the block's."""
        return slice(self.start, self.start + self.num_queries)

    def part(self, of_queries: Tensor) -> Tensor:
        """Return the block's part of a number for each query and head."""
        return of_queries[self.programs * self.start :][: self.programs * self.num_queries]

    def sizes(self, query: Tensor, far: int, dropped: int) -> tuple[float, ...]:
        """Return the numbers that all kernels take: sizes, distances, scale, dropout."""
        B, _, H, K = query.shape
        reach = 0 if self.strip is None else self.strip.shape[1] // 2
        sizes = B, H, self.num_queries, self.num_keys, reach, far
        return *sizes, 1 / math.sqrt(K), dropped, LEVELS / (LEVELS - dropped)

    def constants(self, how: Launch, query: Tensor) -> dict[str, int | bool | None]:
        """Return what kernels are compiled for."""
        K = query.shape[3]
        return {
            "K": K,
            # Tensor cores need at least 16 columns, and tiles are powers of two.
            "WIDE_K": max(16, _power_of_two(K)),
            "TILE_Q": how.queries,
            "TILE_M": how.keys,
            "EVEN_Q": self.num_queries % how.queries == 0,
            "EVEN_M": self.num_keys % how.keys == 0,
            "BIASED": self.strip is not None,
            "NATURAL": self.natural,
            "HIDES": self.hides,
            "DOCUMENTS": self.documents,
            "DROPS": self.seeds is not None,
            "num_stages": how.stages,
            "maxnreg": how.registers,
        }


def _launches(
    query: Tensor,
    strips: Sequence[Tensor],
    query_facts: Sequence[Tensor],
    key_facts: Sequence[Tensor],
    keys_before: Sequence[Tensor],
    flags: Sequence[bool],
    seeds: Tensor | None,
) -> list[_BlockLaunch]:
    launches = []
    start = 0
    for i, facts in enumerate(zip(query_facts, key_facts, strict=True)):
        num_queries, num_keys = facts[0].shape[2], facts[1].shape[2]
        natural, hides, documents = flags[3 * i : 3 * i + 3]
        launches.append(
            _BlockLaunch(
                start,
                num_queries,
                num_keys,
                query.shape[0] * query.shape[2],
                strips[i] if strips else None,
                facts,
                keys_before[i],
                natural,
                hides,
                documents,
                None if seeds is None else seeds[i],
            )
        )
        start += num_queries
    return launches


def _heads_side_by_side(each: Tensor) -> Tensor:
    """Return (B, Q or M, H, K) with its heads side by side in memory, as a projection leaves it."""
    return each if each.stride()[2:] == (each.shape[3], 1) else each.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    """Return for each tensor the steps in memory to the next sample and to the next position."""
    return [each.stride(dim) for each in tensors for dim in (0, 1)]


def _num_tiles(count: int, tile: int) -> int:
    return -(-count // tile)


def _power_of_two(number: int) -> int:
    """Return the smallest power of two that is not smaller."""
    return 1 << max(number - 1, 0).bit_length()
