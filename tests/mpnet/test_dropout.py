"""Dropout on a CPU: the right share, unbiased, and the same in the backward pass."""

import pytest
import torch

from annotated_mpnet.fast.blocked_attention import mark_dropped
from annotated_mpnet.mpnet.dropout import Dropout, draw_kept, dropout, scale, threshold


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_requested_share_is_dropped(p: float) -> None:
    torch.manual_seed(0)
    count = 400_000
    kept = draw_kept(torch.empty(count), p).float().mean().item()
    # Four standard deviations of the mean of Bernoulli numbers.
    assert abs(kept - (1 - p)) < 4 * (p * (1 - p) / count) ** 0.5
    assert abs(threshold(p) / 2**16 - p) <= 0.5 / 2**16


def test_neighbours_are_drawn_independently() -> None:
    torch.manual_seed(0)
    kept = draw_kept(torch.empty(1_000_000), 0.5).float() - 0.5
    # Numbers from the same random word, and from neighbouring words.
    for distance in range(1, 9):
        correlation = 4 * (kept[distance:] * kept[:-distance]).mean().item()
        assert abs(correlation) < 4 / 1000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradients_are_dropped_and_scaled_like_values(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = torch.randn(7, 9, dtype=dtype, requires_grad=True)
    dropped = dropout(values, 0.3)
    assert dropped.dtype == dtype
    dropped.sum().backward()
    factor = torch.tensor(scale(0.3), dtype=dtype)
    assert values.grad is not None
    assert set(values.grad.unique().tolist()) == {0.0, factor.item()}
    torch.testing.assert_close(dropped, values * values.grad)


def test_nothing_is_dropped_in_evaluation_or_with_probability_zero() -> None:
    values = torch.randn(5, 5)
    assert Dropout(0.5).eval()(values) is values
    assert Dropout(0.0).train()(values) is values


def test_dropout_does_not_depend_on_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    drawn = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            drawn.append(draw_kept(torch.empty(300_001), 0.1))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*drawn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_signs_mark_the_dropped_values_and_keep_their_magnitude(dtype: torch.dtype) -> None:
    values = torch.rand(7, 9).to(dtype) + 1
    marked = values.clone()
    torch.manual_seed(3)
    mark_dropped(marked, 0.3)
    torch.manual_seed(3)
    kept = draw_kept(values, 0.3)
    assert 0 < kept.sum() < kept.numel()
    assert torch.equal(marked, torch.where(kept, values, -values))


@pytest.mark.parametrize("p", [0.99999, 0.999999, 0.9999999, 1 - 2**-53])
def test_a_probability_close_to_one_still_keeps_some_values(p: float) -> None:
    torch.manual_seed(0)
    assert threshold(p) < 2**16
    dropped = dropout(torch.ones(10), p)
    assert dropped.isfinite().all()
    torch.testing.assert_close(
        draw_kept(torch.empty(2**20), p).float().mean().item(), 1 / 2**16, atol=2e-5, rtol=0
    )
