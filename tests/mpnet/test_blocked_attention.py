"""Blocked attention equals the formula in values and all gradients, also with dropout."""

import pytest
import torch

from annotated_mpnet.fast.blocked_attention import attend_blocked
from annotated_mpnet.mpnet.attention import attend_eager
from annotated_mpnet.mpnet.dropout import draw_kept, scale

B, H, Q, M, K = 2, 3, 6, 7, 4
BIASES = [(1, H, Q, M), (B, H, Q, M), (B, 1, Q, M), (1, 1, 1, M), None]


def inputs(bias: tuple[int, ...] | None, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(B, H, Q, K), (B, H, M, K), (B, H, M, K)] + ([] if bias is None else [bias])
    tensors = [torch.randn(shape, dtype=dtype) for shape in shapes]
    if bias is not None:
        tensors[3][..., 2] = float("-inf")  # a key that no query sees
    return [each.requires_grad_() for each in tensors]


def arguments(tensors: list[torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
    return (*tensors[:3], tensors[3] if len(tensors) > 3 else None)


@pytest.mark.parametrize("bias", BIASES)
def test_values_and_gradients_equal_the_formula(bias: tuple[int, ...] | None) -> None:
    tensors = inputs(bias)
    weights = torch.randn(B, H, Q, K, dtype=torch.float64)
    results = []
    for attend in (attend_eager, attend_blocked):
        attended = attend(*arguments(tensors), dropout=0.0)
        gradients = torch.autograd.grad((attended * weights).sum(), tensors)
        results.append([attended, *gradients])
    for wanted, found in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted)
        assert found.isfinite().all()


@pytest.mark.parametrize("bias", [BIASES[0], BIASES[1]])
def test_dropout_drops_weights_and_has_the_gradients_of_the_formula(bias: tuple[int, ...]) -> None:
    p = 0.4
    tensors = inputs(bias)
    torch.manual_seed(5)
    # Drawn one sample at a time, as in the implementation.
    kept = torch.stack([draw_kept(torch.empty(H, Q, M), p) for _ in range(B)])
    query, key, value, added = tensors
    scores = query @ key.transpose(2, 3) / K**0.5 + added
    wanted = (scores.softmax(3) * kept * scale(p)) @ value
    torch.manual_seed(5)
    found = attend_blocked(query, key, value, added, dropout=p)
    torch.testing.assert_close(found, wanted)
    weights = torch.randn_like(wanted)
    for a, b in zip(
        torch.autograd.grad((wanted * weights).sum(), tensors),
        torch.autograd.grad((found * weights).sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(b, a)


def test_bfloat16_is_as_exact_as_the_formula() -> None:
    exact = inputs(BIASES[0])
    rounded = [each.detach().bfloat16().requires_grad_() for each in exact]
    weights = torch.randn(B, H, Q, K, dtype=torch.float64)

    def gradients(attend: object, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        attended = attend(*arguments(tensors), dropout=0.0)  # type: ignore[operator]
        loss = (attended.double() * weights).sum()
        return [each.double() for each in torch.autograd.grad(loss, tensors)]

    truth = gradients(attend_eager, exact)
    errors = {
        attend: sum(
            (found - wanted).norm() / wanted.norm()
            for found, wanted in zip(gradients(attend, rounded), truth, strict=True)
        )
        for attend in (attend_eager, attend_blocked)
    }
    assert errors[attend_blocked] < 1.5 * errors[attend_eager]


def test_a_frozen_bias_gets_no_gradient() -> None:
    tensors = inputs(BIASES[0])
    tensors[3].requires_grad_(False)
    attend_blocked(*arguments(tensors), dropout=0.0).sum().backward()
    assert tensors[3].grad is None
    assert tensors[0].grad is not None
