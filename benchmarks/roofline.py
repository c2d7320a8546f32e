"""A lower bound for the time of an operation, from its arithmetic and memory traffic (roofline).

    floor of an operation  =  max( FLOPs / product rate,  bytes / bandwidth )

(Williams, Waterman and Patterson, "Roofline", 2009.) Both rates are measured on the machine, with a
large product and a large copy. FLOPs are counted by PyTorch's own counter. Bytes are the least that
must be moved: each operand read once and each result written once. Adding two vectors of 1000
float32 numbers reads 8000 bytes and writes 4000:

>>> with Operations() as operations:
...     total_N = torch.ones(1000) + torch.ones(1000)
>>> operations.bytes["aten::add"], operations.flops["aten::add"]
(12000, 0)

A product of (10, 20) by (20, 30) takes 10 x 20 x 30 multiplications and as many additions, on 1100
numbers:

>>> with Operations() as operations:
...     product = torch.ones(10, 20) @ torch.ones(20, 30)
>>> operations.flops["aten::mm"], operations.bytes["aten::mm"]
(12000, 4400)

A view moves nothing, and neither does allocating memory (`empty`):

>>> with Operations() as operations:
...     view = torch.empty(10, 20).t()[3:]
>>> sum(operations.bytes.values())
0

**Limits.** The floor does not say whether an operation is needed: a superfluous copy at full
bandwidth has a ratio of 1. It also assumes that all operands come from main memory. Small ones may
still be in the cache, so small shapes can have ratios below 1.
"""

import re
import time
from collections import defaultdict
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

# Part -> pattern for PyTorch's operation names; the first match counts.
PARTS = {
    # Must come first, because their names list the operations inside.
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

# Allocations, and a view whose schema does not say that it is one.
UNTOUCHED = re.compile(r"aten::(new_)?empty|aten::_unsafe_view")
# These read one row of the table per index, not the whole table.
GATHERS = re.compile(r"aten::(embedding|index|index_select|gather)$")
# These overwrite their first operand without reading it.
OVERWRITES = re.compile(r"aten::(copy_|fill_|zero_|random_|normal_|uniform_|bernoulli_)$")


def part_of(name: str) -> str:
    """Return the part of a step that an operation belongs to.

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
    """Counts the operations in a `with` block, including the backward pass.

    Attributes:
        flops: by name, over all calls.
        bytes: by name, over all calls.
        calls: name, FLOPs and bytes of each call.
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
        """Return the floor of each part in seconds.

        Args:
            product_rate: FLOP/s of large products.
            bandwidth: bytes/s.
        """
        floors: dict[str, float] = defaultdict(float)
        for name, flops, moved in self.calls:
            floors[part_of(name)] += max(flops / product_rate, moved / bandwidth)
        return floors


def _moved(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Return the least bytes that a call must move: operands read, results written."""
    schema, name = func._schema, func._schema.name
    returns = [each.alias_info for each in schema.returns]
    if UNTOUCHED.match(name) or any(info and not info.is_write for info in returns):
        return 0
    written = 0
    # New tensors. Results that share memory with an operand are counted there.
    fresh = out if isinstance(out, tuple | list) and len(returns) > 1 else (out,)
    for info, result in zip(returns, fresh, strict=False):
        written += 0 if info else _size(result)
    read = 0
    for argument, value in _arguments(schema, args, kwargs):
        overwritten = OVERWRITES.match(name) or argument.name == "out"
        changed = argument.alias_info is not None and argument.alias_info.is_write
        # AdamW's schema says that it writes gradients, but it does so only with a gradient scaler.
        changed = changed and argument.name != "grads"
        written += _size(value) if changed else 0
        read += 0 if changed and overwritten else _size(value)
    if GATHERS.match(name):
        read = written
    return read + written


def _arguments(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Pair each argument of the schema with its value in a call."""
    given = list(zip(schema.arguments, args, strict=False))
    rest = schema.arguments[len(args) :]
    return given + [(each, kwargs[each.name]) for each in rest if each.name in kwargs]


def _size(value: Any) -> int:
    """Return the bytes of a tensor or a list of tensors; expanded dimensions count once.

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
    """Return the FLOP/s of a large square product, the best of ten."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _best(lambda: torch.mm(left, right), device)


def measure_bandwidth(device: torch.device, numbers: int = 2**26) -> float:
    """Return the bytes/s of a large copy, reads and writes together, the best of ten."""
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
