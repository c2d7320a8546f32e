"""Several processes, one run: data-parallel training under torchrun.

    torchrun --nproc-per-node 8 -m annotated_mpnet ...        one process per GPU

Each process (a *rank*) holds the network, reads its own sequences and computes a gradient. The
gradients are added up, and every rank takes the same step, so the networks stay the same.
DistributedDataParallel (DDP) does this while the backward pass is still busy with the layers below:

    each rank computes    forward    layer 11   layer 10   layer 9   ...   layer 0
    and exchanges                               layer 11   layer 10  ...   layer 1   layer 0

**The sum, not the mean.** The loss is divided by the predicted tokens of the update on *all* ranks
(`mpnet/loop.py`). DDP and FSDP average the gradients over the ranks, so the loop multiplies the
loss by their number first.

**Agreement.** All ranks must call the same exchanges in the same order; an exchange inside
`if world.is_first` hangs. A signal reaches the ranks at different moments, and a broken file only
one of them, so whatever changes the course of a run is exchanged between two updates, on the CPU.

**One error message.** An error is reported by the rank that failed first. It leaves a mark in the
store through which the processes found each other; the ranks that fail later, mostly because the
first is gone, find the mark and stay silent. A killed rank leaves none, and the others say that it
is gone.

    rank 1    cannot read a file    is failure 1: leaves "3 rank 1: ...", says it, ends with 3
    rank 0    waits for rank 1      its connection breaks; is failure 2: reads that, ends with 3

**Sharding** (--fsdp). Weights, gradients and AdamW's means are split over the ranks, and the
weights of a layer are gathered only while it is computed. That takes 16 N / ranks bytes per device
for N weights instead of 16 N, and moves each layer's weights twice in each micro-batch. Checkpoints
hold full tensors under the same names, so a run can resume either way.

This is the only module that imports `torch.distributed`.
"""

import gc
import os
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from annotated_mpnet.errors import (
    ConfigError,
    FailedElsewhereError,
    ProcessLostError,
    UserError,
    shown,
)
from annotated_mpnet.mpnet.batch import Batch
from annotated_mpnet.mpnet.config import InputMode
from annotated_mpnet.mpnet.loop import Network
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining
from annotated_mpnet.signals import end_with_parent

T = TypeVar("T")

FAILURES, FIRST_FAILURE = "annotated_mpnet/failures", "annotated_mpnet/first_failure"
"""Keys of the store: how many ranks have failed, and what the first of them said."""


@dataclass(frozen=True)
class World:
    """The processes of a run, as one of them sees it. A single process exchanges nothing:

    >>> alone = World()
    >>> alone.gather(90, 600), alone.sum(90, 600), alone.on_rank_0(lambda: "done")
    ([(90, 600)], [90, 600], 'done')

    Attributes:
        rank: this process, from 0.
        size: number of processes.
        local_rank: this process among those of its machine, which decides its GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone writes files and prints."""
        return self.rank == 0

    def gather(self, *numbers: float) -> list[tuple[float, ...]]:
        """Return the numbers of each rank, in order of ranks, on all ranks.

        In float64, which is exact for counts up to 2^53.

        Raises:
            ProcessLostError: a rank is gone, or did not answer in time. All exchanges raise it.
        """
        if self.size == 1:
            return [numbers]
        own = torch.tensor(numbers, dtype=torch.float64)
        gathered = [torch.empty_like(own) for _ in range(self.size)]
        with self.explaining_lost_ranks():
            dist.all_gather(gathered, own)
        return [tuple(each.tolist()) for each in gathered]

    def sum(self, *numbers: float) -> list[float]:
        """Return the sum of each number over all ranks."""
        return [sum(column) for column in zip(*self.gather(*numbers), strict=True)]

    def gather_objects(self, value: T) -> list[T]:
        """Return the value of each rank, in order of ranks; for small values.

        PyTorch sends them by pickle. The sender is a process of this run, never a file.
        """
        if self.size == 1:
            return [value]
        gathered: list[T] = [value] * self.size
        with self.explaining_lost_ranks():
            dist.all_gather_object(gathered, value)
        return gathered

    def on_rank_0(self, action: Callable[[], T]) -> T:
        """Call a function on rank 0 while the other ranks wait; return its result on all.

        The others wait up to --distributed-timeout, which must be longer than the longest action.

        Args:
            action: must not exchange anything, because the other ranks do not take part.
        """
        result = [action() if self.is_first else None]
        if self.size > 1:
            with self.explaining_lost_ranks():
                dist.broadcast_object_list(result, src=0)
        return result[0]  # type: ignore[return-value]

    def broadcast(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield rank 0's named tensors on all ranks, one at a time to save memory.

        Args:
            tensors: on rank 0, on the CPU; ignored on the other ranks.
        """
        # Names, shapes and types first: the other ranks need room of the right size.
        described = self.on_rank_0(lambda: [(n, t.shape, t.dtype) for n, t in tensors.items()])
        for name, shape, dtype in described:
            tensor = tensors[name] if self.is_first else torch.empty(shape, dtype=dtype)
            if self.size > 1:
                with self.explaining_lost_ranks():
                    dist.broadcast(tensor, src=0)
            yield name, tensor

    @contextmanager
    def explaining_lost_ranks(self) -> Iterator[None]:
        """Within the block, turn the error of a broken connection into a `ProcessLostError`.

        Each backend has errors of its own for it, and gloo's are plain RuntimeErrors.

        >>> with World(rank=1, size=2).explaining_lost_ranks():
        ...     raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer")
        Traceback (most recent call last):
        annotated_mpnet.errors.ProcessLostError: rank 1 of 2 lost the others: one of them ...

        Other errors pass:

        >>> with World(rank=1, size=2).explaining_lost_ranks():
        ...     raise RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)")
        Traceback (most recent call last):
        RuntimeError: mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)
        """
        try:
            yield
        except RuntimeError as error:
            said = r"gloo|NCCL|Connection|[Tt]imed? ?out|Broken pipe|Socket"
            lost = isinstance(error, dist.DistError) or re.search(said, str(error))
            if self.size == 1 or not lost:
                raise
            raise ProcessLostError(
                f"rank {self.rank} of {self.size} lost the others: one of them was killed, or did "
                "not answer within --distributed-timeout; the checkpoints are intact: find out why "
                f"it ended, and continue with --resume ({shown(str(error))})"
            ) from error


@contextmanager
def open_world(timeout: int) -> Iterator[World]:
    """Find the other processes that torchrun started, if any, for the length of the block.

    torchrun tells each process in its environment its rank (RANK, LOCAL_RANK), their number
    (WORLD_SIZE) and where to meet (MASTER_ADDR, MASTER_PORT). Without these the run is alone:

    >>> with open_world(timeout=600) as world:
    ...     world
    World(rank=0, size=1, local_rank=0)

    Args:
        timeout: seconds to wait for the others, now and in each exchange.

    Raises:
        ConfigError: they cannot be found.
        FailedElsewhereError: in place of an error of the block, if another rank failed before.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    world = World(int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_RANK", "0")))
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # A rank whose torchrun was killed would stay, and the ranks of other machines wait for it.
        # Checkpoints are safe at any moment.
        end_with_parent(os.getppid())
    store = _connect(world, timedelta(seconds=timeout))
    try:
        yield world
    except UserError as error:
        # Its frames hold references to the network; see `SharedNetwork.close`.
        traceback.clear_frames(error.__traceback__)
        raise _first_failure(store, world, error) from error
    finally:
        dist.destroy_process_group()


def _connect(world: World, timeout: timedelta) -> Store:
    """Meet the other ranks; return the store through which they were found, a shared dictionary.

    `init_process_group` could make the store itself, but `_first_failure` needs it when everything
    else is broken. PyTorch's own keys get a prefix.
    """
    try:
        store, rank, size = next(rendezvous("env://", timeout=timeout))
        store.set_timeout(timeout)
        # Numbers are exchanged on the CPU, gradients where they are.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        own = PrefixStore("run", store)
        dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=timeout)
        return store  # type: ignore[no-any-return]
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ConfigError(
            f"rank {world.rank} of {world.size} did not find the others at {where} within "
            f"{timeout.total_seconds():.0f} seconds; start all processes with torchrun, check that "
            "--master-addr and --master-port can be reached, or raise --distributed-timeout"
        ) from error


def _first_failure(store: Store, world: World, error: UserError) -> UserError:
    """Return the error to end with: this rank's own if it failed first, else a silent one.

    `add` is atomic, so only one rank gets 1. `get` waits until that rank has set the text.
    """
    try:
        if store.add(FAILURES, 1) == 1:
            store.set(FIRST_FAILURE, f"{error.exit_code} rank {world.rank}: {error}")
            return error
        code, said = store.get(FIRST_FAILURE).decode().split(" ", 1)
        return FailedElsewhereError(said, int(code))
    except RuntimeError:
        return error  # the process with the store is gone: better said twice than not at all


class SharedNetwork(Network):
    """The network as the ranks train it together: replicated (DDP), sharded (FSDP2), or alone.

    Attributes:
        model: with --fsdp, its parameters are this rank's shards.
        world: the ranks.
        is_sharded: whether they are shards: --fsdp, and more than one process.
    """

    def __init__(
        self, model: MPNetForPretraining, world: World, device: torch.device, *, fsdp: bool = False
    ) -> None:
        """Move a network to its device, and shard or replicate it.

        Build the optimizer after this: with --fsdp the parameters are replaced, and AdamW's means
        take their shapes.

        Args:
            model: on the CPU, with the same weights on all ranks.
            world: the ranks.
            device: of this rank.
            fsdp: whether to shard.
        """
        super().__init__(model, device)
        self.rank, self.num_ranks = world.rank, world.size
        self.world = world
        self.is_sharded = fsdp and world.size > 1
        self._loss: nn.Module = _SummedLoss(model)
        if self.is_sharded:
            # From the CPU, so a device only ever gets its own shard.
            mesh = init_device_mesh(device.type, (world.size,))
            # Logits are a view that nothing changes in place, which the warning is about.
            warnings.filterwarnings("ignore", message=r"FSDP2-wrapped .* returned a view tensor")
            # One layer is gathered at a time. What is outside of the layers, embeddings and head,
            # is gathered for the whole forward pass.
            for layer in model.sentence_encoder.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            return
        model.to(device)
        if world.size > 1:
            # Gradients are views of the buffers they are sent from; otherwise there are two copies.
            self._loss = DistributedDataParallel(self._loss, gradient_as_bucket_view=True)

    def close(self) -> None:
        """Let go of DDP before the process group is destroyed.

        A DDP module that is still alive then can crash the process at its very end (PyTorch 2.13,
        gloo: one exit in four).
        """
        self._loss = nn.Identity()
        if self.world.size > 1:
            gc.collect()

    def loss_sum(self, batch: Batch, input_mode: InputMode) -> Tensor:
        """Return this rank's summed loss, through DDP if there is one.

        Called on the model itself, the gradients would stay on their ranks, without an error.
        """
        return self._loss(batch, input_mode)  # type: ignore[no-any-return]

    @contextmanager
    def sync_gradients(self, last: bool) -> Iterator[None]:
        """Average the gradients over the ranks, in the passes of an update's last micro-batch.

        Until then each rank adds up its own. Both passes belong into the block, because DDP decides
        in the forward pass whether the backward pass will exchange.
        """
        with self.world.explaining_lost_ranks():
            if isinstance(self.model, FSDPModule):
                self.model.set_requires_gradient_sync(last)
            if isinstance(self._loss, DistributedDataParallel) and not last:
                with self._loss.no_sync():
                    yield
            else:
                yield

    def sum_counts(self, *counts: float) -> list[float]:
        """Return the sum of each count over all ranks."""
        return self.world.sum(*counts)

    def sum_on_device(self, scalar: Tensor) -> Tensor:
        """Return the sum of a scalar over all ranks, without waiting for the device.

        In float64: rounded back to float32, the sum does not depend on the order of the ranks.
        """
        if self.world.size == 1:
            return scalar
        total = scalar.double()
        with self.world.explaining_lost_ranks():
            dist.all_reduce(total)
        return total.to(scalar.dtype)

    def full_tensor(self, tensor: Tensor) -> Tensor:
        """Return the whole of a tensor that may be sharded."""
        return full_tensor(tensor)

    def reshard(self) -> None:
        """End a forward pass that has no backward pass.

        FSDP keeps the weights outside of the layers gathered after it, for the backward pass. The
        optimizer knows only the shards.
        """
        if isinstance(self.model, FSDPModule):
            self.model.reshard()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy rank 0's full weights into the networks of all ranks, in place.

        Args:
            tensors: on rank 0, by the names of a checkpoint; ignored on the other ranks.
        """
        own = self.model.state_dict()
        for name, tensor in self.world.broadcast(tensors):
            with torch.no_grad():
                own[name].copy_(shard(tensor, own[name]))


class _SummedLoss(nn.Module):
    """The loss as a module: DDP only watches a module's `forward`, and the model's returns logits.

    FSDP has its hooks on the model and on each layer, which run inside `loss_sum`.
    """

    def __init__(self, model: MPNetForPretraining) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, input_mode: InputMode) -> Tensor:
        """Return the summed loss over a batch."""
        return self.model.loss_sum(batch, input_mode)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor gathered from the shards of all ranks, or unchanged if it is not sharded.

    All ranks must ask for the same tensors in the same order.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this rank's shard of a full tensor, on the device of `like` and split as that is.

    Args:
        tensor: full, and the same on all ranks.
        like: a parameter. If it is not sharded, the whole tensor is returned.
    """
    if not isinstance(like, DTensor):
        return tensor.to(like.device)
    # Every rank has all of it, so nothing needs to be sent.
    return distribute_tensor(
        tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )
