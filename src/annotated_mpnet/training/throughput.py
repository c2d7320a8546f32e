"""How fast is it: the floating-point operations of an update, and the share of the device's peak.

*Model FLOPs utilisation* (Chowdhery et al., "PaLM", arXiv 2204.02311, appendix B) can be compared
between networks, batches and devices:

    MFU  =  operations that the network needs in a second  /  the device's peak per second

Which operations count is a convention. Here:

- matrix products only; a multiplication and an addition are two operations;
- attention only for the scores that are computed (`mpnet/two_stream.py`), the head only for
  predicted tokens, the last layer only for the queries that the loss is computed from;
- the backward pass is twice the forward pass, because each product sends a gradient to both of its
  factors. What gradient checkpointing or a fused kernel computes *again* does not count;
- padding counts, because the device computes it. Tokens per second leave it out, so look at both.

Forward and backward for a sequence of MPNet-base, in GFLOP:

>>> base = ModelConfig()
>>> for mode in ("mpnet", "plm", "mlm"):
...     print(f"{mode:6}{training_flops(base, mode, 1, length=512, num_predicted=76) / 1e9:4.0f}")
mpnet  358
plm    317
mlm    283

Good training code reaches 25 to 45 % of the peak:

>>> tokens_per_second = 550_000
>>> work = training_flops(base, "mpnet", 1, 512, 76) * tokens_per_second / 512
>>> print(f"{work / 1e12:.0f} TFLOP/s, {work / peak_flops('H200', bf16=True):.0%} of an H200")
385 TFLOP/s, 39% of an H200

    L tokens of a sequence   P predicted tokens   D embed_dim   F feed-forward dim   V vocabulary
"""

import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

from annotated_mpnet.mpnet.config import InputMode, ModelConfig

# By a part of the device's name, the more specific one first: dense products of bfloat16 numbers in
# TFLOP/s, from NVIDIA's data sheets (which also print twice as much, for sparse matrices).
BF16_TFLOPS = {
    "B200": 2250,
    "GH200": 989,
    "H200 NVL": 835,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H800": 989,
    "A100": 312,
    "A800": 312,
    "A10G": 70,
    "A10": 125,
    "A40": 150,
    "A30": 165,
    "A6000": 155,
    "L40S": 362,
    "L4 ": 121,
    "RTX 4090": 165,
    "RTX 3090": 71,
}


def training_flops(
    config: ModelConfig, input_mode: InputMode, batch_size: int, length: int, num_predicted: int
) -> float:
    """Return the operations of a micro-batch, forward and backward.

    Args:
        config: the network.
        input_mode: the objective.
        batch_size: B.
        length: L, padding included.
        num_predicted: P, empty slots included.
    """
    P = num_predicted
    queries, keys, pairs = layer_shape(input_mode, length, P)
    inner = (config.encoder_layers - 1) * _layer_flops(config, queries, keys, pairs)
    # The last layer has P queries only, and each is scored against all keys.
    last = _layer_flops(config, P, keys, P * keys)
    D = config.encoder_embed_dim
    head = 2 * P * D * (D + config.vocab_size)
    return 3.0 * batch_size * (inner + last + head)


def layer_shape(input_mode: InputMode, length: int, num_predicted: int) -> tuple[int, int, int]:
    """Return the queries, keys and computed scores of each layer but the last, for a sequence."""
    L, P = length, num_predicted
    match input_mode:
        case "mpnet":
            return L + 2 * P, L + P, L * L + 2 * P * (L + P)
        case "plm":
            return L + P, L, (L + P) * L
        case "mlm":
            return L, L, L * L


def _layer_flops(config: ModelConfig, queries: int, keys: int, pairs: int) -> int:
    """Return the operations of a layer's forward pass, for a sequence."""
    D, F = config.encoder_embed_dim, config.encoder_ffn_dim
    # Queries and their output projection, keys and values.
    projections = 2 * D * D * (2 * queries + 2 * keys)
    # The scores, and the weighted sums of values.
    scores = 4 * D * pairs
    feed_forward = 4 * D * F * queries
    return projections + scores + feed_forward


def peak_flops(device_name: str, bf16: bool) -> float | None:
    """Return a device's peak in operations per second; None if it is unknown.

    Args:
        device_name: as from `torch.cuda.get_device_name`.
        bf16: whether products run in bfloat16; other types have no number here.

    >>> peak_flops("NVIDIA H100 80GB HBM3", bf16=True) / 1e12
    989.0
    >>> peak_flops("NVIDIA H100 80GB HBM3", bf16=False), peak_flops("cpu", bf16=True)
    (None, None)
    """
    if not bf16:
        return None
    # The blank finds "L4 " at the end of a name, and not in "L40S".
    found = (tflops for name, tflops in BF16_TFLOPS.items() if name in f"{device_name} ")
    tflops = next(found, None)
    return None if tflops is None else tflops * 1e12


def device_name(device: torch.device) -> str:
    """Return the name of a device.

    >>> device_name(torch.device("cpu"))
    'cpu'
    """
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def memory_in_use() -> float:
    """Return the memory that this process uses now, in bytes; its peak where that is not known."""
    return _of_process("VmRSS") or memory_peak(torch.device("cpu")) * 1e9


def memory_peak(device: torch.device) -> float:
    """Return the most memory used so far, in GB (10^9 bytes).

    On CUDA by tensors, without PyTorch's cache and CUDA itself; elsewhere by the whole process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    # On Linux `ru_maxrss` may be the peak of the process that started this one.
    if (peak := _of_process("VmHWM")) is not None:
        return peak / 1e9
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts in bytes, others in kB.
    return usage / 1e9 if sys.platform == "darwin" else usage * 1024 / 1e9


def _of_process(name: str) -> float | None:
    """Return a size from /proc/self/status, in bytes; None where there is no such file or line."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024.0
    return None
