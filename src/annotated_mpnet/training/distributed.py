"""Several processes, one run: who am I, what do we agree on, how are gradients added up.

    torchrun --nproc-per-node 8 -m annotated_mpnet ...        one process a GPU

Each process (a *rank*) holds the network, reads its own rows, and computes a gradient. These are
added up, every rank takes the same step, and so all networks stay the same without ever being
compared. That is the whole of data-parallel training, and DistributedDataParallel (DDP) does it,
while the backward pass is still going on for the layers below:

    each rank computes    forward    layer 11   layer 10   layer 9   ...   layer 0
    and exchanges                               layer 11   layer 10  ...   layer 1   layer 0

(in portions of 25 MB, which is about a layer). Only the last one is waited for. The gradient of
MPNet-base has 4 bytes for each weight; with eight ranks in a ring each of them sends 2 x 7/8 of it,
in MB:

>>> weights = 109_518_527
>>> round(4 * weights * 2 * 7 / 8 / 1e6)
767

and that once in an update, however many micro-batches it has. What is left to do here:

**The sum, not the mean.** The gradient of an update is d/dw of the summed loss, divided by the
predicted tokens of the update *on all ranks*. DDP divides what it adds up by the number of ranks;
multiplied by that number before, the loss gives the sum. Take two ranks, the one with 90 predicted
tokens that lose 5 nats each, the other with 10 that lose 2:

>>> total = 90 + 10
>>> losses = [90 * 5 * 2 / total, 10 * 2 * 2 / total]      # each x ranks / tokens of the update
>>> sum(losses) / 2                                        # what DDP makes of them
4.7

which is the mean over the hundred tokens. A mean of the ranks' own means would be 3.5, and would
give each of the ten tokens nine times the weight of one of the ninety. (HF: the Trainer counts the
tokens of all ranks too; `trainer.py` says what becomes of the count. annotated-mpnet: trains on one
device.)

**Agreement.** Whatever changes the course of the run must change it on all ranks in the same
update, or those that go on wait for ever for those that do not. A signal reaches the ranks at
different moments, a broken file only one of them. So the ranks exchange a few numbers in each
update (`World.gather`), on the CPU, where no GPU is waited for; and whatever follows from them
follows on all alike. The rule behind it is short, and easily broken by an `if`: *all ranks call the
same exchanges in the same order*. An exchange that stands behind `if world.is_first` hangs.

**One voice.** Rank 0 alone writes files and speaks. An error is reported by the rank that met it
first: it leaves a mark in the store through which the processes found each other, and those that
fail later, mostly because it is gone, see the mark and keep quiet. A rank that was killed leaves
none; then its neighbours say that it is gone.

    rank 1    cannot read a file    is failure 1: leaves "3 rank 1: ...", says it, ends with 3
    rank 0    waits for rank 1      its connection breaks; is failure 2: reads that, ends with 3

**Sharding** (--fsdp). Weights, gradients and AdamW's means are cut into as many parts as there are
ranks, and a layer's weights are put together only for the moment in which it is computed. A network
of N weights then needs 16 N / ranks bytes on each device instead of 16 N. Only gradients that are
still being added up, in updates of several micro-batches, stay whole until the last of them. For
MPNet-base in GB: whole; shared out among eight; the same with several micro-batches:

>>> ranks = 8
>>> [round(each * weights / 1e9, 2) for each in (16, 16 / ranks, 12 / ranks + 4)]
[1.75, 0.22, 0.6]

The price is that a layer's weights travel twice in each micro-batch, on the way there and on the
way back, where with DDP they never do. Checkpoints hold whole tensors under the same names, so that
a run may go on either way.

**How many ranks** is no part of a run of local text: batch k is a function of (data, seed, k), and
which rank computes it matters only to dropout's masks. Stopped on two ranks, a run goes on with
one, on the same batches, if batch-size x update-freq x ranks is the same. Streams are read in
shares; there, the number of ranks is part of the run's identity.

This is the only module that imports `torch.distributed`.

Next: `trainer.py`.
"""

import gc
import os
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
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

from annotated_mpnet.batch import Batch
from annotated_mpnet.config import InputMode
from annotated_mpnet.errors import ConfigError, FailedElsewhereError, ProcessLostError, UserError
from annotated_mpnet.modeling import MPNetForPretraining

T = TypeVar("T")

FAILURES, FIRST_FAILURE = "annotated_mpnet/failures", "annotated_mpnet/first_failure"
"""What stands in the store: how many have failed, and what the first of them said."""


@dataclass(frozen=True)
class World:
    """The processes of a run, as one of them sees it. Alone, everything here costs nothing.

    So the loop is written once, for any number of them, and asks nowhere how many there are:

    >>> alone = World()
    >>> alone.gather(90, 600), alone.sum(90, 600), alone.first(lambda: "done")
    ([(90, 600)], [90, 600], 'done')

    On two machines of four GPUs each:

        rank          0  1  2  3    4  5  6  7
        local_rank    0  1  2  3    0  1  2  3

    Attributes:
        rank: this process, from 0.
        size: how many there are.
        local_rank: this process among those of its machine: which of its GPUs is ours.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def gather(self, *numbers: float) -> list[tuple[float, ...]]:
        """Return what each rank said, in order of ranks; all must say equally many numbers.

        In float64, so that counts are exact up to 2^53, and the same list on every rank: what is
        computed from it, in whatever order, is the same everywhere. A sum made by the exchange
        itself would save nothing, with so few numbers, and leave its order to the backend.

        Args:
            numbers: a handful, as many on each rank.

        Raises:
            ProcessLostError: a rank is gone, or did not answer in time; as from all exchanges.
        """
        if self.size == 1:
            return [numbers]
        own = torch.tensor(numbers, dtype=torch.float64)
        everybody = [torch.empty_like(own) for _ in range(self.size)]
        with self.noticing_loss():
            dist.all_gather(everybody, own)
        return [tuple(each.tolist()) for each in everybody]

    def sum(self, *numbers: float) -> list[float]:
        """Return the sums over all ranks, one for each number."""
        return [sum(column) for column in zip(*self.gather(*numbers), strict=True)]

    def sum_on_device(self, tensor: Tensor) -> Tensor:
        """Return the sum of a scalar over all ranks, where it is, without a look at it.

        A GPU adds it to those of the others when it gets there; the CPU goes on. In float64, in
        which the order of a few float32 numbers makes a difference that is rounded away again.

        >>> World().sum_on_device(torch.tensor(2.5))
        tensor(2.5000)
        """
        if self.size == 1:
            return tensor
        total = tensor.double()
        with self.noticing_loss():
            dist.all_reduce(total)
        return total.to(tensor.dtype)

    def gather_objects(self, value: T) -> list[T]:
        """Return the value of each rank, in order; for small things, they are serialised.

        By pickle, which runs code when it is read. That is no danger here: what is read was written
        a moment ago by another process of the same run, and never lies in a file.
        """
        if self.size == 1:
            return [value]
        everybody: list[T] = [value] * self.size
        with self.noticing_loss():
            dist.all_gather_object(everybody, value)
        return everybody

    def first(self, action: Callable[[], T]) -> T:
        """Let rank 0 do something while the others wait; return its result on all.

        What it raises ends rank 0, and the others notice that. They wait no longer than
        --distributed-timeout, which therefore must be longer than the longest action, such as to
        write a checkpoint to a slow disk.

        Args:
            action: what only one may do, as to write a file, or only one can. It must not exchange
                anything: the others are not there to take part.
        """
        result = [action() if self.is_first else None]
        if self.size > 1:
            with self.noticing_loss():
                dist.broadcast_object_list(result, src=0)
        return result[0]  # type: ignore[return-value]

    def spread(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield rank 0's named tensors on all ranks, one at a time; the others' are not looked at.

        One at a time, so that a process never holds more of it than it keeps: beside the network
        that is filled, at most a table of token embeddings, 94 MB in MPNet-base.

        Args:
            tensors: on rank 0, on the CPU; what the others give is ignored.
        """
        # Names, shapes and types first: the others must have room of the right size ready.

        described = self.first(lambda: [(n, t.shape, t.dtype) for n, t in tensors.items()])
        for name, shape, dtype in described:
            tensor = tensors[name] if self.is_first else torch.empty(shape, dtype=dtype)
            if self.size > 1:
                with self.noticing_loss():
                    dist.broadcast(tensor, src=0)
            yield name, tensor

    def collect(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return whole tensors in rank 0's memory, put together from shares; nothing on the others.

        The way back of `spread`: all ranks must call it, with the same names in the same order. One
        tensor at a time is whole on a device, since a network that needs --fsdp would not fit onto
        one as a whole.

        >>> World().collect({"bias": torch.zeros(2)})
        {'bias': tensor([0., 0.])}
        """
        collected = {}
        for name, tensor in tensors.items():
            complete = whole(tensor)
            if self.is_first:
                collected[name] = complete.cpu()
        return collected

    @contextmanager
    def noticing_loss(self) -> Iterator[None]:
        """Turn the error of a broken connection into one that says what happened.

        Each backend has errors of its own for it, some of them plain RuntimeErrors with a text. All
        else goes through unchanged, as does everything where there is nobody to lose.

        >>> with World(rank=1, size=2).noticing_loss():
        ...     raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer")
        Traceback (most recent call last):
        annotated_mpnet.errors.ProcessLostError: rank 1 of 2 lost the others: one of them ...
        """
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not _is_lost_connection(error):
                raise
            raise ProcessLostError(
                f"rank {self.rank} of {self.size} lost the others: one of them was killed, or did "
                "not answer within --distributed-timeout; the checkpoints are intact: find out why "
                f"it ended, and go on with --resume ({str(error)[:80]!r})"
            ) from error


@contextmanager
def open_world(timeout: int) -> Iterator[World]:
    """Find the other processes, if torchrun started any, for as long as the block lasts.

    torchrun tells each process in its environment who it is (RANK, LOCAL_RANK), how many there are
    (WORLD_SIZE), and where to meet (MASTER_ADDR, MASTER_PORT). Without these, a run is alone, and
    nothing of `torch.distributed` is started:

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
    store = _connect(world, timedelta(seconds=timeout))
    try:
        yield world
    except UserError as error:
        # The frames that it came through hold on to the network; see `SharedNetwork.close`.
        traceback.clear_frames(error.__traceback__)
        raise _one_voice(store, world, error) from error
    finally:
        dist.destroy_process_group()


def _connect(world: World, timeout: timedelta) -> Store:
    """Meet the others; return the store by which they were found, a dictionary that all share.

    We make it ourselves, where `init_process_group` could, to keep a hand on it: when a connection
    breaks, it is what is left to say why (`_one_voice`). PyTorch's own keys get a prefix, so that
    they cannot meet ours.
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
            f"rank {world.rank} of {world.size} did not find the others by way of {where} within "
            f"{timeout.total_seconds():.0f} seconds; start all processes with torchrun, and see "
            "that --master-addr and --master-port can be reached, or raise --distributed-timeout"
        ) from error


def _one_voice(store: Store, world: World, error: UserError) -> UserError:
    """Return the error to end with: this rank's own if it is the first to fail.

    `add` counts for all ranks, one at a time: it can return 1 only once, even if two fail in the
    same moment. The mark itself follows a moment later, and `get` waits until it is there.
    """
    try:
        if store.add(FAILURES, 1) == 1:
            store.set(FIRST_FAILURE, f"{error.exit_code} rank {world.rank}: {error}")
            return error
        code, said = store.get(FIRST_FAILURE).decode().split(" ", 1)
        return FailedElsewhereError(said, int(code))
    except RuntimeError:
        return error  # whoever kept the store is gone too: better said twice than not at all


def _is_lost_connection(error: RuntimeError) -> bool:
    """Tell whether an error says that another process does not answer.

    >>> _is_lost_connection(RuntimeError("Timed out waiting 30000ms for recv operation"))
    True
    >>> _is_lost_connection(RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"))
    False
    """
    return isinstance(error, dist.DistError) or bool(
        re.search(r"gloo|NCCL|Connection|[Tt]imed? ?out|Broken pipe|Socket", str(error))
    )


class SharedNetwork:
    """The network as the ranks train it together: whole on each (DDP), in shares, or alone.

    Attributes:
        model: the network itself; with --fsdp, its parameters are this rank's shares.
        world: the ranks.
    """

    def __init__(
        self, model: MPNetForPretraining, world: World, device: torch.device, *, fsdp: bool = False
    ) -> None:
        """Move a network to its device and share it out; nothing is shared by one process alone.

        The optimizer must be built after this, of the parameters that are there then: with --fsdp
        they are others, and AdamW's means take their shapes from them.

        Args:
            model: on the CPU, with the same weights on all ranks.
            world: the ranks.
            device: this rank's.
            fsdp: whether to cut it into shares.
        """
        self.model = model
        self.world = world
        self._loss: nn.Module = _SummedLoss(model)
        if world.size == 1 or not fsdp:
            model.to(device)
        if world.size > 1 and fsdp:
            # From the CPU: only its own share of a network ever comes to a device.
            mesh = init_device_mesh(device.type, (world.size,))
            # Logits are a view, and nobody changes them in place, which the warning is about.
            warnings.filterwarnings("ignore", message=r"FSDP2-wrapped .* returned a view tensor")
            # A layer at a time is put together; what is outside of the layers, embeddings and
            # head, belongs to the network as a whole and is there for all of its forward pass.
            for layer in model.sentence_encoder.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        elif world.size > 1:
            # Gradients live in the very memory from which they are sent; otherwise there would be
            # two of each, 438 MB more for MPNet-base.
            self._loss = DistributedDataParallel(self._loss, gradient_as_bucket_view=True)

    @property
    def is_sharded(self) -> bool:
        """Whether the parameters of this rank are shares: --fsdp, and more than one process."""
        return isinstance(self.model, FSDPModule)

    def close(self) -> None:
        """Let go of what belongs to the exchange; before the exchange itself is ended.

        DDP that is still alive then may bring the process down at its very end, behind its last
        line, with an exit code that says that the run has failed (PyTorch 2.13, gloo: one exit in
        four).
        """
        self._loss = nn.Identity()
        # Whatever still refers to it does so in a circle. To look for these takes a third of a
        # second, which a run by one process need not spend.
        if self.world.size > 1:
            gc.collect()

    def loss_sum(self, batch: Batch, input_mode: InputMode) -> Tensor:
        """Return this rank's summed loss over a batch, a scalar, ready for `backward`.

        By way of the module that DDP wraps, if there is one. Called on the model itself, the loss
        would be the same, and the gradients would stay on their ranks: no error, and as many
        networks as ranks, which drift apart.
        """
        return self._loss(  # type: ignore[no-any-return]
            batch.input_ids,
            batch.predicted_positions,
            batch.predicted_ids,
            batch.attention_mask,
            input_mode,
        )

    def adding_up(self, last: bool) -> AbstractContextManager[None]:
        """Within the block, the gradients of a micro-batch are added to those of the other ranks.

        Only after the last micro-batch of an update: until then each rank adds up its own, and
        nothing travels. A sum of sums is the same sum, and with 16 micro-batches a sixteenth of the
        traffic.

        Args:
            last: whether it is the last one.
        """
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
        elif isinstance(self._loss, DistributedDataParallel) and not last:
            return self._loss.no_sync()
        return nullcontext()

    def settle(self) -> None:
        """End a forward pass that no backward pass follows.

        A sharded network leaves what is outside of its layers whole after it, in parameters that
        the optimizer does not know, because the backward pass would need it at once.
        """
        if isinstance(self.model, FSDPModule):
            self.model.reshard()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put rank 0's weights, whole ones, into the networks of all ranks.

        Into the memory that is there, since the optimizer and DDP hold on to it. The names are
        those of a checkpoint; a tied weight has one.

        Args:
            tensors: on rank 0; the others may give nothing.
        """
        own = self.model.state_dict()
        for name, tensor in self.world.spread(tensors):
            with torch.no_grad():
                own[name].copy_(share_of(own[name], tensor))


class _SummedLoss(nn.Module):
    """The loss as a module, because DDP watches the `forward` of a module.

    The model's own `forward` returns logits and not a loss. FSDP watches that one: it has its hooks
    on the model and on each layer, and `loss_sum` passes by them.
    """

    def __init__(self, model: MPNetForPretraining) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        predicted_positions: Tensor,
        predicted_ids: Tensor,
        attention_mask: Tensor | None,
        input_mode: InputMode,
    ) -> Tensor:
        """Return the summed loss; the arguments are the tensors of a `Batch`."""
        # The loss does not ask for the counts of a batch.
        batch = Batch(input_ids, predicted_positions, predicted_ids, attention_mask, 0, 0)
        return self.model.loss_sum(batch, input_mode)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor put together from the shares of all ranks, or as it is if it is whole.

    All ranks must ask for the same ones in the same order.

    >>> tensor = torch.ones(2)
    >>> whole(tensor) is tensor
    True
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def share_of(like: Tensor, tensor: Tensor) -> Tensor:
    """Return this rank's share of a whole tensor, cut as another one is; or all of it.

    The inverse of `whole`. FSDP cuts along the first dimension: of a matrix of 3072 rows, each of
    eight ranks has 384.

    Args:
        like: a parameter; the result goes to its device.
        tensor: whole, and the same on all ranks.
    """
    if not isinstance(like, DTensor):
        return tensor.to(like.device)
    # Every rank has all of it, so that nothing has to be sent.
    return distribute_tensor(
        tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )
