"""How much memory an update will take, estimated before there is one.

    weights, gradients, AdamW's two means    16 bytes per weight, whatever the batch
    activations for the backward pass        per entry of a layer, and per score
    logits                                   predicted tokens x vocabulary, twice, in float32

In addition, rank 0 has a copy of what it saves, weights and means, in the CPU's memory. Muon keeps
a single mean of its matrices (`means_bytes`).

**An entry in a layer** is D wide, and F inside the feed-forward net. Follow it through
`SentenceEncoderLayer.forward`; each operation keeps what its gradient is computed from:

    in_proj      the input                          D   (output of the last layer's norm)
    attention    the query                          D
    out_proj     the attention's output             D
    first norm   the residual sum                   D
    fc1          the norm's output                  D
    activation   the inner values                       F
    fc2          the activated values                   F
    second norm  the residual sum                   D
                                                    6 D + 2 F numbers

Each key/value entry adds 2 D. Dropout keeps a byte per number, in two places of width D and one of
width F. The softmax keeps each score, and a dropout after it two more numbers; `blocked` attention
keeps the score alone, and a fused kernel keeps none and recomputes it. In bfloat16, what goes into
a product has half the size; norms and sums stay in float32.

**The rest**: each sample's own relative bias with its gradient, and the gradient of the token
table, which exists three times for a moment: from the head, from the embedding, and their sum.

For MPNet-base and 16 sequences, in GB: eager, blocked, with a fused kernel; with a fused kernel in
bfloat16, and with gradient checkpointing too.

>>> def gb(attention="sdpa", **how):
...     shape = {"batch_size": 16, "length": 512, "num_predicted": 76}
...     work = Workload(ModelConfig(), "mpnet", **shape, attention=attention, **how)
...     return round(work.activation_bytes() / 1e9, 1)
>>> gb("eager"), gb("blocked"), gb(on_gpu=True)
(15.9, 9.9, 6.9)
>>> gb(on_gpu=True, bf16=True), gb(on_gpu=True, bf16=True, recompute=True)
(5.3, 1.1)

Measured on a CPU, in all modes and several shapes, it is right within a third
(`tests/test_plan.py`). On a GPU, several hundred megabytes of CUDA itself come on top. On a CPU,
where the whole process is measured, Python and the libraries take half a gigabyte, so the plan adds
what the process uses before the first update:

                 planned    measured
    demo         0.66 GB    0.71 GB
    tiny         1.04 GB    1.17 GB
    small        1.41 GB    1.46 GB    with micro-batches of 8

    L tokens of a sequence   P predicted tokens   D embed_dim   F feed-forward dim
"""

from dataclasses import dataclass

from torch import nn

from annotated_mpnet.fast.attention import AttentionName
from annotated_mpnet.mpnet.config import InputMode, ModelConfig, OptimizerName
from annotated_mpnet.training.muon import hidden_matrices
from annotated_mpnet.training.throughput import layer_shape, training_flops

BYTES_PER_WEIGHT = 16
"""Weight, gradient, and AdamW's two means, 4 bytes each."""


def means_bytes(model: nn.Module, optimizer: OptimizerName) -> int:
    """Return the bytes of the optimizer's means, of all ranks together: two, or one of Muon's.

    >>> layer = nn.Linear(100, 100, bias=False)
    >>> means_bytes(layer, "adamw"), means_bytes(layer, "muon")
    (80000, 40000)
    """
    one = 4 * sum(parameter.numel() for parameter in model.parameters())
    hidden = hidden_matrices(model).values() if optimizer == "muon" else ()
    return 2 * one - 4 * sum(matrix.numel() for matrix in hidden)


@dataclass(frozen=True)
class Workload:
    """A micro-batch, and how it is computed.

    Attributes:
        batch_size: B.
        length: L.
        num_predicted: P, per sequence.
        bf16: whether products run in bfloat16.
        on_gpu: whether sdpa has a fused kernel, which keeps no scores.
        recompute: gradient checkpointing.
    """

    model: ModelConfig
    input_mode: InputMode
    batch_size: int
    length: int
    num_predicted: int
    bf16: bool = False
    attention: AttentionName = "blocked"
    on_gpu: bool = False
    recompute: bool = False

    def flops(self) -> float:
        """Return the operations, forward and backward."""
        return training_flops(
            self.model, self.input_mode, self.batch_size, self.length, self.num_predicted
        )

    def activation_bytes(self) -> float:
        """Estimate the peak of memory, without weights, gradients and AdamW's means."""
        model, P = self.model, self.num_predicted
        queries, keys, pairs = layer_shape(self.input_mode, self.length, P)
        layer = self._layer_bytes(queries, keys, pairs)
        # Logits and their logarithms, or later the logarithms and the gradient, in float32. In
        # bfloat16 the product itself adds half a one.
        logits = P * model.vocab_size * (10 if self.bf16 else 8)
        copies = self._copies_bytes()
        if self.recompute:
            # The inputs of all layers, and one layer at a time in full, with the two temporaries of
            # the softmax's backward pass. The logits are gone before the first layer is recomputed,
            # and so are the copies of the other layers' weights.
            inputs = model.encoder_layers * queries * model.encoder_embed_dim * 4
            transient = 2 * model.encoder_attention_heads * pairs * 4 if self._is_eager else 0
            if layer + transient > logits:
                copies /= model.encoder_layers
            kept = inputs + max(layer + transient, logits)
        else:
            # The peak is at the start of the backward pass, when everything is there.
            last = self._layer_bytes(P, keys, P * keys)
            kept = (model.encoder_layers - 1) * layer + last + logits
        table = model.vocab_size * model.encoder_embed_dim * 4
        sample = kept + self._bias_bytes()
        # With a small batch and a large vocabulary, the peak is at the end of the backward pass.
        return max(self.batch_size * sample + table, 3 * table) + copies

    @property
    def _is_eager(self) -> bool:
        """Whether scores are computed by the formula: eager, or sdpa without a fused kernel."""
        return self.attention == "eager" or (self.attention == "sdpa" and not self.on_gpu)

    def _layer_bytes(self, queries: int, keys: int, pairs: int) -> float:
        """Return what the backward pass needs of a layer, per sample."""
        model = self.model
        D, F = model.encoder_embed_dim, model.encoder_ffn_dim
        size = 2 if self.bf16 else 4
        # 4 D + 2 F go into products, 2 D into norms; in bfloat16, a norm's output exists twice.
        entry = (4 * D + 2 * F) * size + (4 * D * 4 if self.bf16 else 2 * D * 4)
        entry += 2 * D * (model.dropout > 0) + F * (model.activation_dropout > 0)
        pair = 0
        if self.attention == "blocked":
            pair = size
        elif self._is_eager:
            # The softmax is computed in float32.
            pair = 4 * (3 if model.attention_dropout > 0 else 1)
        return queries * entry + keys * 2 * D * size + pairs * model.encoder_attention_heads * pair

    def _bias_bytes(self) -> float:
        """Return what a sample's own relative bias takes, with its gradient and its buckets."""
        if self.attention == "triton":
            return 0  # computed in the kernel
        # What does not depend on the sample's order has one bias for the whole batch.
        length, P = self.length, self.num_predicted
        own = {"mpnet": 2 * P * (length + P), "plm": (length + P) * length, "mlm": 0}
        # Per pair a number and its gradient for each head, and a bucket in 64 bits.
        return own[self.input_mode] * (2 * self.model.encoder_attention_heads * 4 + 8)

    def _copies_bytes(self) -> float:
        """Return the bytes of the bfloat16 copies of the weights that autocast makes."""
        model = self.model
        D, F = model.encoder_embed_dim, model.encoder_ffn_dim
        weights = model.encoder_layers * (4 * D * D + 2 * D * F) + model.vocab_size * D
        return 2.0 * weights if self.bf16 else 0.0
