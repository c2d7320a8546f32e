"""The checker of shape suffixes believes the true ones, and finds the lies."""

import sys
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from annotated_mpnet.mpnet.positions import LearnedPositionalEmbedding
from shape_checker import ShapeChecker

THIS_FILE = ("test_shape_checker.py",)


def honest(hidden_BLD: torch.Tensor) -> torch.Tensor:
    mean_BD = hidden_BLD.mean(dim=1)
    mean_B1D = mean_BD[:, None]
    ids_BL = np.zeros(hidden_BLD.shape[:2])
    MAX_LENGTH = 7
    table_V: torch.Tensor | None = None
    assert ids_BL.shape[1] < MAX_LENGTH
    assert table_V is None
    return mean_B1D


def too_few_dimensions() -> None:
    hidden_BLD = torch.zeros(2, 3)
    assert hidden_BLD.numel() == 6


def one_is_not_two() -> None:
    bias_1HLM = torch.zeros(2, 4, 3, 3)
    assert bias_1HLM.numel() == 72


def letters_disagree(input_BL: np.ndarray) -> None:
    mask_LB = input_BL.copy()
    assert mask_LB.ndim == 2


def square(score_LL: torch.Tensor) -> torch.Tensor:
    return score_LL


def captured_by_inner_function() -> int:
    hidden_BD = torch.zeros(2)
    return (lambda: hidden_BD.numel())()


def generator_of_lies() -> Iterator[int]:
    row_D = torch.zeros(2, 2)
    yield row_D.numel()


def lying_and_raising() -> None:
    row_D = torch.zeros(2, 2)
    raise KeyError(row_D.numel())


def watching_checker() -> ShapeChecker:
    checker = getattr(sys.getprofile(), "__self__", None)
    assert isinstance(checker, ShapeChecker)
    return checker


def test_true_suffixes_are_believed() -> None:
    with ShapeChecker(THIS_FILE) as checker:
        honest(torch.zeros(2, 3, 4))
        # Sizes may differ from call to call, only not within one.
        honest(torch.zeros(1, 5, 6))
        square(torch.zeros(3, 3))
    assert checker.lies == []
    checker.raise_lies()


@pytest.mark.parametrize(
    ("lie", "told"),
    [
        (
            too_few_dimensions,
            "too_few_dimensions: hidden_BLD has shape (2, 3), not 3 dimensions",
        ),
        (
            one_is_not_two,
            "one_is_not_two: bias_1HLM has shape (2, 4, 3, 3): 1 is 2 here, and 1 by its name",
        ),
        (
            captured_by_inner_function,
            "captured_by_inner_function: hidden_BD has shape (2,), not 2 dimensions",
        ),
        (
            lambda: list(generator_of_lies()),
            "generator_of_lies: row_D has shape (2, 2), not 1 dimensions",
        ),
        (
            lambda: square(torch.zeros(3, 4)),
            "square: score_LL has shape (3, 4): L is 4 here, and 3 by score_LL",
        ),
    ],
)
def test_a_lie_is_found_and_named(lie: Callable[[], object], told: str) -> None:
    with ShapeChecker(THIS_FILE) as checker:
        lie()
    assert list(dict.fromkeys(checker.lies)) == [told]
    with pytest.raises(AssertionError) as raised:
        checker.raise_lies()
    assert str(raised.value) == told


def test_letters_must_agree_within_a_call() -> None:
    with ShapeChecker(THIS_FILE) as checker:
        letters_disagree(np.zeros((2, 3)))
    assert checker.lies == [
        "letters_disagree: mask_LB has shape (2, 3): L is 2 here, and 3 by input_BL",
        "letters_disagree: mask_LB has shape (2, 3): B is 3 here, and 2 by input_BL",
    ]


def test_exceptions_pass_unchanged() -> None:
    with ShapeChecker(THIS_FILE) as checker, pytest.raises(KeyError, match="4"):
        lying_and_raising()
    assert len(checker.lies) == 1


def test_other_files_are_left_alone() -> None:
    with ShapeChecker(("some/other/folder/",)) as checker:
        too_few_dimensions()
    assert checker.lies == []


def test_threads_are_watched_too() -> None:
    with ShapeChecker(THIS_FILE) as checker:
        thread = threading.Thread(target=too_few_dimensions)
        thread.start()
        thread.join()
    assert len(checker.lies) == 1


def test_checker_is_on_in_this_very_test() -> None:
    checker = watching_checker()
    embedding = LearnedPositionalEmbedding(max_positions=5, embed_dim=4, pad_token_id=1)
    embedding(torch.tensor([[0, 1]]))
    assert checker.lies == []
    embedding(torch.tensor([0, 1]))
    assert "position_ids_BE has shape (2,)" in checker.lies[0]
    checker.lies.clear()  # or it would fail this test, as it should any other


def test_checker_gives_back_the_profiler_that_was_there() -> None:
    outer = watching_checker()
    with ShapeChecker(THIS_FILE) as inner:
        assert watching_checker() is inner
    assert watching_checker() is outer
