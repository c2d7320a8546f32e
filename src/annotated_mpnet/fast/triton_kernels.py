"""The kernels of `fast/triton_attention.py`, which explains what they do and why.

Triton looks like Python, but a function under `triton.jit` is compiled for the GPU. Each call of it
(a *program*) works on one tile, with tensors in registers.

- Pointers are arguments like any other: `pointer + index` is an address, and `load` takes a tensor
  of them. Queries, keys, values and results are (B, Q or M, H, K) in memory.
- Facts about queries and keys are int32, an array for each kind:

      query_facts   (3, B, Q)   position, tau, document
      key_facts     (4, B, M)   position, since, until, document

- The last tiles stick out. Facts are repeated there and vectors are zero. A key that does not exist
  has the score -inf; a query that does not exist has an infinite sum, so its weights are zero.
- Scores are in bits, because the hardware's exponential is 2^x.

With TRITON_INTERPRET=1 the same code runs in NumPy, which is how it is tested without a GPU.

    Q queries of a tile   M keys of a tile   K width of a head   S steps of the bias
"""

import triton
import triton.language as tl
from triton.errors import TritonError

FAULTS = RuntimeError, TritonError
"""What a kernel raises that cannot be compiled, or run, on a card."""

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def attend_forward(
    query, key, value, out, log_sum, query_facts, key_facts, by_distance, seeds,
    query_sample, query_stride, key_sample, key_stride, value_sample, value_stride,
    num_samples, num_heads, num_queries, num_keys, far, scale, dropped, rescale,
    K: tl.constexpr, WIDE_K: tl.constexpr, TILE_Q: tl.constexpr, TILE_M: tl.constexpr,
    BIASED: tl.constexpr, HIDES: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head: go through the keys, and keep sums instead of weights."""
    sample, head = tl.program_id(1) // num_heads, tl.program_id(1) % num_heads
    query += sample * query_sample + head * K
    key += sample * key_sample + head * K
    value += sample * value_sample + head * K
    index_Q = tl.program_id(0) * TILE_Q + tl.arange(0, TILE_Q)
    facts_Q = facts_of_queries(query_facts, num_samples, num_queries, sample, index_Q)
    query_QK = load_vectors(query, index_Q, num_queries, query_stride, K, WIDE_K)
    if BIASED:
        by_distance += head * (2 * far + 1)
    seed, salt = load_seeds(seeds, DROPS)

    # For each query the largest score so far, and sums over the keys so far of 2^(score - largest)
    # and of the values weighted by it. When a larger score comes, both sums shrink.
    largest_Q = tl.full([TILE_Q], float("-inf"), tl.float32)
    sum_Q = tl.zeros([TILE_Q], tl.float32)
    attended_QK = tl.zeros([TILE_Q, WIDE_K], tl.float32)
    for first in range(0, num_keys, TILE_M):
        index_M = first + tl.arange(0, TILE_M)
        key_MK = load_vectors(key, index_M, num_keys, key_stride, K, WIDE_K)
        value_MK = load_vectors(value, index_M, num_keys, value_stride, K, WIDE_K)
        scores_QM = score(
            query_QK, key_MK, facts_Q, key_facts, index_M,
            num_samples, num_keys, sample, by_distance, far, scale, BIASED, HIDES,
        )  # fmt: skip
        before_Q = largest_Q
        largest_Q = tl.maximum(before_Q, tl.max(scores_QM, axis=1))
        # A query that has seen nothing yet would subtract -inf from -inf.
        shift_Q = tl.where(largest_Q == float("-inf"), 0.0, largest_Q)
        weights_QM = tl.exp2(scores_QM - shift_Q[:, None])
        shrink_Q = tl.exp2(before_Q - shift_Q)
        sum_Q = sum_Q * shrink_Q + tl.sum(weights_QM, axis=1)
        if DROPS:
            # After the sum, because dropout acts on weights that add up to 1.
            kept_QM = draw_kept(seed, salt, index_Q, index_M, num_keys, dropped)
            weights_QM = tl.where(kept_QM, weights_QM * rescale, 0.0)
        attended_QK *= shrink_Q[:, None]
        attended_QK += tl.dot(weights_QM.to(value_MK.dtype), value_MK, input_precision="ieee")
    attended_QK /= sum_Q[:, None]

    store_vectors(out, attended_QK, sample, head, index_Q, num_queries, num_heads, K, WIDE_K)
    at_Q = (sample * num_heads + head) * num_queries + index_Q
    tl.store(log_sum + at_Q, largest_Q + tl.log2(sum_Q), mask=index_Q < num_queries)


@triton.jit
def attend_backward_keys(
    query, key, value, d_out, log_sum, mean, d_key, d_value,
    query_facts, key_facts, by_distance, seeds,
    query_sample, query_stride, key_sample, key_stride, value_sample, value_stride,
    out_sample, out_stride,
    num_samples, num_heads, num_queries, num_keys, far, scale, dropped, rescale,
    K: tl.constexpr, WIDE_K: tl.constexpr, TILE_Q: tl.constexpr, TILE_M: tl.constexpr,
    BIASED: tl.constexpr, HIDES: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    """One tile of keys of one head: go through the queries, and add up the gradients."""
    sample, head = tl.program_id(1) // num_heads, tl.program_id(1) % num_heads
    query += sample * query_sample + head * K
    key += sample * key_sample + head * K
    value += sample * value_sample + head * K
    d_out += sample * out_sample + head * K
    index_M = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    key_MK = load_vectors(key, index_M, num_keys, key_stride, K, WIDE_K)
    value_MK = load_vectors(value, index_M, num_keys, value_stride, K, WIDE_K)
    if BIASED:
        by_distance += head * (2 * far + 1)
    seed, salt = load_seeds(seeds, DROPS)

    d_key_MK = tl.zeros([TILE_M, WIDE_K], tl.float32)
    d_value_MK = tl.zeros([TILE_M, WIDE_K], tl.float32)
    for first in range(0, num_queries, TILE_Q):
        index_Q = first + tl.arange(0, TILE_Q)
        query_QK = load_vectors(query, index_Q, num_queries, query_stride, K, WIDE_K)
        d_out_QK = load_vectors(d_out, index_Q, num_queries, out_stride, K, WIDE_K)
        facts_Q = facts_of_queries(query_facts, num_samples, num_queries, sample, index_Q)
        scores_QM = score(
            query_QK, key_MK, facts_Q, key_facts, index_M,
            num_samples, num_keys, sample, by_distance, far, scale, BIASED, HIDES,
        )  # fmt: skip
        weights_QM, d_scores_QM = weights_and_gradient(
            scores_QM, d_out_QK, value_MK, log_sum, mean, seed, salt, index_Q, index_M,
            sample * num_heads + head, num_queries, num_keys, dropped, rescale, DROPS,
        )  # fmt: skip
        weights_MQ = tl.trans(weights_QM.to(d_out_QK.dtype))
        d_value_MK += tl.dot(weights_MQ, d_out_QK, input_precision="ieee")
        d_scores_MQ = tl.trans(d_scores_QM.to(query_QK.dtype))
        d_key_MK += tl.dot(d_scores_MQ, query_QK, input_precision="ieee")

    store_vectors(d_key, d_key_MK * scale, sample, head, index_M, num_keys, num_heads, K, WIDE_K)
    store_vectors(d_value, d_value_MK, sample, head, index_M, num_keys, num_heads, K, WIDE_K)


@triton.jit
def attend_backward_queries(
    query, key, value, d_out, log_sum, mean, d_query, d_by_step,
    query_facts, key_facts, by_distance, step_of_distance, first_distance, seeds,
    query_sample, query_stride, key_sample, key_stride, value_sample, value_stride,
    out_sample, out_stride,
    num_samples, num_heads, num_queries, num_keys, far, scale, dropped, rescale,
    K: tl.constexpr, WIDE_K: tl.constexpr, TILE_Q: tl.constexpr, TILE_M: tl.constexpr,
    BIASED: tl.constexpr, HIDES: tl.constexpr, DROPS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head: the gradients of the queries and of the bias."""
    sample, head = tl.program_id(1) // num_heads, tl.program_id(1) % num_heads
    query += sample * query_sample + head * K
    key += sample * key_sample + head * K
    value += sample * value_sample + head * K
    d_out += sample * out_sample + head * K
    index_Q = tl.program_id(0) * TILE_Q + tl.arange(0, TILE_Q)
    facts_Q = facts_of_queries(query_facts, num_samples, num_queries, sample, index_Q)
    query_QK = load_vectors(query, index_Q, num_queries, query_stride, K, WIDE_K)
    d_out_QK = load_vectors(d_out, index_Q, num_queries, out_stride, K, WIDE_K)
    if BIASED:
        by_distance += head * (2 * far + 1)
    seed, salt = load_seeds(seeds, DROPS)

    d_query_QK = tl.zeros([TILE_Q, WIDE_K], tl.float32)
    d_step_S = tl.zeros([STEPS], tl.float32)
    for first in range(0, num_keys, TILE_M):
        index_M = first + tl.arange(0, TILE_M)
        key_MK = load_vectors(key, index_M, num_keys, key_stride, K, WIDE_K)
        value_MK = load_vectors(value, index_M, num_keys, value_stride, K, WIDE_K)
        scores_QM = score(
            query_QK, key_MK, facts_Q, key_facts, index_M,
            num_samples, num_keys, sample, by_distance, far, scale, BIASED, HIDES,
        )  # fmt: skip
        _, d_scores_QM = weights_and_gradient(
            scores_QM, d_out_QK, value_MK, log_sum, mean, seed, salt, index_Q, index_M,
            sample * num_heads + head, num_queries, num_keys, dropped, rescale, DROPS,
        )  # fmt: skip
        d_query_QK += tl.dot(d_scores_QM.to(key_MK.dtype), key_MK, input_precision="ieee")
        if BIASED:
            position_M = fact(key_facts, 0, num_samples, num_keys, sample, index_M)
            d_step_S += by_steps(
                d_scores_QM, facts_Q[0], position_M, step_of_distance, first_distance, far, STEPS
            )

    store_vectors(
        d_query, d_query_QK * scale, sample, head, index_Q, num_queries, num_heads, K, WIDE_K
    )
    if BIASED:
        # Each program has a place of its own, and the places are added up afterwards: atomic
        # additions to one table would come in any order.
        program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        step_S = tl.arange(0, STEPS)
        tl.store(d_by_step + program * STEPS + step_S, d_step_S)


@triton.jit
def score(
    query_QK, key_MK, facts_Q, key_facts, index_M,
    num_samples, num_keys, sample, by_distance, far, scale,
    BIASED: tl.constexpr, HIDES: tl.constexpr,
):  # fmt: skip
    """Return scores in bits (Q, M), with -inf where a query must not see a key."""
    position_Q, tau_Q, document_Q = facts_Q
    scores_QM = tl.dot(query_QK, tl.trans(key_MK), input_precision="ieee") * (scale * LOG2_E)
    if BIASED:
        position_M = fact(key_facts, 0, num_samples, num_keys, sample, index_M)
        scores_QM += bias_of_tile(by_distance, position_Q, position_M, far) * LOG2_E
    exists_M = index_M < num_keys
    if HIDES:
        since_M = fact(key_facts, 1, num_samples, num_keys, sample, index_M)
        until_M = fact(key_facts, 2, num_samples, num_keys, sample, index_M)
        document_M = fact(key_facts, 3, num_samples, num_keys, sample, index_M)
        in_time_QM = (since_M[None, :] <= tau_Q[:, None]) & (tau_Q[:, None] < until_M[None, :])
        same_QM = (document_Q[:, None] == document_M[None, :]) | (document_Q == 0)[:, None]
        sees_QM = in_time_QM & same_QM & (exists_M & (document_M != 0))[None, :]
        return tl.where(sees_QM, scores_QM, float("-inf"))
    return tl.where(exists_M[None, :], scores_QM, float("-inf"))


@triton.jit
def bias_of_tile(by_distance, position_Q, position_M, far):
    """Return what the bias adds to the scores of a tile: (Q, M)."""
    least, most = distances_of_tile(position_Q, position_M)
    if (least >= far) | (most <= -far):
        # All pairs are in the same outer step: one number for the whole tile.
        shared = tl.load(by_distance + tl.where(least >= far, 2 * far, 0))
        bias_QM = tl.zeros([position_Q.shape[0], position_M.shape[0]], tl.float32) + shared
    else:
        distance_QM = position_M[None, :] - position_Q[:, None]
        clamped_QM = tl.minimum(tl.maximum(distance_QM, -far), far)
        bias_QM = tl.load(by_distance + far + clamped_QM)
    return bias_QM


@triton.jit
def by_steps(
    d_scores_QM, position_Q, position_M, step_of_distance, first_distance, far, STEPS: tl.constexpr
):
    """Add up the gradient of a tile's scores for each step of the bias: (S,).

    Far from the diagonal the tile lies in one step. Elsewhere, if the keys are neighbours in order,
    a step is a piece of each query's row: one cumulative sum along the keys serves all steps. With
    keys in any other order, the tile is added up once for each step that it meets.
    """
    least, most = distances_of_tile(position_Q, position_M)
    lowest = tl.load(step_of_distance + far + tl.minimum(tl.maximum(least, -far), far))
    highest = tl.load(step_of_distance + far + tl.minimum(tl.maximum(most, -far), far))
    step_S = tl.arange(0, STEPS)
    d_step_S = tl.zeros([STEPS], tl.float32)
    if lowest == highest:
        total = tl.sum(tl.sum(d_scores_QM, axis=1), axis=0)
        d_step_S = tl.where(step_S == lowest, total, 0.0)
    elif in_order(position_M):
        before_QM = tl.cumsum(d_scores_QM, axis=1)
        met_S = (step_S >= lowest) & (step_S <= highest)
        first_S = tl.load(first_distance + step_S, mask=met_S, other=0)
        end_S = tl.load(first_distance + step_S + 1, mask=met_S, other=0)
        # The key at distance 0 from each query, as an index into the tile, which it may lie beyond.
        origin_Q = position_Q - tl.min(position_M, axis=0)
        d_step_S = sum_before(before_QM, origin_Q, end_S) - sum_before(before_QM, origin_Q, first_S)
    else:
        distance_QM = position_M[None, :] - position_Q[:, None]
        for step in range(lowest, highest + 1):
            first = tl.load(first_distance + step)
            end = tl.load(first_distance + step + 1)
            inside_QM = (distance_QM >= first) & (distance_QM < end)
            total = tl.sum(tl.sum(tl.where(inside_QM, d_scores_QM, 0.0), axis=1), axis=0)
            d_step_S += tl.where(step_S == step, total, 0.0)
    return d_step_S


@triton.jit
def in_order(position_M):
    """Return whether each key is the right neighbour of the one before; the last may be repeated.

    Repeated keys do not exist, and have no gradient.
    """
    index_M = tl.arange(0, position_M.shape[0])
    first, last = tl.min(position_M, axis=0), tl.max(position_M, axis=0)
    wrong_M = position_M != tl.minimum(first + index_M, last)
    return tl.sum(wrong_M.to(tl.int32), axis=0) == 0


@triton.jit
def sum_before(before_QM, origin_Q, distance_S):
    """Add up, over the queries, the keys that are less than each distance away: (S,).

    before_QM: the sum of each query's keys up to each one.
    """
    count_QS = origin_Q[:, None] + distance_S[None, :]
    last_QS = tl.minimum(tl.maximum(count_QS, 0), before_QM.shape[1]) - 1
    sums_QS = tl.gather(before_QM, tl.maximum(last_QS, 0), axis=1)
    return tl.sum(tl.where(last_QS >= 0, sums_QS, 0.0), axis=0)


@triton.jit
def weights_and_gradient(
    scores_QM, d_out_QK, value_MK, log_sum, mean, seed, salt, index_Q, index_M,
    sample_and_head, num_queries, num_keys, dropped, rescale, DROPS: tl.constexpr,
):  # fmt: skip
    """Return the weights after dropout, and the gradient of the scores: both (Q, M).

    With g the gradient of the weights, score_m gets weight_m (g_m - sum_k weight_k g_k). The sum is
    also the product of the query's result with its gradient, which is known (`mean`).
    """
    at_Q = sample_and_head * num_queries + index_Q
    log_sum_Q = tl.load(log_sum + at_Q, mask=index_Q < num_queries, other=float("inf"))
    mean_Q = tl.load(mean + at_Q, mask=index_Q < num_queries, other=0.0)
    weights_QM = tl.exp2(scores_QM - log_sum_Q[:, None])
    d_weights_QM = tl.dot(d_out_QK, tl.trans(value_MK), input_precision="ieee")
    dropped_QM = weights_QM
    if DROPS:
        kept_QM = draw_kept(seed, salt, index_Q, index_M, num_keys, dropped)
        d_weights_QM = tl.where(kept_QM, d_weights_QM * rescale, 0.0)
        dropped_QM = tl.where(kept_QM, weights_QM * rescale, 0.0)
    return dropped_QM, weights_QM * (d_weights_QM - mean_Q[:, None])


@triton.jit
def draw_kept(seed, salt, index_Q, index_M, num_keys, dropped):
    """Return which weights dropout keeps, (Q, M): a function of the pair and of two seeds.

    The number of the pair goes through a hash that flips each of its bits with probability 1/2 (C.
    Wellons' "lowbias32"). Nothing is stored, and it is cheaper than Philox, which `tl.rand` uses.
    """
    bits_QM = (index_Q[:, None] * num_keys + index_M[None, :]).to(tl.uint32) ^ seed
    bits_QM ^= bits_QM >> 16
    bits_QM *= 0x7FEB352D
    bits_QM ^= bits_QM >> 15
    bits_QM *= 0x846CA68B
    bits_QM ^= bits_QM >> 16
    # With one seed, heads with similar seeds would draw the same bits in another order.
    bits_QM = (bits_QM ^ salt) * 0x9E3779B1
    return (bits_QM >> 16) >= dropped


@triton.jit
def load_seeds(seeds, DROPS: tl.constexpr):
    """Return the two words of this program's sample and head."""
    if DROPS:
        at = seeds + 2 * tl.program_id(1)
        return tl.load(at).to(tl.uint32), tl.load(at + 1).to(tl.uint32)
    return tl.full([], 0, tl.uint32), tl.full([], 0, tl.uint32)


@triton.jit
def facts_of_queries(query_facts, num_samples, num_queries, sample, index_Q):
    """Return position, tau and document of the queries of a tile: each (Q,)."""
    return (
        fact(query_facts, 0, num_samples, num_queries, sample, index_Q),
        fact(query_facts, 1, num_samples, num_queries, sample, index_Q),
        fact(query_facts, 2, num_samples, num_queries, sample, index_Q),
    )


@triton.jit
def fact(facts, kind, num_samples, count, sample, index):
    """Return one kind of fact. After the end it repeats the last, which keeps a tile's range."""
    return tl.load(facts + (kind * num_samples + sample) * count + tl.minimum(index, count - 1))


@triton.jit
def distances_of_tile(position_Q, position_M):
    """Return the least and the largest distance, key - query, in a tile."""
    least = tl.min(position_M, axis=0) - tl.max(position_Q, axis=0)
    most = tl.max(position_M, axis=0) - tl.min(position_Q, axis=0)
    return least, most


@triton.jit
def load_vectors(pointer, index, count, stride, K: tl.constexpr, WIDE_K: tl.constexpr):
    """Return vectors of one head, with zeros after the last and beyond K: (Q, K) or (M, K)."""
    column = tl.arange(0, WIDE_K)
    inside = (index < count)[:, None] & (column < K)[None, :]
    return tl.load(pointer + index[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def store_vectors(
    pointer, values, sample, head, index, count, num_heads, K: tl.constexpr, WIDE_K: tl.constexpr
):
    """Write vectors of one head into a contiguous (B, count, H, K), in its type."""
    column = tl.arange(0, WIDE_K)
    inside = (index < count)[:, None] & (column < K)[None, :]
    at = ((sample * count + index[:, None]) * num_heads + head) * K + column[None, :]
    tl.store(pointer + at, values.to(pointer.dtype.element_ty), mask=inside)
