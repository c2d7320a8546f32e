"""A micro-batch's work, recorded once on a GPU and then replayed.

A micro-batch of MPNet-base is more than a thousand kernels. PyTorch needs longer to find and start
them one after the other than a fast GPU needs to run them, so the GPU waits. But with `--packing
full` each micro-batch has the same shape, and so the same kernels with the same arguments. A *CUDA
graph* is such a list, made once; to replay it is a single call:

    as written   CPU  find start find start find start find start ...
                 GPU            k1         k2         k3         k4
    replayed     CPU  replay
                 GPU         k1 k2 k3 k4 ...

What is recorded is `add_gradient` of `mpnet/loop.py`, from the batch on the device to `.grad`. A
graph knows addresses, not tensors. So there is one batch that each new one is copied into, one N,
and one gradient of each weight, which a replay replaces. Dropout is right because a graph asks
PyTorch's generator for its seed each time.

The optimizer's step is not recorded: it is a few kernels, and its learning rate changes.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from annotated_mpnet.mpnet.batch import Batch
from annotated_mpnet.mpnet.loop import Setup, add_gradient

WARM_UPS = 3
"""Runs before the recording, in which kernels are compiled and libraries ask for memory."""

Record = Callable[[Callable[[], Tensor], torch.device], tuple[Callable[[], None], Tensor]]


def record_graph(
    work: Callable[[], Tensor], device: torch.device
) -> tuple[Callable[[], None], Tensor]:
    """Run a function a few times, then record it; return how to replay it, and its result.

    A replay writes the same tensors again, the result among them.
    """
    # On a stream of its own, as PyTorch asks for before a recording.
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            work()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads make batches and write checkpoints meanwhile, which is none of its business.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = work()
    return graph.replay, result


class RecordedStep:
    """`add_gradient` of `mpnet/loop.py`, recorded for micro-batches of one shape.

    A micro-batch of another shape, or with padding, runs as it is written. So what happens depends
    on the batch alone, as an exact resume needs it.

    Args:
        batch_size: of what is recorded.
        length: likewise.
        record: called as `record_graph` is.
    """

    def __init__(self, batch_size: int, length: int, record: Record = record_graph) -> None:
        self._shape = batch_size, length
        self._record = record
        self._replay: Callable[[], None] | None = None

    def __call__(self, setup: Setup, batch: Batch, num_predicted: int) -> Tensor:
        """Add the gradient, and return the loss."""
        if batch.attention_mask is not None or batch.input_ids.shape != self._shape:
            return add_gradient(setup, batch, num_predicted)
        parameters = list(setup.network.model.parameters())
        earlier = [parameter.grad for parameter in parameters]
        if self._replay is None:
            self._replay = self._recorded(setup, batch, num_predicted)
        for name, tensor in vars(batch).items():
            if isinstance(tensor, Tensor):
                getattr(self._batch, name).copy_(tensor, non_blocking=True)
        self._num_predicted.fill_(num_predicted)
        # Of earlier micro-batches of the update. Copied, because the replay replaces it.
        earlier = [None if gradient is None else gradient.clone() for gradient in earlier]
        self._replay()
        for parameter, gradient, before in zip(parameters, self._gradients, earlier, strict=True):
            parameter.grad = gradient if gradient is not None else before
            if gradient is not None and before is not None:
                gradient.add_(before)
        return self._loss.clone()

    def _recorded(self, setup: Setup, batch: Batch, num_predicted: int) -> Callable[[], None]:
        device, model = setup.network.device, setup.network.model
        tensors: dict[str, Any] = {
            name: tensor.to(device, copy=True)
            for name, tensor in vars(batch).items()
            if isinstance(tensor, Tensor)
        }
        self._batch = replace(batch, **tensors)
        self._num_predicted = torch.tensor(float(num_predicted), device=device)

        def work() -> Tensor:
            # Without a gradient there is nothing to add to: the graph makes new ones.
            model.zero_grad(set_to_none=True)
            return add_gradient(setup, self._batch, self._num_predicted)

        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            replay, self._loss = self._record(work, device)
        self._gradients = [parameter.grad for parameter in model.parameters()]
        return replay
