"""Out of memory: how much there is, how much was asked for, and which flags ask for less.

PyTorch says "CUDA out of memory" and advises on its allocator. What a user needs is what to write
on the command line instead, and what that changes. In this order, because the first costs nothing:

1. Smaller micro-batches, and more of them. The update sees the same rows and predicts the same
   tokens. Without dropout its gradient is the same to rounding; with dropout, each micro-batch
   draws new masks (`trainer.py`). With `--batch-size 16 --update-freq 8`, half of that is

   >>> config = PretrainingConfig()
   >>> smaller_micro_batch(config.optimization.batch_size, config.optimization.update_freq)
   (8, 16)

2. `--precision bf16`, where it is not on: half the memory for most of what is kept for the way
   back. Another rounding, and faster on a GPU.
3. `--gradient-checkpointing`: the same numbers, for a third more work (`modeling/encoder.py`). Once
   a micro-batch is a single row, this is what is left.
4. `--fsdp`, under torchrun: weights, gradients and AdamW's two means, 16 bytes for each weight, are
   shared out among the processes. 1 to 3 do nothing about these.
5. Shorter rows. That is another run, with another length.

A CPU has no such error, as a rule: the system promises more memory than it has, and when the
promise falls due, kills the process that it likes least. Only a single request beyond all reason is
refused, and then what is said here is the same.

Next: `run.py`, which calls this.
"""

import os

import torch

from annotated_mpnet.config import PretrainingConfig
from annotated_mpnet.errors import OutOfMemoryError

GIB = 2**30

# What the allocators say that have no class of error of their own: the CPU's, Apple's, and the
# libraries that ask CUDA for memory behind PyTorch's back.
PHRASES = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "MPS backend out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def out_of_memory(
    config: PretrainingConfig, device: torch.device, world_size: int = 1
) -> OutOfMemoryError:
    """Return what to say about an error for which `is_out_of_memory`.

    Args:
        config: the run's, for the flags that would help and are not yet used.
        device: where the run computes.
        world_size: how many processes share the work.
    """
    batch_size = config.optimization.batch_size
    return OutOfMemoryError(
        f"out of memory on {device} with micro-batches of {batch_size} rows of "
        f"{config.data.max_tokens} tokens ({_memory(device)}); try, in this order: "
        + "; ".join(_remedies(config, device, world_size))
    )


def is_out_of_memory(error: RuntimeError) -> bool:
    """Tell whether an error says that there was no memory.

    >>> is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    True
    >>> is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    False
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return any(phrase in str(error) for phrase in PHRASES)


def smaller_micro_batch(batch_size: int, update_freq: int) -> tuple[int, int] | None:
    """Return a smaller batch size and the update frequency that keeps the update's rows.

    As few pieces as possible: small products keep a processor less busy. A micro-batch is cut by
    the smallest number that divides it; one row cannot be cut.

    >>> smaller_micro_batch(9, 4), smaller_micro_batch(7, 1), smaller_micro_batch(1, 8)
    ((3, 12), (1, 7), None)
    """
    if batch_size == 1:
        return None
    pieces = next(n for n in range(2, batch_size + 1) if batch_size % n == 0)
    return batch_size // pieces, update_freq * pieces


def _remedies(config: PretrainingConfig, device: torch.device, world_size: int) -> list[str]:
    machine, optimization = config.machine, config.optimization
    remedies = []
    cut = smaller_micro_batch(optimization.batch_size, optimization.update_freq)
    if cut is not None:
        rows = optimization.batch_size * optimization.update_freq * world_size
        remedies.append(
            f"--batch-size {cut[0]} --update-freq {cut[1]} (the same {rows} rows per update)"
        )
    # "auto" is bf16 on CUDA already.
    if machine.precision == "fp32" or (machine.precision == "auto" and device.type != "cuda"):
        remedies.append("--precision bf16 (another rounding)")
    if not machine.gradient_checkpointing:
        remedies.append("--gradient-checkpointing (the same numbers, a third more work)")
    if world_size > 1 and not machine.fsdp:
        remedies.append(f"--fsdp (each of the {world_size} processes holds its share)")
    remedies.append(f"shorter rows (--max-tokens is {config.data.max_tokens}) or a smaller network")
    return remedies


def _memory(device: torch.device) -> str:
    """Say how much memory is in use, and how much there is."""
    if device.type == "cuda":
        # Of the whole device: other processes' memory is missing here just the same.
        free, total = torch.cuda.mem_get_info(device)
        ours = torch.cuda.max_memory_allocated(device)
        return (
            f"{(total - free) / GIB:.1f} of {total / GIB:.1f} GiB are in use, of which this run "
            f"had up to {ours / GIB:.1f}"
        )
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"the machine has {total / GIB:.1f} GiB"
