"""Generated kernels: what `torch.compile` does to the network, and what it must not do.

PyTorch runs a network one operation after the other, and each reads its input from memory and
writes its output back. Between two matrix products of a layer there are half a dozen small ones:
add a bias, bend, drop, add, normalise. None of them computes much, and all of them move the same
rows back and forth. `torch.compile` looks at the Python code, writes down the operations as a
graph, and generates one kernel for each such group, which reads once and writes once.

**Layer by layer.** The layers are compiled, each by itself, and not the whole network, for four
reasons:

- They are nearly all of the work: all of MPNet-base's products but the head's, in GFLOP
  (`mpnet/encoder.py`):

  >>> round((119.4 - 3.65) / 119.4, 2)
  0.97

- They are the same code with other weights, so that one graph serves them all: the time to compile
  does not grow with their number. There are two graphs, because the last layer computes its loss
  rows only. (The whole of MPNet-base would be one graph of twelve times that.)
- What is left outside stays exact. The gradient of an embedding adds up rows in the order of the
  batch; the generated kernel lets threads add as they come, and since the sum of floating-point
  numbers depends on their order, the same run would end in other weights each time.
- Gradient checkpointing and --fsdp work on layers too, and so can stand around a compiled one.

**In place.** `layer.compile()` changes how the layer is called. `torch.compile(layer)` would wrap
it, and a `_orig_mod.` would slip into the name of each weight in every checkpoint.

**The same numbers.** Products and sums agree with the plain layer's to rounding. Dropout would not:
generated kernels draw random numbers in a way of their own. `fallback_random` makes them draw as
PyTorch does, at the cost of not being drawn within the kernels, so that --compile changes how fast
a run is and not which run it is.

**The same numbers again**, on resume. A graph is made for the shapes of the first batch. When
another shape comes, PyTorch by default makes one that serves all; then the kernel that a batch
meets would depend on which batches came before it, and a resumed run would not be the uninterrupted
one to the last bit. So it is decided in advance. With `--packing full` all batches have one shape,
and the kernels are made for it. Otherwise lengths vary from batch to batch, and the kernels take
any length.

Evaluations run uncompiled (`uncompiled`): they are a small part of a run, their batches vary in
length, and each kind of batch would have to be compiled first.

Next: `mpnet/loop.py`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from annotated_mpnet.errors import ConfigError
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining

SHAPES = 64
"""How many graphs the layers may have; beyond that, PyTorch runs them as they are written. It
allows 8, which a run that is repeated with other settings in the same process has used up soon."""


def compile_model(model: MPNetForPretraining, device: torch.device, *, lengths_vary: bool) -> None:
    """Have a network's layers compiled when they first run. Names of weights stay as they are.

    Args:
        model: changed in place.
        device: where it will run.
        lengths_vary: whether batches come in many shapes, or all in one.

    Raises:
        ConfigError: kernels cannot be generated here.
    """
    _try_compiler(device)
    torch._dynamo.config.recompile_limit = max(SHAPES, torch._dynamo.config.recompile_limit)
    # Under DDP, PyTorch would cut a graph in pieces, so that gradients of the later ones can travel
    # while the earlier ones are computed. A layer is small enough as it is.
    torch._dynamo.config.optimize_ddp = False
    for layer in model.sentence_encoder.layers:
        layer.compile(dynamic=lengths_vary, options={"fallback_random": True})


@contextmanager
def uncompiled() -> Iterator[None]:
    """Within the block, what was compiled runs as it is written."""
    with torch.compiler.set_stance("force_eager"):
        yield


def _try_compiler(device: torch.device) -> None:
    """Compile something small: seconds, where the network may take minutes before it fails.

    A compiler that is missing is one thing that can be wrong, its headers, or those of Python, are
    others; the only way to know is to try.
    """
    try:
        torch.compile(torch.sin)(torch.zeros(8, device=device))
    except RuntimeError as error:
        first_line = str(error).strip().partition("\n")[0]
        needed = "a C++ compiler (such as g++)" if device.type == "cpu" else "Triton and a compiler"
        raise ConfigError(
            f"--compile does not work on {device} here: {first_line[:80]!r}; install {needed}, "
            "or leave --compile out"
        ) from error
