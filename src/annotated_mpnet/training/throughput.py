"""How fast is it, in units that can be compared: the floating-point work of an update.

Updates per second say nothing about another batch, tokens per second nothing about another network.
The question behind both is how much of the machine is used, and its answer is a share, *model FLOPs
utilisation* (Chowdhery et al., "PaLM", arXiv 2204.02311, appendix B):

    MFU  =  work that the network needs in a second  /  the most that the device could do in it

What counts as needed is a convention; numbers of two conventions cannot be compared. Here:

- matrix products only, a multiplication and an addition being two operations; norms, softmax,
  dropout, embeddings and the optimizer are less than 1 % of the operations, if not of the time;
- attention included, but only the scores that are computed: nobody's work on pairs that no block
  holds (`modeling/two_stream.py`);
- the head only for predicted rows, the last layer only for the rows that the loss is read at;
- the backward pass is twice the forward pass, since each product has two factors to send a gradient
  to; what is computed *again*, by gradient checkpointing or inside a fused kernel, is no progress
  and does not count;
- padding counts as work. It keeps the machine busy, so that MFU cannot show it; tokens per second,
  which leave padding out, do. One looks at both.

For a row of MPNet-base, in GFLOP, forward and backward: `modeling/encoder.py` takes the forward
pass apart.

>>> base = ModelConfig()
>>> for mode in ("mpnet", "plm", "mlm"):
...     print(f"{mode:6}{training_flops(base, mode, 1, length=512, num_predicted=76) / 1e9:4.0f}")
mpnet  358
plm    317
mlm    283

An H200 that is busy all of the time would take 0.36 ms for the first, 1.4 million tokens in a
second. Nothing gets there: matrices are read and written, norms are all memory and no arithmetic.
ModernBERT reached 25 %, well-made training code for one architecture 35 to 45 %:

>>> tokens_per_second = 550_000
>>> work = training_flops(base, "mpnet", 1, 512, 76) * tokens_per_second / 512
>>> print(f"{work / 1e12:.0f} TFLOP/s, {work / 989e12:.0%} of an H200")
385 TFLOP/s, 39% of an H200

**The device's side** is what its maker promises for dense products of bfloat16 numbers (tables of
NVIDIA also print twice as much, for matrices that are half zeros). Only where that is known, and
products do run in bfloat16, there is an MFU. A CPU has no such number: it depends on the clock
under load, on instructions, and on who else is there.

HF: the Trainer estimates 6 x parameters x tokens, which counts the embedding table as if it were
multiplied by, and attention not at all.

Next: `tracking.py`, which shows the numbers; `plan.py`, which foretells them.

    L tokens of a sentence   P predicted tokens   D embed_dim   F feed-forward dim   V vocabulary
"""

import resource
import sys

import torch

from annotated_mpnet.config import InputMode, ModelConfig

# Parts of the names that devices give themselves, the more special one first; dense bfloat16
# products with float32 sums, in TFLOP/s, from NVIDIA's data sheets.
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
    """Return the operations of a micro-batch, forward and backward, by the convention above.

    Made of a few multiplications, so that the loop can ask for each micro-batch.

    Args:
        config: the network.
        input_mode: the objective.
        batch_size: B.
        length: L, padding included.
        num_predicted: P, the slots of a row; not the predicted tokens of the batch.
    """
    P = num_predicted
    asking, answering, pairs = layer_shape(input_mode, length, P)
    inner = (config.encoder_layers - 1) * _layer_flops(config, asking, answering, pairs)
    # In the last layer only P rows ask, and each asks all that answer.
    last = _layer_flops(config, P, answering, P * answering)
    D = config.encoder_embed_dim
    head = 2 * P * D * (D + config.vocab_size)
    return 3.0 * batch_size * (inner + last + head)


def layer_shape(input_mode: InputMode, length: int, num_predicted: int) -> tuple[int, int, int]:
    """Return, for any layer but the last: rows that ask, rows that answer, pairs of them.

    A pair is a score that is computed; not all who ask look at all who answer.
    """
    L, P = length, num_predicted
    match input_mode:
        case "mpnet":
            return L + 2 * P, L + P, L * L + 2 * P * (L + P)
        case "plm":
            return L + P, L, (L + P) * L
        case "mlm":
            return L, L, L * L


def _layer_flops(config: ModelConfig, asking: int, answering: int, pairs: int) -> int:
    """Return the operations of a layer's forward pass, for one sample."""
    D, F = config.encoder_embed_dim, config.encoder_ffn_dim
    # Who asks makes a query and needs the way out; who answers makes a key and a value.
    projections = 2 * D * D * (2 * asking + 2 * answering)
    # A score is a product of D numbers over all heads; to use it takes as much again.
    scores = 4 * D * pairs
    feed_forward = 4 * D * F * asking
    return projections + scores + feed_forward


def peak_flops(device_name: str, bf16: bool) -> float | None:
    """Return the operations per second that a device could do at the most; None if unknown.

    Args:
        device_name: as `torch.cuda.get_device_name` says it.
        bf16: whether products run in bfloat16; there is no number for other types here.

    >>> peak_flops("NVIDIA H100 80GB HBM3", bf16=True) / 1e12
    989.0
    >>> peak_flops("NVIDIA H100 80GB HBM3", bf16=False), peak_flops("cpu", bf16=True)
    (None, None)
    """
    if not bf16:
        return None
    # The blank lets "L4 " be found at the end of a name, and not in "L40S".
    found = (tflops for name, tflops in BF16_TFLOPS.items() if name in f"{device_name} ")
    tflops = next(found, None)
    return None if tflops is None else tflops * 1e12


def device_name(device: torch.device) -> str:
    """Return what a device calls itself, for `peak_flops` and for the plan.

    >>> device_name(torch.device("cpu"))
    'cpu'
    """
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def memory_peak(device: torch.device) -> float:
    """Return the most memory used so far, in GB (10^9 bytes).

    On CUDA: what tensors took on the device; PyTorch's cache around them, and the few hundred MB of
    CUDA itself, come on top. Elsewhere: what this process took, Python and all libraries included.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in kB, macOS in bytes.
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9
