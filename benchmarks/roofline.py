"""What an operation cannot be faster than: the arithmetic of its products, the memory it touches.

    floor of an operation  =  max( FLOPs / product rate,  bytes / bandwidth )

(Williams, Waterman and Patterson, "Roofline", 2009.) Both rates are measured on the machine, by a
large product and by a large copy, so that no data sheet is trusted. FLOPs are those that PyTorch's
own counter gives for an operation. Bytes are those that must be moved at least once: each operand
read, each result written, and nothing twice. Adding two rows of 1000 float32 numbers reads 8000
bytes and writes 4000:

>>> with Operations() as operations:
...     sum_R = torch.ones(1000) + torch.ones(1000)
>>> operations.bytes["aten::add"], operations.flops["aten::add"]
(12000, 0)

A product of (10, 20) by (20, 30) multiplies 10 x 20 x 30 times and adds as often, on 1100 numbers:

>>> with Operations() as operations:
...     product = torch.ones(10, 20) @ torch.ones(20, 30)
>>> operations.flops["aten::mm"], operations.bytes["aten::mm"]
(12000, 4400)

A view moves nothing, and what is only set aside (`empty`) is not touched yet:

>>> with Operations() as operations:
...     view = torch.empty(10, 20).t()[3:]
>>> sum(operations.bytes.values())
0

**What the floor does not say.** That an operation is needed at all: a copy at full bandwidth has a
ratio of 1 and would still better not be made. And it takes all memory for slow: operands that are
still in the cache can come faster, so that small shapes have ratios below 1.
"""

import re
import time
from collections import defaultdict
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

# The first that fits counts; names are those of PyTorch's operations.
PARTS = {
    # First: their names list what they were made of.
    "generated kernels": r"Compiled|triton_",
    "products": r"aten::(add|baddb|b)?mm(_|$)",
    "fused attention": r"scaled_dot_product|flash|efficient_attention",
    "loss": r"log_softmax|nll_loss|cross_entropy|linear_cross",
    "softmax": r"softmax",
    "random numbers": r"random|randint|randn|bernoulli|native_dropout|philox",
    "norms": r"layer_norm",
    "non-linearity": r"gelu|relu|tanh|silu",
    "optimizer": r"adam|zero_grad",
    "embeddings": r"embedding|index|gather|scatter|take_along|sort",
    "copies": (
        r"copy|contiguous|clone|aten::cat|fill|full|zero|ones|aten::to$|empty|resize|pad|repeat"
        r"|(slice|select)_backward"
    ),
    "elementwise": (
        r"aten::(add|mul|sub|rsub|div|sum|mean|neg|abs|sqrt|rsqrt|square|pow|exp|log|where|masked"
        r"|ge|gt|le|lt|eq|ne|bitwise|logical|min|max|clamp|any|all|cumsum|arange|tril|triu)"
    ),
}
OTHER = "other"

# Memory that is only set aside, and a view whose schema does not say that it is one.
UNTOUCHED = re.compile(r"aten::(new_)?empty|aten::_unsafe_view")
# Of these a row for each index is read, never the table.
GATHERS = re.compile(r"aten::(embedding|index|index_select|gather)$")
# The first operand is written over without having been read.
OVERWRITES = re.compile(r"aten::(copy_|fill_|zero_|random_|normal_|uniform_|bernoulli_)$")


def part_of(name: str) -> str:
    """Return the part of a step to which an operation belongs.

    >>> part_of("aten::addmm"), part_of("aten::_log_softmax"), part_of("aten::_softmax")
    ('products', 'loss', 'softmax')
    >>> part_of("aten::mul_"), part_of("aten::copy_"), part_of("autograd::engine")
    ('elementwise', 'copies', 'other')
    """
    for part, pattern in PARTS.items():
        if re.search(pattern, name):
            return part
    return OTHER


class Operations(TorchDispatchMode):
    """Counts, inside a `with` block, the operations that really compute, backward ones too.

    Attributes:
        flops: of each name, over all calls.
        bytes: of each name, over all calls.
        calls: one entry for each: name, FLOPs, bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops: dict[str, int] = defaultdict(int)
        self.bytes: dict[str, int] = defaultdict(int)
        self.calls: list[tuple[str, int, int]] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name
        count = flop_registry.get(func._overloadpacket)
        flops = 0 if count is None else count(*args, **kwargs, out_val=out)
        moved = _moved(func, args, kwargs, out)
        self.flops[name] += flops
        self.bytes[name] += moved
        self.calls.append((name, flops, moved))
        return out

    def floors(self, product_rate: float, bandwidth: float) -> dict[str, float]:
        """Return the least seconds of each part.

        Args:
            product_rate: FLOP/s of large products.
            bandwidth: bytes/s.
        """
        floors: dict[str, float] = defaultdict(float)
        for name, flops, moved in self.calls:
            floors[part_of(name)] += max(flops / product_rate, moved / bandwidth)
        return floors


def _moved(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Return the bytes that a call must move at least: operands read, results written."""
    schema, name = func._schema, func._schema.name
    returns = [each.alias_info for each in schema.returns]
    if UNTOUCHED.match(name) or any(info and not info.is_write for info in returns):
        return 0
    written = 0
    # Results of their own; those that lie on an operand are counted with it.
    fresh = out if isinstance(out, tuple | list) and len(returns) > 1 else (out,)
    for info, result in zip(returns, fresh, strict=False):
        written += 0 if info else _size(result)
    read = 0
    for argument, value in _arguments(schema, args, kwargs):
        overwritten = OVERWRITES.match(name) or argument.name == "out"
        changed = argument.alias_info is not None and argument.alias_info.is_write
        # AdamW declares that it may write gradients: it does with a scaler, which nobody has here.
        changed = changed and argument.name != "grads"
        written += _size(value) if changed else 0
        read += 0 if changed and overwritten else _size(value)
    if GATHERS.match(name):
        read = written
    return read + written


def _arguments(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Return each argument of a call, as its schema declares it, with its value."""
    given = list(zip(schema.arguments, args, strict=False))
    rest = schema.arguments[len(args) :]
    return given + [(each, kwargs[each.name]) for each in rest if each.name in kwargs]


def _size(value: Any) -> int:
    """Return the bytes of a tensor, or of all tensors of a list; what is expanded counts once.

    >>> _size(torch.ones(3, 1).expand(3, 100)), _size([torch.ones(2), torch.ones(3)]), _size(5)
    (12, 20, 0)
    """
    if isinstance(value, list | tuple):
        return sum(_size(each) for each in value)
    if not isinstance(value, torch.Tensor):
        return 0
    sizes = zip(value.shape, value.stride(), strict=True)
    return value[tuple(0 if stride == 0 else slice(None) for _, stride in sizes)].nbytes


def measure_product_rate(device: torch.device, dtype: torch.dtype, size: int = 2048) -> float:
    """Return the FLOP/s of a large square product, the best of several."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _best(lambda: torch.mm(left, right), device)


def measure_bandwidth(device: torch.device, numbers: int = 2**26) -> float:
    """Return the bytes/s of a large copy, read and written ones together, the best of several."""
    source = torch.randn(numbers, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source), device)


def _best(call: Any, device: torch.device, times: int = 10) -> float:
    seconds = []
    for _ in range(times):
        _wait(device)
        started = time.perf_counter()
        call()
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
