"""The kernels of `fast/triton_attention.py`, which explains what they do and why.

Triton looks like Python, but a function under `triton.jit` is compiled for the GPU. Each call of it
(a *program*) works on one tile, with tensors in registers.

- Pointers are arguments like any other: `pointer + index` is an address, and `load` takes a tensor
  of them. Queries, keys, values and results are (B, Q or M, H, K) in memory.
- Facts about queries and keys are int32, an array for each kind:

      query_facts   (4, B, Q)   row, position, tau, document
      key_facts     (5, B, M)   row, position, since, until, document

  They are sorted by position, and `row` says where the vectors of each are. So the distances in a
  tile are much the same, except where `NATURAL` says that query i is row i at position i, and key m
  likewise: then they are not read.

- The last tiles stick out, and repeat the last query or key. A key that does not exist has the
  score -inf; a query that does not exist has an infinite sum, so its weights are zero.
- Scores are in bits, because the hardware's exponential is 2^x.
- What a kernel is compiled for is in capitals. `EVEN_Q` and `EVEN_M` say that no tile sticks out,
  `HIDES` that there is anything that a query must not see, `DOCUMENTS` that documents decide too.

With TRITON_INTERPRET=1 the same code runs in NumPy, which is how it is tested without a GPU.

    Q queries of a tile   M keys of a tile   K width of a head   S steps of the bias
"""

import triton
import triton.language as tl
from triton.errors import TritonError

FAULTS = RuntimeError, TritonError
"""What a kernel raises that cannot be compiled, or run, on a card."""

LOG2_E = tl.constexpr(1.4426950408889634)
NEVER = tl.constexpr(2**30)
"""As in `mpnet/two_stream.py`: no query has so late a time, no pair so large a distance."""


@triton.jit
def attend_forward(
    query, key, value, out, log_sum, query_facts, key_facts, strip, seeds,
    query_sample, query_stride, key_sample, key_stride, value_sample, value_stride,
    out_sample, out_stride,
    num_samples, num_heads, num_queries, num_keys, reach, far, scale, dropped, rescale,
    K: tl.constexpr, WIDE_K: tl.constexpr, TILE_Q: tl.constexpr, TILE_M: tl.constexpr,
    EVEN_Q: tl.constexpr, EVEN_M: tl.constexpr, BIASED: tl.constexpr, NATURAL: tl.constexpr,
    HIDES: tl.constexpr, DOCUMENTS: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head: go through the keys, and keep sums instead of weights."""
    sample, head = tl.program_id(1) // num_heads, tl.program_id(1) % num_heads
    query += sample * query_sample + head * K
    key += sample * key_sample + head * K
    value += sample * value_sample + head * K
    query_facts += sample * num_queries
    key_facts += sample * num_keys
    if BIASED:
        strip += head * (2 * reach + 1) + reach
    seed, salt = load_seeds(seeds, DROPS)
    index_Q = tl.program_id(0) * TILE_Q + tl.arange(0, TILE_Q)
    row_Q, position_Q = place(query_facts, num_samples, num_queries, index_Q, NATURAL, EVEN_Q)
    query_QK = load_vectors(query, row_Q, query_stride, K, WIDE_K)

    # For each query the largest score so far, and sums over the keys so far of 2^(score - largest)
    # and of the values weighted by it. When a larger score comes, both sums shrink.
    largest_Q = tl.full([TILE_Q], float("-inf"), tl.float32)
    sum_Q = tl.zeros([TILE_Q], tl.float32)
    attended_QK = tl.zeros([TILE_Q, WIDE_K], tl.float32)
    for first in range(0, num_keys, TILE_M):
        index_M = first + tl.arange(0, TILE_M)
        row_M, position_M = place(key_facts, num_samples, num_keys, index_M, NATURAL, EVEN_M)
        key_MK = load_vectors(key, row_M, key_stride, K, WIDE_K)
        value_MK = load_vectors(value, row_M, value_stride, K, WIDE_K)
        scores_QM = score(
            query_QK, key_MK, index_Q, index_M, position_Q, position_M, query_facts, key_facts,
            num_samples, num_queries, num_keys, strip, far, scale,
            EVEN_M, BIASED, HIDES, DOCUMENTS,
        )  # fmt: skip
        before_Q = largest_Q
        largest_Q = tl.maximum(before_Q, tl.max(scores_QM, axis=1))
        shift_Q = largest_Q
        if HIDES:
            # A query that has seen nothing yet would subtract -inf from -inf.
            shift_Q = tl.where(largest_Q == float("-inf"), 0.0, largest_Q)
        weights_QM = tl.exp2(scores_QM - shift_Q[:, None])
        shrink_Q = tl.exp2(before_Q - shift_Q)
        sum_Q = sum_Q * shrink_Q + tl.sum(weights_QM, axis=1)
        if DROPS:
            # After the sum, because dropout acts on weights that add up to 1.
            kept_QM = draw_kept(seed, salt, row_Q, row_M, num_keys, dropped)
            weights_QM = tl.where(kept_QM, weights_QM * rescale, 0.0)
        attended_QK *= shrink_Q[:, None]
        attended_QK = tl.dot(
            weights_QM.to(value_MK.dtype), value_MK, attended_QK, input_precision="ieee"
        )
    attended_QK /= sum_Q[:, None]

    out += sample * out_sample + head * K
    store_vectors(out, attended_QK, row_Q, index_Q, num_queries, out_stride, K, WIDE_K)
    at_Q = (sample * num_heads + head) * num_queries + index_Q
    tl.store(log_sum + at_Q, largest_Q + tl.log2(sum_Q), mask=index_Q < num_queries)


@triton.jit
def attend_backward_queries(
    query, key, value, out, d_out, log_sum, mean, d_query, d_until,
    query_facts, key_facts, strip, end_of_step, keys_before, seeds,
    query_sample, query_stride, key_sample, key_stride, value_sample, value_stride,
    out_sample, out_stride, d_out_sample, d_out_stride,
    num_samples, num_heads, num_queries, num_keys, reach, far, scale, dropped, rescale,
    K: tl.constexpr, WIDE_K: tl.constexpr, TILE_Q: tl.constexpr, TILE_M: tl.constexpr,
    EVEN_Q: tl.constexpr, EVEN_M: tl.constexpr, BIASED: tl.constexpr, NATURAL: tl.constexpr,
    HIDES: tl.constexpr, DOCUMENTS: tl.constexpr, DROPS: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head: the gradients of the queries and of the bias."""
    sample, head = tl.program_id(1) // num_heads, tl.program_id(1) % num_heads
    query += sample * query_sample + head * K
    key += sample * key_sample + head * K
    value += sample * value_sample + head * K
    out += sample * out_sample + head * K
    d_out += sample * d_out_sample + head * K
    d_query += sample * out_sample + head * K
    query_facts += sample * num_queries
    key_facts += sample * num_keys
    if BIASED:
        strip += head * (2 * reach + 1) + reach
    seed, salt = load_seeds(seeds, DROPS)
    index_Q = tl.program_id(0) * TILE_Q + tl.arange(0, TILE_Q)
    row_Q, position_Q = place(query_facts, num_samples, num_queries, index_Q, NATURAL, EVEN_Q)
    query_QK = load_vectors(query, row_Q, query_stride, K, WIDE_K)
    d_out_QK = load_vectors(d_out, row_Q, d_out_stride, K, WIDE_K)
    out_QK = load_vectors(out, row_Q, out_stride, K, WIDE_K)
    mean_Q = tl.sum(out_QK.to(tl.float32) * d_out_QK.to(tl.float32), axis=1)
    at_Q = (sample * num_heads + head) * num_queries + index_Q
    exists_Q = index_Q < num_queries
    tl.store(mean + at_Q, mean_Q, mask=exists_Q)
    log_sum_Q = tl.load(log_sum + at_Q, mask=exists_Q, other=float("inf"))

    d_query_QK = tl.zeros([TILE_Q, WIDE_K], tl.float32)
    if BIASED:
        end_S = tl.load(end_of_step + tl.arange(0, STEPS))
        count_QS = position_Q[:, None] + end_S[None, :]
        if not NATURAL:
            count_QS = tl.minimum(tl.maximum(count_QS, 0), num_keys)
            count_QS = tl.load(keys_before + sample * (num_keys + 1) + count_QS)
        d_until_QS = tl.zeros([TILE_Q, STEPS], tl.float32)
        left_Q = tl.zeros([TILE_Q], tl.float32)
        right_Q = tl.zeros([TILE_Q], tl.float32)
    for first in range(0, num_keys, TILE_M):
        index_M = first + tl.arange(0, TILE_M)
        row_M, position_M = place(key_facts, num_samples, num_keys, index_M, NATURAL, EVEN_M)
        key_MK = load_vectors(key, row_M, key_stride, K, WIDE_K)
        value_MK = load_vectors(value, row_M, value_stride, K, WIDE_K)
        scores_QM = score(
            query_QK, key_MK, index_Q, index_M, position_Q, position_M, query_facts, key_facts,
            num_samples, num_queries, num_keys, strip, far, scale,
            EVEN_M, BIASED, HIDES, DOCUMENTS,
        )  # fmt: skip
        _, d_scores_QM = weights_and_gradient(
            scores_QM, d_out_QK, value_MK, log_sum_Q, mean_Q, seed, salt, row_Q, row_M,
            num_keys, dropped, rescale, DROPS,
        )  # fmt: skip
        d_query_QK = tl.dot(
            d_scores_QM.to(key_MK.dtype), key_MK, d_query_QK, input_precision="ieee"
        )
        if BIASED:
            left_Q, right_Q, d_until_QS = add_until_steps(
                left_Q, right_Q, d_until_QS, d_scores_QM, count_QS - first,
                position_Q, position_M, far, NATURAL, key_MK.dtype,
            )  # fmt: skip

    store_vectors(d_query, d_query_QK * scale, row_Q, index_Q, num_queries, out_stride, K, WIDE_K)
    if BIASED:
        # Each program has a place of its own, and the places are added up afterwards: atomic
        # additions to one table would come in any order.
        program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        left, right = tl.sum(left_Q, axis=0), tl.sum(right_Q, axis=0)
        d_until_S = tl.sum(d_until_QS, axis=0) + left + tl.where(end_S == NEVER, right, 0.0)
        tl.store(d_until + program * STEPS + tl.arange(0, STEPS), d_until_S)


@triton.jit
def attend_backward_keys(
    query, key, value, d_out, log_sum, mean, d_key, d_value, query_facts, key_facts, strip, seeds,
    query_sample, query_stride, key_sample, key_stride, value_sample, value_stride,
    d_out_sample, d_out_stride, d_key_sample,
    num_samples, num_heads, num_queries, num_keys, reach, far, scale, dropped, rescale,
    K: tl.constexpr, WIDE_K: tl.constexpr, TILE_Q: tl.constexpr, TILE_M: tl.constexpr,
    EVEN_Q: tl.constexpr, EVEN_M: tl.constexpr, BIASED: tl.constexpr, NATURAL: tl.constexpr,
    HIDES: tl.constexpr, DOCUMENTS: tl.constexpr, DROPS: tl.constexpr,
    ADDS: tl.constexpr,
):  # fmt: skip
    """One tile of keys of one head: go through the queries, and add up the gradients.

    `mean` is what `attend_backward_queries` has written. `ADDS`: to what another block has written.
    """
    sample, head = tl.program_id(1) // num_heads, tl.program_id(1) % num_heads
    query += sample * query_sample + head * K
    key += sample * key_sample + head * K
    value += sample * value_sample + head * K
    d_out += sample * d_out_sample + head * K
    d_key += sample * d_key_sample + head * K
    d_value += sample * d_key_sample + head * K
    query_facts += sample * num_queries
    key_facts += sample * num_keys
    if BIASED:
        strip += head * (2 * reach + 1) + reach
    seed, salt = load_seeds(seeds, DROPS)
    index_M = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    row_M, position_M = place(key_facts, num_samples, num_keys, index_M, NATURAL, EVEN_M)
    key_MK = load_vectors(key, row_M, key_stride, K, WIDE_K)
    value_MK = load_vectors(value, row_M, value_stride, K, WIDE_K)

    d_key_MK = tl.zeros([TILE_M, WIDE_K], tl.float32)
    d_value_MK = tl.zeros([TILE_M, WIDE_K], tl.float32)
    for first in range(0, num_queries, TILE_Q):
        index_Q = first + tl.arange(0, TILE_Q)
        row_Q, position_Q = place(query_facts, num_samples, num_queries, index_Q, NATURAL, EVEN_Q)
        query_QK = load_vectors(query, row_Q, query_stride, K, WIDE_K)
        d_out_QK = load_vectors(d_out, row_Q, d_out_stride, K, WIDE_K)
        at_Q = (sample * num_heads + head) * num_queries + index_Q
        exists_Q = index_Q < num_queries
        log_sum_Q = tl.load(log_sum + at_Q, mask=exists_Q, other=float("inf"))
        mean_Q = tl.load(mean + at_Q, mask=exists_Q, other=0.0)
        scores_QM = score(
            query_QK, key_MK, index_Q, index_M, position_Q, position_M, query_facts, key_facts,
            num_samples, num_queries, num_keys, strip, far, scale,
            EVEN_M, BIASED, HIDES, DOCUMENTS,
        )  # fmt: skip
        weights_QM, d_scores_QM = weights_and_gradient(
            scores_QM, d_out_QK, value_MK, log_sum_Q, mean_Q, seed, salt, row_Q, row_M,
            num_keys, dropped, rescale, DROPS,
        )  # fmt: skip
        weights_MQ = tl.trans(weights_QM.to(d_out_QK.dtype))
        d_value_MK = tl.dot(weights_MQ, d_out_QK, d_value_MK, input_precision="ieee")
        d_scores_MQ = tl.trans(d_scores_QM.to(query_QK.dtype))
        d_key_MK = tl.dot(d_scores_MQ, query_QK, d_key_MK, input_precision="ieee")

    d_key_MK *= scale
    if ADDS:
        d_key_MK += load_vectors(d_key, row_M, num_heads * K, K, WIDE_K)
        d_value_MK += load_vectors(d_value, row_M, num_heads * K, K, WIDE_K)
    store_vectors(d_key, d_key_MK, row_M, index_M, num_keys, num_heads * K, K, WIDE_K)
    store_vectors(d_value, d_value_MK, row_M, index_M, num_keys, num_heads * K, K, WIDE_K)


@triton.jit
def score(
    query_QK, key_MK, index_Q, index_M, position_Q, position_M, query_facts, key_facts,
    num_samples, num_queries, num_keys, strip, far, scale,
    EVEN_M: tl.constexpr, BIASED: tl.constexpr, HIDES: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Return scores in bits (Q, M), with -inf where a query must not see a key."""
    scores_QM = tl.dot(query_QK, tl.trans(key_MK), input_precision="ieee")
    if BIASED:
        bias_QM = bias_of_tile(strip, position_Q, position_M, far)
        scores_QM = scores_QM * (scale * LOG2_E) + bias_QM
    else:
        scores_QM *= scale * LOG2_E
    if HIDES:
        queries, keys = num_samples * num_queries, num_samples * num_keys
        exists_Q, exists_M = index_Q < num_queries, index_M < num_keys
        tau_Q = tl.load(query_facts + 2 * queries + index_Q, mask=exists_Q, other=0)
        # A key that does not exist is seen since NEVER.
        since_M = tl.load(key_facts + 2 * keys + index_M, mask=exists_M, other=NEVER)
        until_M = tl.load(key_facts + 3 * keys + index_M, mask=exists_M, other=0)
        sees_QM = (since_M[None, :] <= tau_Q[:, None]) & (tau_Q[:, None] < until_M[None, :])
        if DOCUMENTS:
            document_Q = tl.load(query_facts + 3 * queries + index_Q, mask=exists_Q, other=0)
            document_M = tl.load(key_facts + 4 * keys + index_M, mask=exists_M, other=0)
            same_QM = (document_Q[:, None] == document_M[None, :]) | (document_Q == 0)[:, None]
            sees_QM &= same_QM & (document_M != 0)[None, :]
        scores_QM = tl.where(sees_QM, scores_QM, float("-inf"))
    elif not EVEN_M:
        scores_QM = tl.where((index_M < num_keys)[None, :], scores_QM, float("-inf"))
    return scores_QM


@triton.jit
def bias_of_tile(strip, position_Q, position_M, far):
    """Return what the bias adds to the scores of a tile, (Q, M): `strip` begins at distance 0."""
    least, most = distances_of_tile(position_Q, position_M)
    if (least >= far) | (most <= -far):
        # All pairs are in the same outer step: one number for the whole tile.
        bias_QM = tl.zeros([position_Q.shape[0], position_M.shape[0]], tl.float32)
        bias_QM += tl.load(strip + least)
    else:
        bias_QM = tl.load(strip + (position_M[None, :] - position_Q[:, None]))
    return bias_QM


@triton.jit
def add_until_steps(
    left_Q, right_Q, d_until_QS, d_scores_QM, count_QS, position_Q, position_M, far,
    NATURAL: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Add the gradient of a tile's scores to sums for each query; return the sums.

    `left_Q` and `right_Q` are of tiles in one outer step. `d_until_QS` is of the others: of the
    keys before the end of each step. `count_QS` says how many of them begin with this tile.
    """
    TILE_Q: tl.constexpr = d_scores_QM.shape[0]
    TILE_M: tl.constexpr = d_scores_QM.shape[1]
    STEPS: tl.constexpr = count_QS.shape[1]
    least, most = distances_of_tile(position_Q, position_M)
    if least >= far:
        right_Q += tl.sum(d_scores_QM, axis=1)
    elif most <= -far:
        left_Q += tl.sum(d_scores_QM, axis=1)
    else:
        # One cumulative sum along the keys serves all steps.
        sums_QM = tl.cumsum(d_scores_QM, axis=1) if NATURAL else cumulative_sum(d_scores_QM, HALF)
        # As one long row: the compiler would gather from rows by slower instructions.
        sums = tl.reshape(sums_QM, [TILE_Q * TILE_M])
        last_QS = tl.minimum(count_QS, TILE_M) - 1
        at_QS = tl.arange(0, TILE_Q)[:, None] * TILE_M + tl.maximum(last_QS, 0)
        found_QS = tl.gather(sums, tl.reshape(at_QS, [TILE_Q * STEPS]), axis=0)
        d_until_QS += tl.where(last_QS >= 0, tl.reshape(found_QS, [TILE_Q, STEPS]), 0.0)
    return left_Q, right_Q, d_until_QS


@triton.jit
def cumulative_sum(values_QM, HALF: tl.constexpr):
    """Return the cumulative sum along the keys, (Q, M), as a product with a triangle of ones.

    Tensor cores are several times faster here than the sum itself. For them each number becomes two
    of half precision, which together have 16 bits and more.
    """
    index_M = tl.arange(0, values_QM.shape[1])
    until_MM = index_M[:, None] <= index_M[None, :]
    if tl.float32 == HALF:
        return tl.dot(values_QM, until_MM.to(tl.float32), input_precision="ieee")
    high_QM = values_QM.to(HALF)
    low_QM = (values_QM - high_QM.to(tl.float32)).to(HALF)
    return tl.dot(low_QM, until_MM.to(HALF), tl.dot(high_QM, until_MM.to(HALF)))


@triton.jit
def weights_and_gradient(
    scores_QM, d_out_QK, value_MK, log_sum_Q, mean_Q, seed, salt, row_Q, row_M,
    num_keys, dropped, rescale, DROPS: tl.constexpr,
):  # fmt: skip
    """Return the weights after dropout, and the gradient of the scores: both (Q, M).

    With g the gradient of the weights, score_m gets weight_m (g_m - sum_k weight_k g_k). The sum is
    also the product of the query's result with its gradient, which is known (`mean`).
    """
    weights_QM = tl.exp2(scores_QM - log_sum_Q[:, None])
    d_weights_QM = tl.dot(d_out_QK, tl.trans(value_MK), input_precision="ieee")
    dropped_QM = weights_QM
    if DROPS:
        kept_QM = draw_kept(seed, salt, row_Q, row_M, num_keys, dropped)
        d_weights_QM = tl.where(kept_QM, d_weights_QM * rescale, 0.0)
        dropped_QM = tl.where(kept_QM, weights_QM * rescale, 0.0)
    return dropped_QM, weights_QM * (d_weights_QM - mean_Q[:, None])


@triton.jit
def draw_kept(seed, salt, row_Q, row_M, num_keys, dropped):
    """Return which weights dropout keeps, (Q, M): a function of the pair and of two seeds.

    The number of the pair goes through a hash that flips each of its bits with probability 1/2 (C.
    Wellons' "lowbias32"). Nothing is stored, and it is cheaper than Philox, which `tl.rand` uses.
    """
    bits_QM = (row_Q[:, None] * num_keys + row_M[None, :]).to(tl.uint32) ^ seed
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
def place(facts, num_samples, count, index, NATURAL: tl.constexpr, EVEN: tl.constexpr):
    """Return the rows and positions of the queries or keys of a tile: each (Q,) or (M,)."""
    last = index
    if not EVEN:
        # What sticks out repeats the last, which keeps a tile's range of distances.
        last = tl.minimum(index, count - 1)
    if NATURAL:
        return last, last
    return tl.load(facts + last), tl.load(facts + num_samples * count + last)


@triton.jit
def distances_of_tile(position_Q, position_M):
    """Return the least and the largest distance, key - query, in a tile."""
    least = tl.min(position_M, axis=0) - tl.max(position_Q, axis=0)
    most = tl.max(position_M, axis=0) - tl.min(position_Q, axis=0)
    return least, most


@triton.jit
def load_vectors(pointer, row, stride, K: tl.constexpr, WIDE_K: tl.constexpr):
    """Return vectors of one head, with zeros beyond K: (Q, K) or (M, K)."""
    column = tl.arange(0, WIDE_K)
    at = pointer + row[:, None] * stride + column[None, :]
    if K == WIDE_K:
        return tl.load(at)
    return tl.load(at, mask=(column < K)[None, :], other=0.0)


@triton.jit
def store_vectors(
    pointer, values, row, index, count, stride, K: tl.constexpr, WIDE_K: tl.constexpr
):
    """Write vectors of one head, in the type of the target."""
    column = tl.arange(0, WIDE_K)
    inside = (index < count)[:, None] & (column < K)[None, :]
    at = pointer + row[:, None] * stride + column[None, :]
    tl.store(at, values.to(pointer.dtype.element_ty), mask=inside)
