"""The kernels of `fast/triton_attention.py`, whose chapter says what they do and why.

Triton is Python in form only: a function under `triton.jit` is compiled for the GPU, and each call
of it (a *program*) works on one tile, with tensors that live in registers. The conventions here:

- Pointers are arguments like others; `pointer + index` is an address, and `load` takes tensors of
  them. Entries of queries, keys, values and results lie as (B, rows, H, K): heads side by side.
- What a row or key is known by comes in two arrays of int32, one line for each kind of fact:

      rows   (3, B, Q)   position, time, document
      keys   (4, B, M)   position, since, until, document

- Tiles at the end of the rows stick out. There, loads repeat the last row or give zeros; a key that
  does not exist gets a score of -inf, and a row that does not exist a sum of exponentials of
  infinity, so that its weights are zero. No further care is needed.
- Scores are in bits: the exponential of the hardware is 2^x, and a factor of log2(e) is cheaper on
  the K columns of the queries, or on a number, than on each score.

With TRITON_INTERPRET=1 the same code runs in NumPy, tile by tile, which is how the tests compare it
with the formula on machines without a GPU.

    Q rows of a tile that ask   M keys of a tile   K head_dim   S steps of the bias
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def attend_forward(
    query, key, value, out, log_sum, rows, keys, by_distance, seeds,
    query_sample, query_row, key_sample, key_row, value_sample, value_row,
    num_samples, num_heads, num_rows, num_keys, far, scale, dropped, rescale,
    K: tl.constexpr, WIDE_K: tl.constexpr, TILE_Q: tl.constexpr, TILE_M: tl.constexpr,
    BIASED: tl.constexpr, HIDES: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    """One tile of rows of one head: go through the keys, and keep sums instead of weights."""
    sample, head = tl.program_id(1) // num_heads, tl.program_id(1) % num_heads
    row_Q = tl.program_id(0) * TILE_Q + tl.arange(0, TILE_Q)
    place_Q, time_Q, document_Q = row_facts(rows, num_samples, num_rows, sample, row_Q)
    query_QK = load_rows(
        query + sample * query_sample + head * K, row_Q, num_rows, query_row, K, WIDE_K
    )
    if BIASED:
        by_distance += head * (2 * far + 1)
    seed, salt = load_seeds(seeds, DROPS)

    # Of each row: its largest score so far, and sums over the keys so far of 2^(score - largest)
    # and of values weighted by it. When a larger score comes, both sums shrink accordingly.
    largest_Q = tl.full([TILE_Q], float("-inf"), tl.float32)
    sum_Q = tl.zeros([TILE_Q], tl.float32)
    gathered_QK = tl.zeros([TILE_Q, WIDE_K], tl.float32)
    for first in range(0, num_keys, TILE_M):
        key_M = first + tl.arange(0, TILE_M)
        key_MK = load_rows(
            key + sample * key_sample + head * K, key_M, num_keys, key_row, K, WIDE_K
        )
        value_MK = load_rows(
            value + sample * value_sample + head * K, key_M, num_keys, value_row, K, WIDE_K
        )
        scores_QM = score(
            query_QK, key_MK, place_Q, time_Q, document_Q, keys, key_M,
            num_samples, num_keys, sample, by_distance, far, scale, BIASED, HIDES,
        )  # fmt: skip
        before_Q = largest_Q
        largest_Q = tl.maximum(before_Q, tl.max(scores_QM, axis=1))
        # A row that has seen nothing yet: -inf minus -inf is no number, and 0 stands in for it.
        shift_Q = tl.where(largest_Q == float("-inf"), 0.0, largest_Q)
        weights_QM = tl.exp2(scores_QM - shift_Q[:, None])
        shrink_Q = tl.exp2(before_Q - shift_Q)
        sum_Q = sum_Q * shrink_Q + tl.sum(weights_QM, axis=1)
        if DROPS:
            # Behind the sum: dropout acts on weights that add up to 1.
            kept_QM = draw_kept(seed, salt, row_Q, key_M, num_keys, dropped)
            weights_QM = tl.where(kept_QM, weights_QM * rescale, 0.0)
        gathered_QK *= shrink_Q[:, None]
        gathered_QK += tl.dot(weights_QM.to(value_MK.dtype), value_MK, input_precision="ieee")
    gathered_QK /= sum_Q[:, None]

    store_rows(out, gathered_QK, sample, head, row_Q, num_rows, num_heads, K, WIDE_K)
    at_Q = (sample * num_heads + head) * num_rows + row_Q
    tl.store(log_sum + at_Q, largest_Q + tl.log2(sum_Q), mask=row_Q < num_rows)


@triton.jit
def attend_backward_keys(
    query, key, value, d_out, log_sum, mean, d_key, d_value, rows, keys, by_distance, seeds,
    query_sample, query_row, key_sample, key_row, value_sample, value_row, out_sample, out_row,
    num_samples, num_heads, num_rows, num_keys, far, scale, dropped, rescale,
    K: tl.constexpr, WIDE_K: tl.constexpr, TILE_Q: tl.constexpr, TILE_M: tl.constexpr,
    BIASED: tl.constexpr, HIDES: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    """One tile of keys of one head: go through the rows, and add up what they send back."""
    sample, head = tl.program_id(1) // num_heads, tl.program_id(1) % num_heads
    key_M = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    key_MK = load_rows(key + sample * key_sample + head * K, key_M, num_keys, key_row, K, WIDE_K)
    value_MK = load_rows(
        value + sample * value_sample + head * K, key_M, num_keys, value_row, K, WIDE_K
    )
    if BIASED:
        by_distance += head * (2 * far + 1)
    seed, salt = load_seeds(seeds, DROPS)

    d_key_MK = tl.zeros([TILE_M, WIDE_K], tl.float32)
    d_value_MK = tl.zeros([TILE_M, WIDE_K], tl.float32)
    for first in range(0, num_rows, TILE_Q):
        row_Q = first + tl.arange(0, TILE_Q)
        query_QK = load_rows(
            query + sample * query_sample + head * K, row_Q, num_rows, query_row, K, WIDE_K
        )
        d_out_QK = load_rows(
            d_out + sample * out_sample + head * K, row_Q, num_rows, out_row, K, WIDE_K
        )
        place_Q, time_Q, document_Q = row_facts(rows, num_samples, num_rows, sample, row_Q)
        scores_QM = score(
            query_QK, key_MK, place_Q, time_Q, document_Q, keys, key_M,
            num_samples, num_keys, sample, by_distance, far, scale, BIASED, HIDES,
        )  # fmt: skip
        weights_QM, d_scores_QM = weights_and_gradient(
            scores_QM, d_out_QK, value_MK, log_sum, mean, seed, salt, row_Q, key_M,
            sample * num_heads + head, num_rows, num_keys, dropped, rescale, DROPS,
        )  # fmt: skip
        d_value_MK += tl.dot(
            tl.trans(weights_QM.to(d_out_QK.dtype)), d_out_QK, input_precision="ieee"
        )
        d_key_MK += tl.dot(
            tl.trans(d_scores_QM.to(query_QK.dtype)), query_QK, input_precision="ieee"
        )

    store_rows(d_key, d_key_MK * scale, sample, head, key_M, num_keys, num_heads, K, WIDE_K)
    store_rows(d_value, d_value_MK, sample, head, key_M, num_keys, num_heads, K, WIDE_K)


@triton.jit
def attend_backward_queries(
    query, key, value, d_out, log_sum, mean, d_query, d_by_step, rows, keys, by_distance,
    step_of_distance, first_distance, seeds,
    query_sample, query_row, key_sample, key_row, value_sample, value_row, out_sample, out_row,
    num_samples, num_heads, num_rows, num_keys, far, scale, dropped, rescale,
    K: tl.constexpr, WIDE_K: tl.constexpr, TILE_Q: tl.constexpr, TILE_M: tl.constexpr,
    BIASED: tl.constexpr, HIDES: tl.constexpr, DROPS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """One tile of rows of one head: what they and the bias get back from all keys."""
    sample, head = tl.program_id(1) // num_heads, tl.program_id(1) % num_heads
    row_Q = tl.program_id(0) * TILE_Q + tl.arange(0, TILE_Q)
    place_Q, time_Q, document_Q = row_facts(rows, num_samples, num_rows, sample, row_Q)
    query_QK = load_rows(
        query + sample * query_sample + head * K, row_Q, num_rows, query_row, K, WIDE_K
    )
    d_out_QK = load_rows(
        d_out + sample * out_sample + head * K, row_Q, num_rows, out_row, K, WIDE_K
    )
    if BIASED:
        by_distance += head * (2 * far + 1)
    seed, salt = load_seeds(seeds, DROPS)

    d_query_QK = tl.zeros([TILE_Q, WIDE_K], tl.float32)
    d_step_S = tl.zeros([STEPS], tl.float32)
    for first in range(0, num_keys, TILE_M):
        key_M = first + tl.arange(0, TILE_M)
        key_MK = load_rows(
            key + sample * key_sample + head * K, key_M, num_keys, key_row, K, WIDE_K
        )
        value_MK = load_rows(
            value + sample * value_sample + head * K, key_M, num_keys, value_row, K, WIDE_K
        )
        scores_QM = score(
            query_QK, key_MK, place_Q, time_Q, document_Q, keys, key_M,
            num_samples, num_keys, sample, by_distance, far, scale, BIASED, HIDES,
        )  # fmt: skip
        _, d_scores_QM = weights_and_gradient(
            scores_QM, d_out_QK, value_MK, log_sum, mean, seed, salt, row_Q, key_M,
            sample * num_heads + head, num_rows, num_keys, dropped, rescale, DROPS,
        )  # fmt: skip
        d_query_QK += tl.dot(d_scores_QM.to(key_MK.dtype), key_MK, input_precision="ieee")
        if BIASED:
            place_M = fact(keys, 0, num_samples, num_keys, sample, key_M)
            d_step_S += by_steps(
                d_scores_QM, place_Q, place_M, step_of_distance, first_distance, far, STEPS
            )

    store_rows(d_query, d_query_QK * scale, sample, head, row_Q, num_rows, num_heads, K, WIDE_K)
    if BIASED:
        # A place of its own for each program. Added up afterwards, in an order that does not depend
        # on which of them was ready first, as it would with atomic additions to a single table.
        program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        step_S = tl.arange(0, STEPS)
        tl.store(d_by_step + program * STEPS + step_S, d_step_S)


@triton.jit
def score(
    query_QK, key_MK, place_Q, time_Q, document_Q, keys, key_M,
    num_samples, num_keys, sample, by_distance, far, scale,
    BIASED: tl.constexpr, HIDES: tl.constexpr,
):  # fmt: skip
    """Return scores in bits (Q, M), with -inf where a row must not see a key."""
    scores_QM = tl.dot(query_QK, tl.trans(key_MK), input_precision="ieee") * (scale * LOG2_E)
    if BIASED:
        place_M = fact(keys, 0, num_samples, num_keys, sample, key_M)
        scores_QM += bias_of_tile(by_distance, place_Q, place_M, far) * LOG2_E
    exists_M = key_M < num_keys
    if HIDES:
        # The rule of `two_stream.Visibility`: the key's span of time, and the document.
        since_M = fact(keys, 1, num_samples, num_keys, sample, key_M)
        until_M = fact(keys, 2, num_samples, num_keys, sample, key_M)
        document_M = fact(keys, 3, num_samples, num_keys, sample, key_M)
        in_time_QM = (since_M[None, :] <= time_Q[:, None]) & (time_Q[:, None] < until_M[None, :])
        same_QM = (document_Q[:, None] == document_M[None, :]) | (document_Q == 0)[:, None]
        sees_QM = in_time_QM & same_QM & (exists_M & (document_M != 0))[None, :]
        return tl.where(sees_QM, scores_QM, float("-inf"))
    return tl.where(exists_M[None, :], scores_QM, float("-inf"))


@triton.jit
def bias_of_tile(by_distance, place_Q, place_M, far):
    """Return what the bias adds to the scores of a tile: (Q, M)."""
    least, most = distances_of_tile(place_Q, place_M)
    if (least >= far) | (most <= -far):
        # All pairs are so far apart that they share the last step: one number for the whole tile.
        shared = tl.load(by_distance + tl.where(least >= far, 2 * far, 0))
        bias_QM = tl.zeros([place_Q.shape[0], place_M.shape[0]], tl.float32) + shared
    else:
        distance_QM = place_M[None, :] - place_Q[:, None]
        clamped_QM = tl.minimum(tl.maximum(distance_QM, -far), far)
        bias_QM = tl.load(by_distance + far + clamped_QM)
    return bias_QM


@triton.jit
def by_steps(
    d_scores_QM, place_Q, place_M, step_of_distance, first_distance, far, STEPS: tl.constexpr
):
    """Add up the gradient of a tile's scores for each step of the bias: (S,).

    Steps are numbered by distance, so that a tile meets those between its least and its largest
    distance only: one of them where it is far from the diagonal, 27 of 31 where it lies on it.
    """
    least, most = distances_of_tile(place_Q, place_M)
    lowest = tl.load(step_of_distance + far + tl.minimum(tl.maximum(least, -far), far))
    highest = tl.load(step_of_distance + far + tl.minimum(tl.maximum(most, -far), far))
    distance_QM = place_M[None, :] - place_Q[:, None]
    d_step_S = tl.zeros([STEPS], tl.float32)
    for step in range(lowest, highest + 1):
        first = tl.load(first_distance + step)
        end = tl.load(first_distance + step + 1)
        inside_QM = (distance_QM >= first) & (distance_QM < end)
        total = tl.sum(tl.sum(tl.where(inside_QM, d_scores_QM, 0.0), axis=1), axis=0)
        d_step_S += tl.where(tl.arange(0, STEPS) == step, total, 0.0)
    return d_step_S


@triton.jit
def weights_and_gradient(
    scores_QM, d_out_QK, value_MK, log_sum, mean, seed, salt, row_Q, key_M,
    sample_and_head, num_rows, num_keys, dropped, rescale, DROPS: tl.constexpr,
):  # fmt: skip
    """Return the weights behind dropout, and the gradient of the scores: both (Q, M).

    score_m gets weight_m (g_m - sum_k weight_k g_k), with g the gradient of the weights. The sum is
    over all keys; but it is also the row of results times its gradient, which is known (`mean`).
    """
    at_Q = sample_and_head * num_rows + row_Q
    log_sum_Q = tl.load(log_sum + at_Q, mask=row_Q < num_rows, other=float("inf"))
    mean_Q = tl.load(mean + at_Q, mask=row_Q < num_rows, other=0.0)
    weights_QM = tl.exp2(scores_QM - log_sum_Q[:, None])
    d_weights_QM = tl.dot(d_out_QK, tl.trans(value_MK), input_precision="ieee")
    dropped_QM = weights_QM
    if DROPS:
        kept_QM = draw_kept(seed, salt, row_Q, key_M, num_keys, dropped)
        d_weights_QM = tl.where(kept_QM, d_weights_QM * rescale, 0.0)
        dropped_QM = tl.where(kept_QM, weights_QM * rescale, 0.0)
    return dropped_QM, weights_QM * (d_weights_QM - mean_Q[:, None])


@triton.jit
def draw_kept(seed, salt, row_Q, key_M, num_keys, dropped):
    """Return which weights dropout keeps, (Q, M): a function of the pair, and of two seeds.

    The number of the pair goes through a hash that turns each of its bits over with probability
    1/2 (C. Wellons' "lowbias32", which was found by search). No state, and nothing to store: the
    backward pass asks again. Philox, which `tl.rand` uses, takes ten rounds of more than that.
    """
    bits_QM = (row_Q[:, None] * num_keys + key_M[None, :]).to(tl.uint32) ^ seed
    bits_QM ^= bits_QM >> 16
    bits_QM *= 0x7FEB352D
    bits_QM ^= bits_QM >> 15
    bits_QM *= 0x846CA68B
    bits_QM ^= bits_QM >> 16
    # A second word: heads whose first words are alike would draw the same bits in another order.
    bits_QM = (bits_QM ^ salt) * 0x9E3779B1
    return (bits_QM >> 16) >= dropped


@triton.jit
def load_seeds(seeds, DROPS: tl.constexpr):
    """Return the two words that belong to this program's sample and head."""
    if DROPS:
        at = seeds + 2 * tl.program_id(1)
        return tl.load(at).to(tl.uint32), tl.load(at + 1).to(tl.uint32)
    return tl.full([], 0, tl.uint32), tl.full([], 0, tl.uint32)


@triton.jit
def row_facts(rows, num_samples, num_rows, sample, row_Q):
    """Return position, time and document of the rows of a tile: each (Q,)."""
    return (
        fact(rows, 0, num_samples, num_rows, sample, row_Q),
        fact(rows, 1, num_samples, num_rows, sample, row_Q),
        fact(rows, 2, num_samples, num_rows, sample, row_Q),
    )


@triton.jit
def fact(facts, kind, num_samples, count, sample, index):
    """Return one kind of fact; behind the end that of the last, which widens no tile's range."""
    return tl.load(facts + (kind * num_samples + sample) * count + tl.minimum(index, count - 1))


@triton.jit
def distances_of_tile(place_Q, place_M):
    """Return the least and the largest distance, key position - row position, in a tile."""
    least = tl.min(place_M, axis=0) - tl.max(place_Q, axis=0)
    most = tl.max(place_M, axis=0) - tl.min(place_Q, axis=0)
    return least, most


@triton.jit
def load_rows(pointer, row, count, row_stride, K: tl.constexpr, WIDE_K: tl.constexpr):
    """Return rows of one head, zeros behind the last and beyond K: (Q, K) or (M, K)."""
    column = tl.arange(0, WIDE_K)
    inside = (row < count)[:, None] & (column < K)[None, :]
    return tl.load(pointer + row[:, None] * row_stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(
    pointer, values, sample, head, row, count, num_heads, K: tl.constexpr, WIDE_K: tl.constexpr
):
    """Write rows of one head into a contiguous (B, rows, H, K), in its type."""
    column = tl.arange(0, WIDE_K)
    inside = (row < count)[:, None] & (column < K)[None, :]
    at = ((sample * count + row[:, None]) * num_heads + head) * K + column[None, :]
    tl.store(pointer + at, values.to(pointer.dtype.element_ty), mask=inside)
