"""The permuted form of the benchmarks is MPNet: it gives our loss and gradients."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from samples import TINY, random_batch, random_model


@pytest.fixture(scope="module")
def permuted_form() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "permuted_form.py"
    spec = importlib.util.spec_from_file_location("permuted_form", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("lengths", [[24, 24, 24], [24, 9, 17]], ids=["full", "padded"])
def test_loss_and_gradients_are_ours(permuted_form: ModuleType, lengths: list[int]) -> None:
    model = random_model(TINY).double()
    batch = random_batch(0, lengths, [5, 5, 5])
    assert (batch.attention_mask is None) == (min(lengths) == 24)
    parameters = list(model.parameters())
    losses = model.loss_sum(batch), permuted_form.PermutedForm(model).loss_sum(batch)
    results = [[loss, *torch.autograd.grad(loss, parameters)] for loss in losses]
    for wanted, found in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted)


def test_sequences_with_unequal_predictions_are_refused(permuted_form: ModuleType) -> None:
    form = permuted_form.PermutedForm(random_model(TINY))
    with pytest.raises(ValueError, match="fewer than 5"):
        form.loss_sum(random_batch(0, [24, 24], [5, 4]))
