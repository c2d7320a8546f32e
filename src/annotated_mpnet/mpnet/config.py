"""The numbers that a run is made of: the network, the objective, the optimisation.

A field is one number; its docstring says what it is and why it has its default. The ranges are
checked when a `ModelConfig` is made:

>>> ModelConfig(encoder_layers=0)
Traceback (most recent call last):
ValueError: --encoder-layers is 0; expected a number >= 1 and <= 1000

Defaults are those of MPNet-base. On the command line each field is a flag, `encoder_layers` is
`--encoder-layers`, and the docstring is its help.

Next: `batch.py`.
"""

import dataclasses
import math
import operator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

T = TypeVar("T")

InputMode = Literal["mpnet", "mlm", "plm"]
ActivationName = Literal["gelu", "relu", "relu2", "silu", "tanh", "linear", "gelu_accurate"]
PositionEmbedding = Literal["learned", "sinusoidal"]
Packing = Literal["full", "none", "documents"]
HeadBias = Literal["zeros", "frequencies"]
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
    """Declare a field with its range and the other spellings of its flag.

    `at_least` and `at_most` belong to the range, `above` and `below` do not. A range also excludes
    `nan` and the infinities. The outer bounds of counts are generous: they are there to catch a
    number with some zeros too many, before it asks for a terabyte.

    The type of the default is returned, though what comes back is a dataclass field: so says
    `dataclasses.field` itself, and so a type checker still sees `lr: float = option("x")`.
    """
    bounds = {">=": at_least, ">": above, "<=": at_most, "<": below}
    given = {sign: bound for sign, bound in bounds.items() if bound is not None}
    return dataclasses.field(default=default, metadata={"bounds": given, "aliases": aliases})


def flag(name: str) -> str:
    """Return the spelling of a field on the command line.

    >>> flag("encoder_ffn_dim")
    '--encoder-ffn-dim'
    """
    return "--" + name.replace("_", "-")


def check_ranges(group: Any) -> None:
    """Raise a `ValueError` for a field that is outside its range.

    The first one, in the order of the fields: one clear line is easier to mend than a list.
    """
    for each in dataclasses.fields(group):
        value = getattr(group, each.name)
        bounds = each.metadata.get("bounds", {})
        if isinstance(value, int | float) and bounds and not _within(value, bounds):
            wanted = " and ".join(f"{sign} {bound}" for sign, bound in bounds.items())
            raise ValueError(f"{flag(each.name)} is {value}; expected a number {wanted}")


def _within(value: float, bounds: dict[str, float]) -> bool:
    """Return whether a number keeps all bounds of its range.

    >>> [_within(value, {">": 0, "<=": 1}) for value in (0, 0.5, 1, math.nan)]
    [False, True, True, False]
    """
    compare = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}
    return math.isfinite(value) and all(compare[sign](value, b) for sign, b in bounds.items())


@dataclass(frozen=True, kw_only=True)
class ArchitectureConfig:
    """The network: what a user chooses about it."""

    # Its size first, then what keeps it from learning by heart, then its kind. The vocabulary is
    # the tokenizer's, and so joins in `ModelConfig` only.

    encoder_layers: int = option(12, at_least=1, at_most=1000)
    """Transformer layers. MPNet-base has 12. Time and memory grow in proportion."""
    encoder_embed_dim: int = option(768, at_least=1, at_most=65536)
    """Width of the hidden states, D. A multiple of --encoder-attention-heads. A layer has about 12
    D^2 weights: 7.1 million at 768."""
    encoder_ffn_dim: int = option(3072, at_least=1, at_most=1048576)
    """Width of the feed-forward layer; by custom four times the hidden width. It holds two thirds
    of a layer's weights then, and does three fifths of its work."""
    encoder_attention_heads: int = option(12, at_least=1, at_most=1024)
    """Attention heads, among which the hidden width is shared out; 64 dimensions a head is the
    custom. More heads make no more weights."""
    dropout: float = option(0.1, at_least=0, below=1)
    """Probability that a hidden unit is dropped, after each sub-layer and the embeddings. 0.1 is
    BERT's. 0 is faster, on a CPU by far, and what recent encoders use where there is more text than
    updates, so that nothing is seen often enough to be learned by heart."""
    attention_dropout: float = option(0.1, at_least=0, below=1)
    """Probability that an attention weight is dropped: a row then does not see that key, in that
    head and layer. See --dropout."""
    activation_dropout: float = option(0.1, at_least=0, below=1)
    """Probability that a unit inside the feed-forward layer is dropped, behind the non-linearity.
    See --dropout."""
    activation_fn: ActivationName = option("gelu", aliases=("-activation",))
    """Non-linearity of the feed-forward layers and of the LM head. Hugging Face can represent only
    gelu (the exact one, by erf); gelu_accurate is fairseq's name for the tanh approximation."""
    normalize_before: bool = option(False, aliases=("-prenorm",))
    """Normalise the input of each sub-layer (pre-norm) instead of its output (post-norm, the
    paper). Trains deeper networks more stably, and with less warm-up; Hugging Face cannot represent
    it."""
    position_embedding: PositionEmbedding = "learned"
    """Absolute positions: a learned table (the paper), or fixed sinusoids, which have no weights
    and which Hugging Face cannot represent. The relative position bias comes on top of either."""
    relative_attention_num_buckets: int = option(
        32, at_least=0, at_most=4096, aliases=("-num_buckets",)
    )
    """Buckets of the relative position bias, half of them for each direction; even, and 4 at least.
    0 switches the bias off. 32 is T5's number and the only one that Hugging Face can represent.
    Never rescaled behind your back for long sequences (annotated-mpnet does)."""
    relative_attention_max_distance: int = option(128, at_least=2, at_most=1048576)
    """Distance in tokens from which on all positions share the last bucket at the latest; the
    buckets are logarithmic up to there. 128 is T5's number and the only one that Hugging Face can
    represent."""
    layer_norm_eps: float = option(1e-5, above=0, at_most=1)
    """Added to the variance in LayerNorm, so that a row without any can be divided by it. 1e-5 is
    fairseq's and that of the released weights."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig(ArchitectureConfig):
    """The network in plain numbers, complete: the architecture and what the tokenizer adds to
    it."""

    vocab_size: int = option(30527, at_least=5)
    """Rows of the token embedding, V. 30,527 is MPNet's: BERT's 30,522 and five special tokens."""
    max_positions: int = option(512, at_least=1, at_most=1048576)
    """Positions that the network can tell apart. The table has `pad_token_id + 1` rows more, and
    ends there: a longer row is refused. The relative bias knows no such end."""
    pad_token_id: int = option(1, at_least=0)
    """Id of the padding token; as an input it is zero. Positions start at the row after it."""
    mask_token_id: int = option(4, at_least=0)
    """Id of the mask token; the network itself needs it only in `plm` mode, where every query row
    starts as a mask. A run takes it from its tokenizer; the default is the first id behind `<s>
    <pad> </s> <unk>`, which is its place in Microsoft's reference vectors."""

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be a network."""
        check_ranges(self)
        check_architecture(self)


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The objective: which tokens are predicted, and what stands in for them."""

    input_mode: InputMode = "mpnet"
    """mpnet: masked and permuted, the paper's. mlm: BERT's masked language modelling. plm: XLNet's
    permuted language modelling. The same network and the same predicted tokens in each, so that the
    objectives can be compared. mlm is about three quarters of the work of mpnet."""
    pred_prob: float = option(0.15, above=0, below=1)
    """Share of the predictable tokens of each row that is predicted (paper: 15 %). More gives more
    to learn from a row, and less to predict it from. At least one token of a row is predicted."""
    keep_prob: float = option(0.1, at_least=0, at_most=1)
    """Probability that a predicted token's stand-in is the token itself (paper: 10 %), so that the
    network cannot take a plain token for one that need not be looked at."""
    rand_prob: float = option(0.1, at_least=0, at_most=1)
    """Probability that its stand-in is a random token (paper: 10 %), so that the network cannot
    trust a plain token blindly. The rest are masks (80 %)."""
    whole_word_mask: bool = True
    """Predict whole words: no piece of a word may give away the others (paper: yes). At most one
    word of a row is cut, where the 15 % end."""


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig:
    """The optimisation: batch, learning rate, AdamW."""

    batch_size: int = option(16, at_least=1, at_most=1048576)
    """Sequences per device and micro-batch: as many as fit into memory. An update sees batch-size x
    update-freq x devices sequences. Smaller micro-batches and more of them predict the same tokens
    of the same sequences. Without dropout the gradient is the same too, to rounding; dropout draws
    new masks for each micro-batch."""
    update_freq: int = option(8, at_least=1, at_most=1048576, aliases=("-gc_steps",))
    """Micro-batches per update. One update sees batch-size x update-freq x devices sequences; the
    paper's saw 8192."""
    total_updates: int = option(10000, at_least=1, at_most=10**9)
    """Updates of the whole run, those before a resume included; the learning rate ends with them.
    The paper: 500000."""
    lr: float = option(6e-4, above=0, at_most=1)
    """Peak learning rate, reached at the end of the warm-up: about the step that each weight takes
    in an update. The paper's for 8192 sequences; smaller batches and larger networks want less,
    tiny networks more (3e-3 in the preset demo)."""
    end_learning_rate: float = option(0.0, at_least=0, at_most=1, aliases=("-end_lr",))
    """Learning rate that the decay arrives at, one update after the last."""
    power: float = option(1.0, above=0, at_most=100)
    """Exponent of the polynomial decay; 1 is a straight line, 2 falls fast first and slowly at the
    end."""
    warmup_updates: int | None = option(None, at_least=0, at_most=10**9, aliases=("-warmup_steps",))
    """Updates of linear warm-up, while AdamW's means know little and large steps would go anywhere.
    Default: 10 % of --total-updates."""
    beta1: float = option(0.9, at_least=0, below=1)
    """AdamW: decay of the mean of the gradients. 0.9 remembers about 10 updates."""
    beta2: float = option(0.98, at_least=0, below=1)
    """AdamW: decay of the mean of their squares. 0.98 (paper; 50 updates) rather than 0.999 (1000
    updates), as in RoBERTa: it forgets a burst of large gradients sooner."""
    adam_eps: float = option(1e-6, above=0, at_most=1)
    """AdamW: added to the root of the mean square, so that a weight with hardly any gradient does
    not take a full step of noise (paper: 1e-6)."""
    weight_decay: float = option(0.01, at_least=0, at_most=1, aliases=("-wd",))
    """AdamW: decay per unit of learning rate (paper: 0.01): an update at rate lr takes the share lr
    x weight-decay off each weight. Biases and norms are exempt."""
    head_bias: HeadBias = "zeros"
    """Initial bias of the LM head: zeros (the original), or the logarithm of each token's frequency
    in the training text. The latter starts a run on the unigram plateau, instead of spending its
    first hundreds of updates on the way there: the difference between minutes and hours for a small
    model on a small machine, and nothing that a long run would notice."""
    relative_bias_init: RelativeBiasInit = "auto"
    """Initial relative position bias. local: a quarter of the heads starts with a preference for
    the left neighbour, a quarter for the right one, the rest without any. It ends the plateau on
    which short runs stay; training is free to change it. normal: N(0, 0.02) for all heads, as in
    the paper. auto: local, if the model has a relative position bias. No effect on weights that are
    loaded."""
    clip_grad_norm: float = option(1.0, at_least=0, at_most=10**9, aliases=("-grad_clip",))
    """Longest gradient (Euclidean norm over all parameters); longer ones are scaled down, so that
    one bad batch cannot throw the network far off. 0: off."""

    @property
    def effective_warmup_updates(self) -> int:
        """Updates of warm-up, with the default worked out."""
        if self.warmup_updates is None:
            return self.total_updates // 10
        return self.warmup_updates


def check_architecture(group: ArchitectureConfig) -> None:
    """Raise a `ValueError` for numbers that do not fit together."""
    _refuse_if(
        group.encoder_embed_dim % group.encoder_attention_heads != 0,
        f"--encoder-embed-dim is {group.encoder_embed_dim}, not a multiple of "
        f"--encoder-attention-heads {group.encoder_attention_heads}: the heads share it",
    )
    # Each direction has half of the buckets, and half of those are exact, one distance each. With
    # two buckets in all, none would be exact and none logarithmic.
    buckets = group.relative_attention_num_buckets
    _refuse_if(
        buckets % 2 != 0 or buckets == 2,
        f"--relative-attention-num-buckets is {buckets}; expected an even number from 4 on "
        "(each direction has half of them, a part of which is logarithmic), or 0 for no bias",
    )
    exact = buckets // 4
    _refuse_if(
        exact >= group.relative_attention_max_distance,
        "--relative-attention-max-distance is "
        f"{group.relative_attention_max_distance}; expected more than {exact}, "
        "the distances that have a bucket of their own already",
    )
    # The command line has checked these two. Whoever builds the network in Python, or from the
    # configuration of another program, comes here without.
    for name, choices in (
        ("activation_fn", ActivationName.__args__),  # type: ignore[attr-defined]
        ("position_embedding", PositionEmbedding.__args__),  # type: ignore[attr-defined]
    ):
        value = getattr(group, name)
        if value not in choices:
            raise ValueError(f"{flag(name)} is {value!r}; expected one of {', '.join(choices)}")


def _refuse_if(wrong: bool, message: str) -> None:
    if wrong:
        raise ValueError(message)
