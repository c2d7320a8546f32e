"""The numbers of a run: the network, the objective, the optimisation.

Defaults are those of MPNet-base. On the command line `encoder_layers` is `--encoder-layers`, and
the text below a field is its help. A `ModelConfig` checks its ranges when it is made:

>>> ModelConfig(encoder_layers=0)
Traceback (most recent call last):
ValueError: --encoder-layers is 0; expected a number >= 1 and <= 1000
"""

import dataclasses
import math
import operator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

T = TypeVar("T")

InputMode = Literal["mpnet", "mlm", "plm"]
ActivationName = Literal["gelu", "relu", "relu2", "silu", "tanh", "linear", "gelu_accurate"]
PositionEmbedding = Literal["learned", "sinusoidal"]
Packing = Literal["full", "none", "documents"]
OptimizerName = Literal["adamw", "muon"]
Schedule = Literal["polynomial", "cosine", "wsd"]
HeadBias = Literal["auto", "zeros", "frequencies"]
RelativeBiasInit = Literal["auto", "normal", "local"]


def option(
    default: T,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    aliases: tuple[str, ...] = (),
) -> T:
    """Declare a field with its range (never NaN or infinite) and other spellings of its flag.

    Upper bounds of counts are generous: they catch a number with a few zeros too many. Like
    `dataclasses.field`, this pretends to return the default, for type checkers.
    """
    bounds = {">=": at_least, ">": above, "<=": at_most, "<": below}
    given = {sign: bound for sign, bound in bounds.items() if bound is not None}
    return dataclasses.field(default=default, metadata={"bounds": given, "aliases": aliases})


def flag(name: str) -> str:
    """Return the spelling of a field on the command line."""
    return "--" + name.replace("_", "-")


def check_ranges(group: Any) -> None:
    """Raise a `ValueError` for the first field that is outside its range."""
    for each in dataclasses.fields(group):
        value, bounds = getattr(group, each.name), each.metadata.get("bounds", {})
        if isinstance(value, int | float) and bounds and not _within(value, bounds):
            wanted = " and ".join(f"{sign} {bound}" for sign, bound in bounds.items())
            raise ValueError(f"{flag(each.name)} is {value!s:.80}; expected a number {wanted}")


def _within(value: float, bounds: dict[str, float]) -> bool:
    compare = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}
    # `isfinite` cannot take a whole number of 400 digits.
    finite = isinstance(value, int) or math.isfinite(value)
    return finite and all(compare[sign](value, b) for sign, b in bounds.items())


@dataclass(frozen=True, kw_only=True)
class ArchitectureConfig:
    """The network: what a user chooses about it."""

    encoder_layers: int = option(12, at_least=1, at_most=1000)
    """Transformer layers. MPNet-base has 12. Time and memory grow in proportion."""
    encoder_embed_dim: int = option(768, at_least=1, at_most=65536)
    """Width of the hidden states, D; a multiple of --encoder-attention-heads. A layer has about 12
    D^2 weights: 7.1 million at 768."""
    encoder_ffn_dim: int = option(3072, at_least=1, at_most=1048576)
    """Width of the feed-forward layer, usually four times the hidden width. It then has two thirds
    of a layer's weights and does three fifths of its work."""
    encoder_attention_heads: int = option(12, at_least=1, at_most=1024)
    """Attention heads, which share the hidden width, usually 64 dimensions per head. More heads do
    not add weights."""
    dropout: float = option(0.1, at_least=0, below=1)
    """Probability of dropping a hidden unit, after the embeddings and each sub-layer (BERT: 0.1). 0
    is faster, much faster on a CPU, and enough where the text is too large to be memorised."""
    attention_dropout: float = option(0.1, at_least=0, below=1)
    """Probability of dropping an attention weight: the query then does not see that key in that
    head and layer. See --dropout."""
    activation_dropout: float = option(0.1, at_least=0, below=1)
    """Probability of dropping a unit inside the feed-forward layer, after the activation. See
    --dropout."""
    activation_fn: ActivationName = option("gelu", aliases=("-activation",))
    """Activation of the feed-forward layers and of the LM head. Hugging Face's MPNet can only
    represent gelu (the exact one, by erf). gelu_accurate is fairseq's name for the tanh
    approximation."""
    normalize_before: bool = option(False, aliases=("-prenorm",))
    """Normalise the input of each sub-layer (pre-norm) instead of its output (post-norm, the
    paper). Deep networks train more stably this way and need less warm-up. Hugging Face's MPNet
    cannot represent it."""
    position_embedding: PositionEmbedding = "learned"
    """Absolute positions: a learned table (the paper), or fixed sinusoids, which have no weights
    and which Hugging Face's MPNet cannot represent. The relative position bias is added in both
    cases."""
    relative_attention_num_buckets: int = option(
        32, at_least=0, at_most=4096, aliases=("-num_buckets",)
    )
    """Buckets of the relative position bias, half of them for each direction: an even number of at
    least 4, or 0 for no bias. 32 is T5's number and the only one that Hugging Face's MPNet can
    represent. Long sequences do not change it (annotated-mpnet rescales it)."""
    relative_attention_max_distance: int = option(128, at_least=2, at_most=1048576)
    """Distance in tokens up to which the buckets grow logarithmically; all longer distances share
    the last one. 128 is T5's number and the only one that Hugging Face's MPNet can represent."""
    layer_norm_eps: float = option(1e-5, above=0, at_most=1)
    """Added to the variance in LayerNorm, which avoids a division by zero. 1e-5 is fairseq's value
    and that of the released weights."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig(ArchitectureConfig):
    """The complete network: the architecture and what the tokenizer and the text add to it."""

    vocab_size: int = option(30527, at_least=5)
    """Rows of the token embedding, V. 30,527 is MPNet's: BERT's 30,522 and five special tokens."""
    max_positions: int = option(512, at_least=1, at_most=1048576)
    """Positions in the position table. Longer sequences are refused."""
    pad_token_id: int = option(1, at_least=0)
    """Id of the padding token. Its embedding is zero, and positions start at the next row."""
    mask_token_id: int = option(4, at_least=0)
    """Id of the mask token, which the network itself needs only in `plm` mode, for the queries. A
    run takes it from its tokenizer; 4 is the id in Microsoft's reference vectors."""

    def __post_init__(self) -> None:
        check_ranges(self)
        check_architecture(self)
        if self.pad_token_id >= self.vocab_size:
            raise ValueError(
                f"pad_token_id is {self.pad_token_id}; expected less than vocab_size "
                f"{self.vocab_size}"
            )


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The objective: which tokens are predicted, and what replaces them in the input."""

    input_mode: InputMode = "mpnet"
    """mpnet: masked and permuted, the paper's objective. mlm: BERT's masked language modelling, at
    about three quarters of the work. plm: XLNet's permuted language modelling. Network and
    predicted tokens are the same in all three, so the objectives can be compared."""
    pred_prob: float = option(0.15, above=0, below=1)
    """Share of the predictable tokens of each sequence that is predicted (paper: 15 %), at least
    one. Predicting more teaches more per sequence, but leaves less to predict from."""
    keep_prob: float = option(0.1, at_least=0, at_most=1)
    """Probability that a predicted token stays as it is in the input (paper: 10 %): the network
    cannot assume that a token that is not masked needs no prediction."""
    rand_prob: float = option(0.1, at_least=0, at_most=1)
    """Probability that a predicted token is replaced by a random one (paper: 10 %): the network
    cannot assume that an unmasked token is correct. The rest (80 %) become masks."""
    whole_word_mask: bool = True
    """Predict whole words, because one piece of a word gives away the others (paper: yes). At most
    one word of a sequence is cut, where the 15 % end."""


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig:
    """The optimisation: batch, learning rate, optimizer."""

    batch_size: int = option(16, at_least=1, at_most=1048576)
    """Sequences per device and micro-batch: as many as fit into memory. An update sees batch-size x
    update-freq x devices sequences. Without dropout, smaller and more micro-batches give the same
    gradient to rounding."""
    update_freq: int = option(8, at_least=1, at_most=1048576, aliases=("-gc_steps",))
    """Micro-batches per update (gradient accumulation). An update sees batch-size x update-freq x
    devices sequences; in the paper, 8192."""
    total_updates: int = option(10000, at_least=1, at_most=10**9)
    """Updates of the whole run, including those before a resume. The learning rate schedule ends
    there. The paper: 500000."""
    optimizer: OptimizerName = "adamw"
    """What turns gradients into steps. adamw: the paper's. muon: the matrices inside of the network
    step along all directions of their gradient alike, and all else is left to AdamW
    (training/muon.py)."""
    lr: float = option(6e-4, above=0, at_most=1)
    """Peak learning rate, reached at the end of the warm-up: about the step that each weight takes
    in an update. The paper's for 8192 sequences; smaller batches and larger networks want less,
    tiny networks more (3e-3 in the preset demo)."""
    muon_lr: float | None = option(None, above=0, at_most=1)
    """Peak learning rate of the matrices with --optimizer muon; it rises and falls as --lr, which
    all else keeps. Default: twice --lr."""
    end_learning_rate: float = option(0.0, at_least=0, at_most=1, aliases=("-end_lr",))
    """Learning rate that the decay reaches one update after the last."""
    schedule: Schedule = "polynomial"
    """How the learning rate falls after the warm-up. polynomial: to the end, in a straight line
    (paper). cosine: to the end, slowly at first and at last. wsd (warm-up, stable, decay): it stays
    at the peak and falls in the last --decay-updates, so a run can be extended or branched from its
    stable part."""
    decay_updates: int | None = option(None, at_least=1, at_most=10**9)
    """Updates of the decay of --schedule wsd. Default: 20 % of --total-updates."""
    power: float = option(1.0, above=0, at_most=100)
    """Exponent of the decay of polynomial and wsd. 1 is a straight line; 2 falls fast at first and
    slowly at the end."""
    warmup_updates: int | None = option(None, at_least=0, at_most=10**9, aliases=("-warmup_steps",))
    """Updates of linear warm-up, while AdamW's averages are still poor and large steps would be
    harmful. Default: 10 % of --total-updates."""
    beta1: float = option(0.9, at_least=0, below=1)
    """AdamW: decay of the mean of the gradients. 0.9 remembers about 10 updates."""
    beta2: float = option(0.98, at_least=0, below=1)
    """AdamW: decay of the mean of the squared gradients. 0.98 (paper, RoBERTa) remembers 50 updates
    and forgets a burst of large gradients sooner than 0.999, which remembers 1000."""
    adam_eps: float = option(1e-6, above=0, at_most=1)
    """AdamW: added to the root of the mean square (paper: 1e-6). It keeps a weight with hardly any
    gradient from taking full steps of noise."""
    weight_decay: float = option(0.01, at_least=0, at_most=1, aliases=("-wd",))
    """AdamW: decay per unit of learning rate (paper: 0.01): an update at rate lr takes the share lr
    x weight-decay off each weight. Biases and norms are exempt."""
    head_bias: HeadBias = "auto"
    """Initial bias of the LM head: zeros (the original), or the logarithm of each token's frequency
    in the training text. With frequencies, the loss starts where guessing by frequency ends, which
    saves hundreds of updates: much in a short run, nothing in a long one. auto: frequencies in a
    fresh head, if there is text to count; a head that is loaded keeps its bias."""
    relative_bias_init: RelativeBiasInit = "auto"
    """Initial relative position bias. local: a quarter of the heads prefer the left neighbour and a
    quarter the right one at first. This ends the plateau that short runs get stuck on, and training
    can change it. normal: N(0, 0.02) for all heads, as in the paper. auto: local, if the model has
    a relative position bias. No effect on weights that are loaded."""
    clip_grad_norm: float = option(1.0, at_least=0, at_most=10**9, aliases=("-grad_clip",))
    """Maximum norm of the gradient over all parameters; longer gradients are scaled down, which
    limits the damage of one bad batch. 0: off."""

    @property
    def effective_warmup_updates(self) -> int:
        """Updates of warm-up, with the default worked out."""
        return self.total_updates // 10 if self.warmup_updates is None else self.warmup_updates

    @property
    def first_decay_update(self) -> int:
        """The update, from 0, in which the learning rate begins to fall."""
        if self.schedule != "wsd":
            return self.effective_warmup_updates
        decay = self.decay_updates
        return self.total_updates - (self.total_updates // 5 if decay is None else decay)


def check_architecture(group: ArchitectureConfig) -> None:
    """Raise a `ValueError` for numbers that do not fit together."""
    width, heads = group.encoder_embed_dim, group.encoder_attention_heads
    if width % heads != 0:
        raise ValueError(
            f"--encoder-embed-dim is {width}, not a multiple of --encoder-attention-heads {heads}"
        )
    # Each direction has half of the buckets, and half of those hold one distance each.
    buckets, longest = group.relative_attention_num_buckets, group.relative_attention_max_distance
    if buckets % 2 != 0 or buckets == 2:
        raise ValueError(
            f"--relative-attention-num-buckets is {buckets}; expected an even number of at least "
            "4, or 0 for no bias"
        )
    if buckets // 4 >= longest:
        raise ValueError(
            f"--relative-attention-max-distance is {longest}; expected more than {buckets // 4}, "
            "the number of distances that have a bucket of their own"
        )
    # The command line checks these two, but not everyone comes from there.
    for name, kind in (
        ("activation_fn", ActivationName),
        ("position_embedding", PositionEmbedding),
    ):
        value, choices = getattr(group, name), get_args(kind)
        if value not in choices:
            raise ValueError(f"{flag(name)} is {value!r}; expected one of {', '.join(choices)}")
