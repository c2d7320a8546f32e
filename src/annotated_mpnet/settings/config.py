"""All settings of a run: what each is, why it has its default, which values make sense.

A field is a flag of `pretrain-mpnet` (`encoder_layers` is `--encoder-layers`) and its docstring is
the flag's help. Default, range and help are written here and in `mpnet/config.py` only; parser,
help, TOML files and the reference are made from them.

>>> each = {each.name: each for _, each in fields_of(PretrainingConfig())}["weight_decay"]
>>> each.default, each.metadata["bounds"], each.metadata["aliases"]
(0.01, {'>=': 0, '<=': 1}, ('-wd',))

Defaults are those of MPNet-base. A docstring says where annotated-mpnet, whose command lines work
here too, has another default.

`validate` checks the ranges, and then which settings contradict each other, before any text is read
or any model is built:

>>> PretrainingConfig(optimization=OptimizationConfig(lr=-1.0)).validate()
Traceback (most recent call last):
annotated_mpnet.errors.ConfigError: --lr is -1.0; expected a number > 0 and <= 1
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from annotated_mpnet.errors import ConfigError
from annotated_mpnet.mpnet.config import (
    ArchitectureConfig,
    ObjectiveConfig,
    OptimizationConfig,
    Packing,
    check_architecture,
    check_ranges,
    option,
)

DEFAULT_TOKENIZER = "microsoft/mpnet-base"

Attention = Literal["auto", "sdpa", "triton", "blocked", "eager"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text, and how it becomes sequences of tokens."""

    train_dir: Path | tuple[Path, ...] | None = None
    """Training text: one or several directories, searched recursively, or files. `.txt` and
    `.txt.gz` hold one document per line; `.jsonl`, `.parquet` and `.csv` one per row
    (--text-field). UTF-8."""
    train_weights: tuple[float, ...] | None = None
    """Share of the training for each path of --train-dir, such as 3 1, whatever their sizes. A
    small text is then read more often than a large one. Default: all documents are read equally
    often."""
    valid_file: Path | None = None
    """Validation text: a file or a directory, read like --train-dir. Its loss decides which model
    is the best."""
    test_file: Path | None = None
    """Text for the single test at the end of the run: a file or a directory."""
    valid_fraction: float = option(0.0, at_least=0, below=1)
    """Share of the training documents to hold out for validation. They are chosen by a hash of
    their text, so copies of a held-out document are not trained on. Excludes --valid-file."""
    dataset_name: str | None = None
    """Dataset to train on: a name on the Hub (streamed) or a folder of data files. Default:
    HuggingFaceFW/fineweb-edu when no files are given. Excludes --train-dir; an empty name next to
    --train-dir is ignored, for old commands."""
    dataset_config: str | None = None
    """Configuration (subset) of the dataset, if it has several."""
    dataset_split: str = "train"
    """Split of the dataset to train on."""
    dataset_revision: str | None = None
    """Commit, tag or branch of the dataset. Default: the newest commit. The commit is recorded, and
    a resumed run reads the same text even if the dataset has changed."""
    text_field: str = "text"
    """Column that holds the text, in datasets and in files with columns."""
    streaming: bool = True
    """Read a dataset as it arrives, without storing it. --no-streaming downloads it first and packs
    it like local files, which allows a global shuffle and an immediate resume."""
    buffer_size: int = option(10000, at_least=1, at_most=10**8)
    """Size of a stream's shuffle buffer, in packed sequences. It is saved in each checkpoint (20 MB
    for 10000 sequences of 512 tokens). Increase it if the dataset is sorted by source or topic."""
    eval_samples: int = option(500, at_least=0, at_most=10**8)
    """Documents of a stream to hold out for validation, and as many again for the test. They are
    chosen by a hash of their text; neither they nor their copies are trained on."""
    min_text_length: int = option(64, at_least=0, at_most=10**9)
    """Drop and count documents of a dataset with fewer characters. Local files keep all."""
    packing: Packing = "full"
    """full: fill sequences across the ends of documents. none: one document per sequence, padded to
    the longest of the batch; a long document takes several sequences. documents: whole documents
    share a sequence but do not attend to each other."""
    tokenizer_name: str | None = None
    """Hub name or directory of the tokenizer. It decides the size of the vocabulary. Default: that
    of the checkpoint to resume from or of --hf-model-path, else microsoft/mpnet-base."""
    max_tokens: int = option(512, at_least=4, at_most=1048576)
    """Tokens per sequence, `<s>` and `</s>` included (paper: 512). Attention grows with the square
    of it; shorter sequences train faster and see less context."""
    max_positions: int | None = option(None, at_least=4, at_most=1048576)
    """Size of the position table. More than --max-tokens leaves space to train on longer sequences
    later. Default: --max-tokens."""
    num_workers: int = option(0, at_least=0, at_most=1024)
    """Processes that tokenise the text. They change how soon training starts, never what it trains
    on. 0: one per processor if the text is large enough to gain from it."""

    @property
    def train_dirs(self) -> tuple[Path, ...]:
        """The paths of `train_dir`."""
        if self.train_dir is None:
            return ()
        return self.train_dir if isinstance(self.train_dir, tuple) else (self.train_dir,)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run: its directory, what it saves there, how it starts and resumes."""

    checkpoint_dir: Path = Path("checkpoints")
    """The run's directory, for configuration, metrics, checkpoints and export. One run each."""
    checkpoint_interval: int = option(
        -1, at_least=-1, at_most=10**9, aliases=("--save-steps", "--save_steps")
    )
    """Updates between checkpoints; -1 saves at the end only. The last and the best checkpoint are
    always kept."""
    keep_checkpoints: int = option(-1, at_least=-1, at_most=10**9)
    """Number of interval checkpoints to keep, newest first; -1 keeps all, 0 none. A checkpoint of
    MPNet-base takes 1.3 GB."""
    save_optimizer_state: bool = True
    """Save what a resume needs (annotated-mpnet: off, so its runs cannot be resumed by default).
    --no-save-optimizer-state writes checkpoints of a third of the size, good only for export."""
    resume: bool = False
    """Resume the run in --checkpoint-dir from its newest valid checkpoint, exactly as if it had not
    been interrupted. What only a start needs (--hf-model-path) is then ignored."""
    autoresume: bool = False
    """Resume the run in --checkpoint-dir if there is one, else start one: the same command for
    every start of a job that a scheduler may requeue. Excludes --resume and --overwrite."""
    resume_checkpoint: Path | None = None
    """Resume from this checkpoint. A `.pt` file of annotated-mpnet or of Microsoft's code only
    provides weights; the run then starts at update 0."""
    trust_checkpoint: bool = False
    """Accepted for old command lines, without effect. Nothing is ever unpickled unsafely; a file
    that holds more than plain tensors is refused with a way out."""
    hf_model_path: str | None = None
    """Start from the weights of an MPNet of Hugging Face or sentence-transformers (directory or Hub
    name), at update 0. It brings its tokenizer; a sentence encoder keeps its modules (pooling,
    normalization, prompts) in every export. Ignored with --resume."""
    allow_change: str = ""
    """Comma-separated names of what may differ from the run being resumed (data, seed, batch, ...).
    The run is then no longer exactly the uninterrupted one."""
    overwrite: bool = False
    """Delete the run in --checkpoint-dir, if there is one, and start a new one."""
    export_hf: bool = True
    """Write the best model in Hugging Face format to `hf/` at the end, if the format can represent
    it."""
    eval_interval_steps: int | None = option(None, at_least=1, at_most=10**9)
    """Updates between validations. Default: --checkpoint-interval, else 5000."""
    seed: int = option(12345, at_least=0, at_most=2**63 - 1)
    """Decides weights, order, masks and dropout. Seed and data together decide the whole run."""
    debug: bool = False
    """Write a debug log to standard error, including the libraries' messages and the traceback of
    an error."""

    @property
    def resuming(self) -> bool:
        """Whether to resume an earlier run. A file in --resume-checkpoint only gives weights."""
        if self.resume_checkpoint is not None:
            return not self.resume_checkpoint.is_file()
        return self.resume

    @property
    def initial_weights(self) -> str | None:
        """The source of the weights at update 0; None draws them at random, or resumes."""
        if self.resuming:
            return None
        if self.resume_checkpoint is not None and self.resume_checkpoint.is_file():
            return str(self.resume_checkpoint)
        return self.hf_model_path

    @property
    def allowed_changes(self) -> list[str]:
        """The names in `allow_change`."""
        return [name.strip() for name in self.allow_change.split(",") if name.strip()]

    @property
    def effective_eval_interval(self) -> int:
        """Updates between validations, with the default filled in."""
        if self.eval_interval_steps is not None:
            return self.eval_interval_steps
        return self.checkpoint_interval if self.checkpoint_interval > 0 else 5000


@dataclass(frozen=True, kw_only=True)
class MachineConfig:
    """The machine: where and how the same numbers are computed."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train. auto: CUDA, else MPS, else the CPU. Without a GPU the plan says how slow it
    will be; the presets demo and tiny are made for a CPU."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16: matrix products in bfloat16, weights and optimizer in float32. This is fastest on a
    GPU, and on a CPU with the instructions for it (AMX, AVX512-BF16). auto: bf16 on CUDA, fp32
    elsewhere."""
    attention: Attention = "auto"
    """How to compute attention. sdpa: PyTorch's fused kernels. triton: our CUDA kernels, which
    compute bias and visibility on the fly and give the same bits each time. blocked: one sequence
    at a time in reused memory, for CPUs. eager: the formula line by line, for comparison. auto:
    blocked on a CPU, triton on a GPU with CUDA where it works, else sdpa; the plan says which and
    why."""
    compile: bool = False
    """Compile the model with torch.compile. The first updates take minutes, the rest less time
    each. Results agree to rounding; checkpoints are interchangeable. On a CPU it needs a C++
    compiler."""
    cuda_graph: bool = True
    """On a GPU, record the kernels of a micro-batch once and replay them, which saves the CPU the
    work of starting each. Not with several processes, --gradient-checkpointing, --wandb-watch, or a
    --packing other than full; the plan says so."""
    gradient_checkpointing: bool = False
    """Keep only the input of each layer, and compute the rest again in the backward pass: the same
    numbers, about a third more time, a fraction of the memory."""
    fsdp: bool = False
    """Shard weights, gradients and optimizer over the processes of torchrun, for models that do not
    fit into the memory of one device. Default: each process holds everything (DDP), which is
    faster. Checkpoints are the same."""
    distributed_timeout: int = option(1800, at_least=1, at_most=10**6)
    """Seconds that the processes of torchrun wait for each other before they give up. A process
    that dies is noticed at once."""


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """What the run reports, and where. `metrics.jsonl` and `log.txt` are always written."""

    logging_steps: int = option(25, at_least=1, at_most=10**9)
    """Updates between two lines of metrics. Each line is the mean since the previous one."""
    tensorboard_log_dir: Path | None = option(None, aliases=("-log_dir",))
    """Also write the metrics for TensorBoard, to this directory."""
    wandb: bool = False
    """Also send the metrics to Weights & Biases; WANDB_MODE=offline keeps them on this machine. The
    key comes from `wandb login` or WANDB_API_KEY and is never saved."""
    wandb_project: str = "annotated-mpnet"
    """Project on Weights & Biases."""
    wandb_name: str | None = None
    """Name of the run there. Default: the name of --checkpoint-dir."""
    wandb_id: str | None = None
    """Id of the run there, to continue an existing one. Default: the run's own id, so a resumed run
    continues its curves."""
    wandb_watch: bool = False
    """Also send histograms of weights and gradients (of rank 0) with each line of metrics. Slow.
    Excludes --fsdp."""


@dataclass(frozen=True, kw_only=True)
class PretrainingConfig:
    """All settings of `pretrain-mpnet`; each group has the name of its TOML table."""

    model: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    run: RunConfig = field(default_factory=RunConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def validate(self) -> None:
        """Raise a `ConfigError` for the first setting that cannot work."""
        try:
            for group in vars(self).values():
                check_ranges(group)
            check_architecture(self.model)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        _check_text(self.data)
        _check_optimization(self.optimization)
        bias = self.optimization.relative_bias_init
        if bias != "auto" and self.model.relative_attention_num_buckets == 0:
            raise ConfigError(
                f"--relative-bias-init is {bias}, but --relative-attention-num-buckets 0 switches "
                "the relative position bias off; remove one of the two"
            )
        check_corruption(self.objective)
        if self.tracking.wandb_watch and self.machine.fsdp:
            raise ConfigError(
                "--wandb-watch and --fsdp exclude each other: rank 0 reports to W&B alone and has "
                "only a shard of the weights; give one of them"
            )
        _check_start(self.run)


def _check_text(data: DataConfig) -> None:
    if data.max_positions is not None and data.max_positions < data.max_tokens:
        raise ConfigError(
            f"--max-positions is {data.max_positions}, less than --max-tokens {data.max_tokens}; "
            "a sequence must fit into the position table: raise the one or lower the other"
        )
    # annotated-mpnet wanted `--dataset-name ""` next to local files. Alone, it must not mean the
    # default dataset.
    if data.train_dir is None and data.dataset_name == "":
        raise ConfigError(
            "--dataset-name is empty and there is no --train-dir; expected one source of training "
            "text, a --train-dir or the name of a dataset"
        )
    if data.train_dir is not None and data.dataset_name:
        raise ConfigError(
            f"--train-dir {' '.join(map(str, data.train_dirs))} and --dataset-name "
            f"{data.dataset_name} exclude each other; give one source of training text"
        )
    weights = data.train_weights
    if weights is not None and len(weights) != len(data.train_dirs):
        raise ConfigError(
            f"--train-weights has {len(weights)} numbers for {len(data.train_dirs)} paths of "
            "--train-dir; expected one for each path"
        )
    if weights is not None and not all(0 < each <= 1e6 for each in weights):
        raise ConfigError(
            f"--train-weights is {' '.join(map(str, weights))}; expected numbers > 0 and <= 1000000"
        )
    if data.valid_fraction > 0 and data.valid_file is not None:
        raise ConfigError(
            f"--valid-fraction {data.valid_fraction} and --valid-file {data.valid_file} exclude "
            "each other; give one source of validation text (--valid-fraction 0 resets that of a "
            "preset or file)"
        )


def _check_optimization(optimization: OptimizationConfig) -> None:
    warmup, total = optimization.effective_warmup_updates, optimization.total_updates
    if warmup > total:
        raise ConfigError(
            f"--warmup-updates is {warmup}, more than --total-updates {total}; the peak learning "
            "rate would never be reached"
        )
    if optimization.decay_updates is not None and optimization.schedule != "wsd":
        raise ConfigError(
            f"--decay-updates is {optimization.decay_updates}, but --schedule "
            f"{optimization.schedule} falls from the warm-up to the end; give --schedule wsd too"
        )
    if optimization.first_decay_update < warmup:
        raise ConfigError(
            f"--warmup-updates {warmup} and --decay-updates "
            f"{total - optimization.first_decay_update} are more than --total-updates {total}; "
            "make one of them shorter"
        )
    if optimization.end_learning_rate > optimization.lr:
        raise ConfigError(
            f"--end-learning-rate is {optimization.end_learning_rate}, more than --lr "
            f"{optimization.lr}; the learning rate can only fall after the warm-up"
        )
    if optimization.muon_lr is not None and optimization.optimizer != "muon":
        raise ConfigError(
            f"--muon-lr is {optimization.muon_lr}, but --optimizer is {optimization.optimizer}; "
            "give --optimizer muon too"
        )


def check_corruption(objective: ObjectiveConfig) -> None:
    """Raise a `ConfigError` if the shares of kept and random tokens exceed 1."""
    if objective.keep_prob + objective.rand_prob > 1:
        raise ConfigError(
            f"--keep-prob {objective.keep_prob} and --rand-prob {objective.rand_prob} add up to "
            "more than 1; expected at most 1, as the rest of the predicted tokens are masked"
        )


def _check_start(run: RunConfig) -> None:
    if run.resuming and run.overwrite:
        raise ConfigError(
            "--resume and --overwrite exclude each other: one continues the run in "
            "--checkpoint-dir, the other deletes it; give one of them"
        )
    if not run.autoresume:
        return
    for name, given in (("--resume", run.resume), ("--overwrite", run.overwrite)):
        if given:
            raise ConfigError(
                f"--autoresume and {name} exclude each other: --autoresume resumes the run in "
                "--checkpoint-dir, and starts one if there is none; give one of them"
            )
    named = run.resume_checkpoint
    if named is not None and named.resolve().parent == run.checkpoint_dir.resolve():
        raise ConfigError(
            f"--autoresume takes the newest checkpoint of --checkpoint-dir, and "
            f"--resume-checkpoint {named} names one of them; give one of the two flags"
        )
    if not run.save_optimizer_state:
        raise ConfigError(
            "--autoresume and --no-save-optimizer-state exclude each other: such checkpoints "
            "cannot be resumed; give one of them"
        )


def fields_of(config: PretrainingConfig) -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Yield (name of the group, field) for every field of every group.

    No two groups share a field name, as flags have no prefix:

    >>> names = [each.name for _, each in fields_of(PretrainingConfig())]
    >>> len(names) == len(set(names))
    True
    """
    for name, group in vars(config).items():
        for each in dataclasses.fields(group):
            yield name, each


def non_defaults(
    config: PretrainingConfig,
) -> Iterator[tuple[str, dataclasses.Field[Any], object]]:
    """Yield (name of the group, field, value) of every setting that is not the default."""
    for group, each in fields_of(config):
        value = vars(vars(config)[group])[each.name]
        if value != each.default:
            yield group, each, value
