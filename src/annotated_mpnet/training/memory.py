"""Out of memory: how much there is, and which flags ask for less.

PyTorch's error advises on its allocator. A user needs flags to try, cheapest first:

1. Smaller micro-batches, and more of them: the same sequences in an update. In place of
   `--batch-size 16 --update-freq 8`:

   >>> smaller_micro_batch(batch_size=16, update_freq=8)
   (8, 16)

2. `--precision bf16`, if it is not on: half the memory for most activations.
3. `--gradient-checkpointing`: the same numbers, for a third more work.
4. `--fsdp`, under torchrun: weights, gradients and AdamW's means are split over the processes.
5. Shorter sequences, or a smaller network: another run.

A CPU rarely raises this error: the system overcommits memory, and then its out-of-memory killer
ends a process.
"""

import os

import torch

from annotated_mpnet.errors import OutOfMemoryError
from annotated_mpnet.settings.config import PretrainingConfig

GIB = 2**30

# Errors without a class of their own: of the CPU's and Apple's allocators, and of CUDA's libraries.
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
    """Return the error to raise where `is_out_of_memory`, with the flags that could help."""
    return OutOfMemoryError(
        f"out of memory on {device} with micro-batches of {config.optimization.batch_size} "
        f"sequences of {config.data.max_tokens} tokens ({_memory(device)}); try, in this order: "
        + "; ".join(_remedies(config, device, world_size))
    )


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether an error means out of memory.

    >>> is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    True
    >>> is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    False
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return any(phrase in str(error) for phrase in PHRASES)


def smaller_micro_batch(batch_size: int, update_freq: int) -> tuple[int, int] | None:
    """Return a smaller batch size, and the update frequency that keeps the sequences of an update.

    The batch is cut into as few pieces as possible, to keep the device busy.

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
        total = optimization.batch_size * optimization.update_freq * world_size
        remedies.append(
            f"--batch-size {cut[0]} --update-freq {cut[1]} (the same {total} sequences per update)"
        )
    # "auto" already means bf16 on CUDA.
    if machine.precision == "fp32" or (machine.precision == "auto" and device.type != "cuda"):
        remedies.append("--precision bf16 (rounds differently)")
    if not machine.gradient_checkpointing:
        remedies.append("--gradient-checkpointing (the same numbers, a third more work)")
    if world_size > 1 and not machine.fsdp:
        remedies.append(f"--fsdp (each of the {world_size} processes holds a shard)")
    return [
        *remedies,
        f"shorter sequences (--max-tokens is {config.data.max_tokens}) or a smaller network",
    ]


def _memory(device: torch.device) -> str:
    if device.type == "cuda":
        # Of the whole device, other processes included.
        free, total = torch.cuda.mem_get_info(device)
        ours = torch.cuda.max_memory_allocated(device)
        return (
            f"{(total - free) / GIB:.1f} of {total / GIB:.1f} GiB are in use, of which this run "
            f"had up to {ours / GIB:.1f}"
        )
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"the machine has {total / GIB:.1f} GiB"
