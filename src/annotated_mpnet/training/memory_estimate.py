"""How much memory an update will take, estimated before there is one.

Three parts, of which the first is exact and does not grow with the batch:

    weights, gradients, AdamW's two means    4 x 4 bytes for each weight, all in float32
    what the backward pass needs             per row that goes through a layer, and per score
    logits                                   predicted rows x vocabulary, twice, in float32

>>> weights = 109_518_527  # MPNet-base, counted in `modeling/pretraining.py`
>>> print(f"{weights * BYTES_PER_WEIGHT / 1e9:.2f} GB")
1.75 GB

**In the CPU's memory**, on rank 0, lies a copy of what a checkpoint is made of: weights and means,
without gradients (`saving.py`). For a GPU that is other memory; on a CPU it comes on top. In GB,
with and without the state of the optimizer:

>>> [round(weights * copied_bytes(with_optimizer) / 1e9, 2) for with_optimizer in (True, False)]
[1.31, 0.44]

**A row in a layer** is D wide, and F inside the feed-forward part. Follow it in the code of
`SentenceEncoderLayer.forward`, asking of each operation what its gradient is computed from:

    in_proj      what came in                       D   (what the last layer's norm put out)
    attention    the query                          D
    out_proj     what attention gathered            D
    first norm   the sum of old and gathered        D
    fc1          what the norm put out              D
    activation   the inner row                          F
    fc2          the inner row behind it                F
    second norm  the sum of old and thought         D
                                                    6 D + 2 F numbers

A row that answers leaves a key and a value, 2 D. Dropout keeps a byte for each number, in two
places of width D and one of width F. A score is kept by the softmax, twice more by a dropout behind
it; `blocked` attention keeps it alone, and a fused kernel keeps none, and computes it once more on
the way back.

For a sentence of 512 tokens in MPNet-base, 664 rows ask, 588 answer, and there are 351,520 pairs.
In a layer, and in float32, they keep, in MB:

>>> rows, keys, pairs = layer_shape("mpnet", 512, 76)
>>> D, F, heads = 768, 3072, 12
>>> kept = 4 * rows * (6 * D + 2 * F), 4 * keys * 2 * D, rows * (2 * D + F)
>>> [round(bytes / 1e6, 1) for bytes in kept]                       # rows, keys and values, dropout
[28.6, 3.6, 3.1]
>>> [round(heads * pairs * bytes / 1e6, 1) for bytes in (3 * 4, 4, 0)]  # eager, blocked, fused
[50.6, 16.9, 0.0]

**In bfloat16** what goes into a product has half the size; the sums and what the norms put out stay
in float32, and have a copy for the product. Weights have a copy too, as long as the pass lasts.

**The rest**: what each sample has as a relative bias of its own, with its gradient; and the
gradient of the token table, which is as large as the table and for a moment there three times: from
the head, from the embedding, and their sum.

For MPNet-base and a micro-batch of 16 rows, in GB: by the formula, blocked, with a fused kernel;
with that in bfloat16 too, and with gradient checkpointing.

>>> def gb(attention="sdpa", **how):
...     shape = {"batch_size": 16, "length": 512, "num_predicted": 76}
...     work = Workload(ModelConfig(), "mpnet", **shape, attention=attention, **how)
...     return round(work.activation_bytes() / 1e9, 1)
>>> gb("eager"), gb("blocked"), gb(on_gpu=True)
(15.9, 9.9, 6.9)
>>> gb(on_gpu=True, bf16=True), gb(on_gpu=True, bf16=True, recompute=True)
(5.3, 1.3)

**How good is it?** Measured against the most that tensors really take on a CPU, at several shapes
and in all modes, it is right within a factor of 1.5 (`tests/test_plan.py`). With CUDA's fused
attention it has not been measured; and PyTorch's cache, CUDA's own memory, Python and its libraries
come on top, half a gigabyte or more. If it was wrong, `memory.py` says what to do.

Next: `plan.py`, which says it.

    L tokens of a row   P predicted tokens   D embed_dim   F feed-forward dim
"""

from dataclasses import dataclass

from annotated_mpnet.config import InputMode, ModelConfig
from annotated_mpnet.modeling.attention import AttentionName
from annotated_mpnet.training.throughput import layer_shape, training_flops

BYTES_PER_WEIGHT = 16
"""Weight, gradient, and AdamW's two means, 4 bytes each."""


def copied_bytes(with_optimizer: bool) -> int:
    """Return the bytes a weight that a checkpoint is copied into before it is written."""
    return 12 if with_optimizer else 4


@dataclass(frozen=True)
class Workload:
    """A micro-batch, and how it is computed: what its work and its memory are functions of.

    Attributes:
        model: the network.
        input_mode: the objective.
        batch_size: B.
        length: L.
        num_predicted: P of a row.
        bf16: whether products run in bfloat16.
        attention: the way to compute it (`modeling/attention.py`).
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
        """Estimate the memory that it takes at the most, beside weights, gradients and AdamW."""
        model, P = self.model, self.num_predicted
        asking, answering, pairs = layer_shape(self.input_mode, self.length, P)
        layer = self._layer_bytes(asking, answering, pairs)
        # Each predicted row's logits and their logarithms, or, a moment later, the logarithms and
        # the gradient. Both are in float32; in bfloat16 the product makes a third of half the size.
        logits = P * model.vocab_size * (10 if self.bf16 else 8)
        if self.recompute:
            # The inputs of all layers, and one layer at a time in full. The way back of a softmax
            # takes two more of its size; without checkpointing, the layers that are done by then
            # have left room for that. The logits are gone before the first layer comes back.
            inputs = model.encoder_layers * asking * model.encoder_embed_dim * 4
            formula = self.attention == "eager" or (self.attention == "sdpa" and not self.on_gpu)
            transient = 2 * model.encoder_attention_heads * pairs * 4 if formula else 0
            kept = inputs + max(layer + transient, logits)
        else:
            # Everything is there when the way back begins: that is the peak.
            last = self._layer_bytes(P, answering, P * answering)
            kept = (model.encoder_layers - 1) * layer + last + logits
        table = model.vocab_size * model.encoder_embed_dim * 4
        sample = kept + self._bias_bytes()
        # The table's gradient from the head exists from the beginning of the way back; at its end,
        # when all else is gone, that from the embedding joins it, and their sum. With a small batch
        # and a large vocabulary, that is the peak.
        return max(self.batch_size * sample + table, 3 * table) + self._copies_bytes()

    def _layer_bytes(self, asking: int, answering: int, pairs: int) -> float:
        """Return what the backward pass needs of a layer, for one sample."""
        model = self.model
        D, F = model.encoder_embed_dim, model.encoder_ffn_dim
        size = 2 if self.bf16 else 4
        # The table of the chapter: 4 D + 2 F go into products, and 2 D into norms. With bfloat16,
        # what the two norms put out is there in both types.
        row = (4 * D + 2 * F) * size + (4 * D * 4 if self.bf16 else 2 * D * 4)
        # A byte says whether a number was dropped.
        row += 2 * D * (model.dropout > 0) + F * (model.activation_dropout > 0)
        return asking * row + answering * 2 * D * size + pairs * self._pair_bytes(size)

    def _pair_bytes(self, size: int) -> int:
        """Return what is kept of a pair of a row that asks and one that answers, in all heads."""
        heads, drops = self.model.encoder_attention_heads, self.model.attention_dropout > 0
        if self.attention == "blocked":
            return heads * size
        if self.attention == "triton" or (self.attention == "sdpa" and self.on_gpu):
            return 0
        # In float32 whatever the precision is: the softmax is computed in it.
        return heads * 4 * (3 if drops else 1)

    def _bias_bytes(self) -> float:
        """Return what a sample's own relative bias takes, its gradient and its buckets."""
        if self.attention == "triton":
            return 0  # a rule, of a few numbers for each row and key
        # The sentence's block has one bias for the whole batch, which is nothing beside the rest.
        # The staircase, and all of `plm`, have one for each sample, because their order differs.
        length, P = self.length, self.num_predicted
        own = {"mpnet": 2 * P * (length + P), "plm": (length + P) * length, "mlm": 0}
        # For each pair a number and its gradient for each head, and the 64-bit number of a bucket.
        return own[self.input_mode] * (2 * self.model.encoder_attention_heads * 4 + 8)

    def _copies_bytes(self) -> float:
        """Return the bfloat16 copies of the weights, which autocast makes in each pass."""
        model = self.model
        D, F = model.encoder_embed_dim, model.encoder_ffn_dim
        weights = model.encoder_layers * (4 * D * D + 2 * D * F) + model.vocab_size * D
        return 2.0 * weights if self.bf16 else 0.0
