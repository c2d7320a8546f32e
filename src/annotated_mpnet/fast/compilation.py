"""torch.compile: what is compiled, and how a compiled run stays the same run.

**Layer by layer.** Each layer is compiled by itself, not the whole network:

- The layers are nearly all of the work, 97 % of MPNet-base's products.
- They share their code, so two graphs serve all of them (the last layer computes fewer entries),
  and the time to compile does not grow with their number.
- The gradient of an embedding stays exact. Generated kernels add up its rows in any order, and the
  same run would end in other weights each time.
- The loss is compiled too. As written, it copies the logits to float32, the largest numbers of all.
- Gradient checkpointing and --fsdp also work layer by layer, around a compiled layer.

**In place.** `layer.compile()` changes how the layer is called. `torch.compile(layer)` would wrap
it, and put `_orig_mod.` into the names of its weights.

**The same run.** Products and sums agree with the plain layer to rounding. Generated kernels would
draw other random numbers for dropout; `fallback_random` makes them draw as PyTorch does.

**The same run on resume.** By default PyTorch compiles for the first shape, and again for any shape
when a second one comes. A batch's kernel would then depend on the batches before it, and a resumed
run would differ from an uninterrupted one. So it is decided in advance: with `--packing full` all
batches have one shape; otherwise the kernels take any length from the start.

Evaluations run uncompiled: they are a small part of a run, and their batches vary in length.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from annotated_mpnet.errors import ConfigError, shown
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining, cross_entropy_sum

SHAPES = 64
"""Graphs per layer, after which PyTorch gives up and runs it as written. Its default of 8 is too
few for a process that trains with several settings."""


def compile_model(model: MPNetForPretraining, device: torch.device, *, lengths_vary: bool) -> None:
    """Have a network's layers compiled when they first run.

    Args:
        model: changed in place.
        device: where it will run.
        lengths_vary: whether batches come in many shapes.

    Raises:
        ConfigError: no kernels can be generated here.
    """
    # A small test first: it fails in seconds, where the network might take minutes.
    try:
        torch.compile(torch.sin)(torch.zeros(8, device=device))
    except RuntimeError as error:
        first_line = str(error).strip().partition("\n")[0]
        needed = "a C++ compiler (such as g++)" if device.type == "cpu" else "Triton and a compiler"
        raise ConfigError(
            f"--compile does not work on {device} here: {shown(first_line)}; install {needed}, "
            "or leave --compile out"
        ) from error
    torch._dynamo.config.recompile_limit = max(SHAPES, torch._dynamo.config.recompile_limit)
    # Under DDP, PyTorch would cut the graphs into pieces. A layer is small enough.
    torch._dynamo.config.optimize_ddp = False
    options: dict[str, Any] = {"fallback_random": True}
    for layer in model.sentence_encoder.layers:
        layer.compile(dynamic=lengths_vary, options=options)
    model.cross_entropy_sum = torch.compile(
        cross_entropy_sum, dynamic=lengths_vary, options=options
    )


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled layers as they are written, within the block."""
    with torch.compiler.set_stance("force_eager"):
        yield
