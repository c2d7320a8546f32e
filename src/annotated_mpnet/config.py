"""Every hyperparameter: what it is, why it has its default, what values make sense.

A field of these dataclasses is a flag of `pretrain-mpnet` (`--encoder-layers` is `encoder_layers`),
and its docstring is that flag's help. Default, meaning and range are written here and nowhere else:
parser and help, the check of ranges, the TOML files, and other spellings are made of these lines.

>>> each = {each.name: each for _, each in fields_of(PretrainingConfig())}["weight_decay"]
>>> flag(each.name), each.default, each.metadata["bounds"], each.metadata["aliases"]
('--weight-decay', 0.01, {'>=': 0, '<=': 1}, ('-wd',))

The groups follow the paper (Song, Tan, Qin, Lu, Liu: "MPNet: Masked and Permuted Pre-training for
Language Understanding", arXiv 2004.09297): the network (section 2.3), the objective (2.1 to 2.3),
the optimisation (3.1); then what a paper does not need: text, the run's directory, the machine.

Defaults are MPNet-base. Where annotated-mpnet, whose command lines work here too, has another
default, the docstring says so.

**What is checked, and when.** A range belongs to one field and stands beside it. What two fields
must be to one another is in `validate` and `_check_architecture`. Both run before any text is read
or any network built, and name the flag, the value and what would have been right, because a wrong
flag that is found after an hour of tokenising has cost an hour:

>>> PretrainingConfig(optimization=OptimizationConfig(lr=-1.0)).validate()
Traceback (most recent call last):
annotated_mpnet.errors.ConfigError: --lr is -1.0; expected a number > 0 and <= 1

This module imports nothing but the standard library, so that `--help` answers at once.

Next: `batch.py`, then `modeling/two_stream.py`, where MPNet itself begins.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from annotated_mpnet.errors import ConfigError
from annotated_mpnet.options import check_ranges, flag, option

InputMode = Literal["mpnet", "mlm", "plm"]
ActivationName = Literal["gelu", "relu", "relu2", "silu", "tanh", "linear", "gelu_accurate"]
PositionEmbedding = Literal["learned", "sinusoidal"]
Packing = Literal["full", "none", "documents"]
HeadBias = Literal["zeros", "frequencies"]
RelativeBiasInit = Literal["auto", "normal", "local"]
Attention = Literal["auto", "sdpa", "triton", "blocked", "eager"]


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
        check(self)


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


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text: where it comes from and how it becomes rows of tokens."""

    train_dir: Path | None = None
    """Training text: a directory, searched recursively, or one file. `.txt` and `.txt.gz` hold a
    document per line, `.jsonl`, `.parquet` and `.csv` one per row (--text-field). UTF-8."""
    valid_file: Path | None = None
    """Text for validation during the run: a file or a directory, read as --train-dir is. Its loss
    decides which model is the best."""
    test_file: Path | None = None
    """Text for the one test at the end of the run: a file or a directory."""
    valid_fraction: float = option(0.0, at_least=0, below=1)
    """Share of the training documents that is held out for validation, chosen by a hash of their
    text, so that no copy of a held-out document is trained on. Only without --valid-file."""
    dataset_name: str | None = None
    """Dataset to train on, from the Hub (streamed) or a folder of data files. Default:
    HuggingFaceFW/fineweb-edu when no files are given. Excludes --train-dir; an empty name beside it
    means none, as in old commands."""
    dataset_config: str | None = None
    """Configuration (subset) of the dataset, for those that have several."""
    dataset_split: str = "train"
    """Split of the dataset to train on."""
    dataset_revision: str | None = None
    """Commit, tag or branch of the dataset. Default: the newest; the commit is recorded, so that a
    resumed run reads the same text though the dataset has moved on."""
    text_field: str = "text"
    """Column that holds the text, in datasets and in files with columns."""
    streaming: bool = True
    """Read a dataset as it comes, without storing it. --no-streaming downloads it first, and packs
    it like local files: then any row is reached at once, and the shuffle is a global one."""
    buffer_size: int = option(10000, at_least=1, at_most=10**8)
    """Packed rows that a stream shuffles among; they are part of each checkpoint (20 MB for 10000
    rows of 512 tokens). More shuffles better, over a dataset that is sorted by source or topic."""
    eval_samples: int = option(500, at_least=0, at_most=10**8)
    """Documents taken from a stream for validation, and as many for the test, by a hash of their
    text; training never sees them, nor copies of them."""
    min_text_length: int = option(64, at_least=0, at_most=10**9)
    """Shorter documents of a dataset (characters) are dropped and counted. Local files keep all."""
    packing: Packing = "full"
    """full: rows are filled across the ends of documents. none: one document a row, long ones go on
    in further rows, padded to the longest of the batch. documents: whole documents share a row, and
    do not see each other."""
    tokenizer_name: str = "microsoft/mpnet-base"
    """Hub name or directory of the tokenizer. Its vocabulary decides how large the network's is."""
    max_tokens: int = option(512, at_least=4, at_most=1048576)
    """Tokens of a row, `<s>` and `</s>` included (paper: 512). A row of twice the length costs more
    than two, because attention grows with its square; short rows train faster and see less."""
    max_positions: int | None = option(None, at_least=4, at_most=1048576)
    """Rows of the position table, for training longer sequences later. Default: --max-tokens."""
    num_workers: int = option(0, at_least=0, at_most=1024)
    """Processes that tokenise the text. They change how fast the first batch comes, never what is
    trained on. 0: as many as there are processors, when the text is large enough to gain by it."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run: its directory, what is saved in it, how it begins and goes on."""

    checkpoint_dir: Path = Path("checkpoints")
    """The run's directory: configuration, metrics, checkpoints, export. One run a directory."""
    checkpoint_interval: int = option(
        -1, at_least=-1, at_most=10**9, aliases=("--save-steps", "--save_steps")
    )
    """Updates between checkpoints; -1 saves at the end only. The last and the best are always
    kept."""
    keep_checkpoints: int = option(-1, at_least=-1, at_most=10**9)
    """Interval checkpoints to keep, newest first; -1 keeps all, 0 none. One of MPNet-base takes 1.3
    GB."""
    save_optimizer_state: bool = True
    """Save what a resume needs (annotated-mpnet: off, so that its runs cannot be resumed by
    default). Off makes checkpoints a third of the size and only good for export."""
    resume: bool = False
    """Go on from the newest valid checkpoint of the run's directory, as if there had been no
    interruption."""
    resume_checkpoint: Path | None = None
    """Go on from this checkpoint. A `.pt` file of annotated-mpnet or of Microsoft's code gives
    weights only: the run then starts at update 0."""
    trust_checkpoint: bool = False
    """Accepted for old command lines, and without effect: nothing is ever unpickled unsafely, and
    what holds more than plain tensors is refused, with the way out."""
    hf_model_path: str | None = None
    """Start from the weights of a Hugging Face MPNet (directory or Hub name), at update 0. Excludes
    --resume."""
    allow_change: str = ""
    """Names, separated by commas, of what may differ from the run that is resumed (data, seed,
    batch, ...). The run is then no longer exactly the uninterrupted one."""
    overwrite: bool = False
    """Start anew in a directory that already holds a run, and delete that run."""
    export_hf: bool = True
    """Write the best model in Hugging Face format to `hf/` at the end, where it can be
    represented."""
    eval_interval_steps: int | None = option(None, at_least=1, at_most=10**9)
    """Updates between validations. Default: --checkpoint-interval, else 5000."""
    seed: int = option(12345, at_least=0, at_most=2**63 - 1)
    """Decides weights, order, masks and dropout; with the data, it decides the whole run."""
    debug: bool = False
    """Log on standard error what is done when, by the libraries too, with the traceback of a
    mistake."""

    @property
    def resuming(self) -> bool:
        """Whether a former run is to be gone on with."""
        if self.resume_checkpoint is not None:
            return not self.resume_checkpoint.is_file()
        return self.resume

    @property
    def initial_weights(self) -> str | None:
        """Where the weights of update 0 come from; None if they are drawn at random.

        `--resume-checkpoint` with a file, which only other programs write, gives weights and no
        more: nothing in it says where a run of ours would stand.
        """
        if self.resume_checkpoint is not None and self.resume_checkpoint.is_file():
            return str(self.resume_checkpoint)
        return self.hf_model_path

    @property
    def allowed_changes(self) -> list[str]:
        """The names in `allow_change`."""
        return [name.strip() for name in self.allow_change.split(",") if name.strip()]

    @property
    def effective_eval_interval(self) -> int:
        """Updates between validations, with the default worked out."""
        if self.eval_interval_steps is not None:
            return self.eval_interval_steps
        return self.checkpoint_interval if self.checkpoint_interval > 0 else 5000


@dataclass(frozen=True, kw_only=True)
class MachineConfig:
    """The machine: where and how the same numbers are computed."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train. auto: CUDA, else MPS, else the CPU. No GPU is no error: the plan says how
    slow it will be, and the presets demo and tiny are made for it."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16: matrix products in bfloat16, weights and optimizer in float32, which is what a GPU is
    fastest at, and a CPU too, if it has instructions for it (AMX, AVX512-BF16). auto: bf16 on CUDA,
    fp32 elsewhere."""
    attention: Attention = "auto"
    """How attention is computed. sdpa: PyTorch's fused kernels. triton: our own kernels for CUDA,
    which work out bias and visibility inside and give the same bits each time. blocked: sample by
    sample in memory that is used again, for CPUs. eager: the formula, line by line, to compare
    with. auto: blocked on a CPU, sdpa elsewhere; the plan says which, and why."""
    compile: bool = False
    """Let torch.compile generate kernels for the network. The first updates take minutes, the rest
    less time each; results agree to rounding, and checkpoints are the same files. On a CPU it needs
    a C++ compiler."""
    gradient_checkpointing: bool = False
    """Keep the input of each layer only, and compute the rest of it a second time on the way back:
    the same numbers, for about a third more time and a fraction of the memory."""
    fsdp: bool = False
    """Shard weights, gradients and optimizer over the processes of torchrun, for networks that do
    not fit into one device's memory. Default: each process holds all of it (DDP), which is faster.
    The checkpoints are the same."""
    distributed_timeout: int = option(1800, at_least=1, at_most=10**6)
    """Seconds that the processes of torchrun wait for each other, at the start and in the run,
    before they give up. A process that dies is noticed at once."""


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """What the run tells, and whom. `metrics.jsonl` and `log.txt` are always written."""

    logging_steps: int = option(25, at_least=1, at_most=10**9)
    """Updates between two lines of metrics; each is the mean since the one before."""
    tensorboard_log_dir: Path | None = option(None, aliases=("-log_dir",))
    """Write the metrics for TensorBoard too, into this directory."""
    wandb: bool = False
    """Send the metrics to Weights & Biases too; WANDB_MODE=offline keeps them here. Their key comes
    from `wandb login` or WANDB_API_KEY, and is never written down here."""
    wandb_project: str = "annotated-mpnet"
    """Project on Weights & Biases."""
    wandb_name: str | None = None
    """Name of the run there. Default: the name of --checkpoint-dir."""
    wandb_id: str | None = None
    """Id of the run there, to go on with one. Default: the run's own id, so that a resumed run goes
    on with its curves."""
    wandb_watch: bool = False
    """Send histograms of weights and gradients (of the first process) too, with each line of
    metrics; slow. Excludes --fsdp."""


@dataclass(frozen=True, kw_only=True)
class PretrainingConfig:
    """A whole run of `pretrain-mpnet`: the groups above, each under the name of its TOML table.

    Frozen, like its groups: what was checked cannot change behind the check's back, and the
    `config.toml` of a run is what the run had.
    """

    model: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    run: RunConfig = field(default_factory=RunConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def validate(self) -> None:
        """Raise a `ConfigError` that names flag, value and range, before anything is read
        or built."""
        for group in dataclasses.fields(self):
            check(getattr(self, group.name))
        data, optimization, objective, run = self.data, self.optimization, self.objective, self.run

        _check_text(data)

        # The schedule must be able to rise to its peak and to fall from it.
        warmup = optimization.effective_warmup_updates
        _refuse_if(
            warmup > optimization.total_updates,
            f"--warmup-updates is {warmup}, more than --total-updates "
            f"{optimization.total_updates}: the peak would never be reached",
        )
        _refuse_if(
            optimization.end_learning_rate > optimization.lr,
            f"--end-learning-rate is {optimization.end_learning_rate}, more than --lr "
            f"{optimization.lr}: the learning rate only falls after the warm-up",
        )

        # `auto` means none where there is no table; what was asked for by name is refused.
        _refuse_if(
            optimization.relative_bias_init != "auto"
            and self.model.relative_attention_num_buckets == 0,
            f"--relative-bias-init is {optimization.relative_bias_init}, and "
            "--relative-attention-num-buckets 0 leaves no relative position bias to initialise; "
            "leave out one of them",
        )

        # The objective: three kinds of stand-in share 100 %.
        _refuse_if(
            objective.keep_prob + objective.rand_prob > 1,
            f"--keep-prob {objective.keep_prob} and --rand-prob {objective.rand_prob} add up "
            "to more than 1; the rest are masks, so that their sum is at most 1",
        )

        # The machine.
        _refuse_if(
            self.tracking.wandb_watch and self.machine.fsdp,
            "--wandb-watch and --fsdp exclude each other: rank 0, which speaks with W&B, would ask "
            "the others for their shares of each weight, and wait for ever; give one of them",
        )
        _check_run(run)


def _check_text(data: DataConfig) -> None:
    # What contradicts itself is refused, not settled by a rule of precedence: whoever gave two
    # sources would learn only from the result which one was read.
    _refuse_if(
        data.max_positions is not None and data.max_positions < data.max_tokens,
        f"--max-positions is {data.max_positions}, less than --max-tokens "
        f"{data.max_tokens}: rows would be longer than the position table; "
        "raise the one or lower the other",
    )
    # annotated-mpnet wanted `--dataset-name ""` beside local files. It is no source, and so no
    # second one; and where it is the only word about the text, it must not mean the default,
    # which is to stream what was just said not to be wanted.
    _refuse_if(
        data.train_dir is None and data.dataset_name == "",
        "--dataset-name is empty and there is no --train-dir; expected one source of training "
        "text, a --train-dir or the name of a dataset",
    )
    _refuse_if(
        data.train_dir is not None and bool(data.dataset_name),
        f"--train-dir {data.train_dir} and --dataset-name {data.dataset_name} exclude each "
        "other: give one source of training text",
    )
    _refuse_if(
        data.valid_fraction > 0 and data.valid_file is not None,
        f"--valid-fraction {data.valid_fraction} and --valid-file {data.valid_file} exclude each "
        "other: give one source of text for validation (--valid-fraction 0 takes back that of a "
        "preset or file)",
    )


def _check_run(run: RunConfig) -> None:
    # A run has one beginning.
    _refuse_if(
        run.resuming and run.hf_model_path is not None,
        "--resume and --hf-model-path exclude each other: a resumed run has its weights "
        "already; give one of them (--hf-model-path None takes back that of a preset)",
    )
    _refuse_if(
        run.resuming and run.overwrite,
        "--resume and --overwrite exclude each other: the one goes on with the run in "
        "--checkpoint-dir, the other deletes it; give one of them",
    )


def _refuse_if(wrong: bool, message: str) -> None:
    if wrong:
        raise ConfigError(message)


def fields_of(config: PretrainingConfig) -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Yield (name of the group, field) for every field of every group.

    Fields are told apart by their names alone, on the command line and in TOML alike; so a name
    occurs in one group only.

    >>> names = [each.name for _, each in fields_of(PretrainingConfig())]
    >>> len(names) == len(set(names))
    True
    """
    for group in dataclasses.fields(config):
        for each in dataclasses.fields(getattr(config, group.name)):
            yield group.name, each


def check(group: Any) -> None:
    """Raise a `ConfigError` for a field of a group that is outside its range.

    The first one, in the order of the fields: one clear line is easier to mend than a list.

    >>> check(ArchitectureConfig(encoder_layers=0, dropout=2.0))
    Traceback (most recent call last):
    annotated_mpnet.errors.ConfigError: --encoder-layers is 0; expected a number >= 1 and <= 1000
    """
    check_ranges(group)
    if isinstance(group, ArchitectureConfig):
        _check_architecture(group)


def _check_architecture(group: ArchitectureConfig) -> None:
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
            raise ConfigError(f"{flag(name)} is {value!r}; expected one of {', '.join(choices)}")


def aliases() -> Iterator[tuple[str, str]]:
    """Yield (other spelling, flag) for every field that has one.

    They are annotated-mpnet's short flags; here each flag has one name, and the others are
    rewritten to it before the command line is parsed.
    """
    for _, each in fields_of(PretrainingConfig()):
        for alias in each.metadata.get("aliases", ()):
            yield alias, flag(each.name)
