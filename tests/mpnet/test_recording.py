"""A recorded micro-batch gives the same gradients as an unrecorded one."""

from collections.abc import Callable

import pytest
import torch
from samples import TINY, random_batch, random_model
from torch import Tensor

from annotated_mpnet.fast.recording import RecordedStep, record_graph
from annotated_mpnet.mpnet import loop
from annotated_mpnet.mpnet.batch import Batch
from annotated_mpnet.mpnet.config import OptimizationConfig
from annotated_mpnet.mpnet.optimizer import build_optimizer
from interpreted import DEVICE

LENGTH = 18


class Recorder:
    """A CUDA graph for any device: run again, and write into the same tensors."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.recorded = self.replayed = 0

    def __call__(
        self, work: Callable[[], Tensor], _: torch.device
    ) -> tuple[Callable[[], None], Tensor]:
        self.recorded += 1
        result = work()
        parameters = [each for each in self.model.parameters() if each.grad is not None]
        gradients = [each.grad for each in parameters]

        def replay() -> None:
            self.replayed += 1
            result.copy_(work())
            for parameter, gradient in zip(parameters, gradients, strict=True):
                assert gradient is not None
                assert parameter.grad is not None
                gradient.copy_(parameter.grad)

        return replay, result


def batch_of(seed: int, lengths: tuple[int, ...] = (LENGTH, LENGTH)) -> Batch:
    return random_batch(seed, list(lengths), [3, 3])


def updates(record: bool, batches: list[list[Batch]]) -> tuple[list[Tensor], Recorder]:
    """Make updates; return losses, weights and the number of recordings."""
    model = random_model(TINY).to(DEVICE)
    optimization = OptimizationConfig(total_updates=9, warmup_updates=1, lr=1e-3)
    device = torch.device(DEVICE)
    recorder = Recorder(model)
    how = record_graph if DEVICE == "cuda" else recorder
    setup = loop.Setup(
        loop.Network(model, device), build_optimizer(model, optimization, device), optimization
    )
    if record:
        step = RecordedStep(2, LENGTH, how)
        setup = loop.Setup(setup.network, setup.optimizer, optimization, add_gradient=step)
    results = [loop.update(setup, number, each) for number, each in enumerate(batches)]
    numbers = [each.loss_sum for each in results] + [each.gradient_norm for each in results]
    return [*numbers, *(each.detach() for each in model.parameters())], recorder


@pytest.mark.parametrize(
    "batches",
    [
        [[batch_of(1)], [batch_of(2)], [batch_of(3)]],
        [[batch_of(1), batch_of(2), batch_of(3)], [batch_of(4), batch_of(5)]],
        # A batch with padding, which is not recorded, before and after others of an update.
        [[batch_of(1, (LENGTH, 9)), batch_of(2)], [batch_of(3), batch_of(4, (9, 9)), batch_of(5)]],
    ],
    ids=["one micro-batch", "several", "one of another shape"],
)
def test_recording_does_not_change_updates(batches: list[list[Batch]]) -> None:
    wanted, _ = updates(False, batches)
    found, recorder = updates(True, batches)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    if DEVICE == "cpu":
        shapes = [tuple(each.input_ids.shape) for update in batches for each in update]
        masks = [each.attention_mask for update in batches for each in update]
        full = [
            mask is None for mask, shape in zip(masks, shapes, strict=True) if shape == (2, LENGTH)
        ]
        assert (recorder.recorded, recorder.replayed) == (1, sum(full))


def test_a_batch_is_not_changed() -> None:
    first, second = batch_of(1), batch_of(2)
    before = first.input_ids.clone()
    updates(True, [[first], [second]])
    assert torch.equal(first.input_ids, before)
