"""The network before its first update: fresh weights, or those of another model.

    neither flag                     fresh weights, of the architecture in the flags
    --hf-model-path PATH or NAME     the weights of a Hugging Face model, of a checkpoint, run or
                                     export of this project, or of a .pt file
    --resume-checkpoint FILE.pt      the weights of a file of annotated-mpnet's or Microsoft's

A run that starts from weights is a new run: update 0, warm-up, no optimizer state. *Resuming* one
is another matter (`checkpoints/resume.py`). What comes from where:

    architecture     the source's; flags that differ are overridden, and we say so
    tokenizer        the source's, if none is named
    vocabulary       must be the same, token by token (`conversion/vocabulary.py`), else refused
    position table   the source's, made longer if the run needs more positions
    dropout          the run's: no weight depends on it
    head             the source's; fresh if it has none
    modules          the source's, kept for the exports (`conversion/sentence_modules.py`)

**A fresh head** should not damage a trained encoder. `conversion/hugging_face.py` says how ours is
made. Its bias starts from the frequency of each token, as in a new network, unless --head-bias says
otherwise; a bias that is loaded is kept. all-mpnet-base-v2 on the demo's text, before the first
update:

    head                                       bits per predicted token
    -----------------------------------------  -----------------------------------------
    guessing all 30,527 tokens evenly          14.9
    drawn from N(0, 0.02), bias zero           18 to 19
    ours, bias zero                            14.6
    guessing by frequency                       9.3
    ours, bias from frequencies                 9.1

**Longer sequences.** In the table of a real model, inner positions are alike (neighbours have a
cosine of 0.98), but the first and the last are like no other: they mean "an end of the sequence".
So `longer_table` keeps the ends and repeats the inner positions in order:

>>> longer_table(torch.arange(6.0)[:, None], 13).flatten().tolist()  # 6 positions become 13
[0.0, 1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 3.0, 5.0]

Shorter texts keep their hidden states, and training has to do the rest. Longformer (arXiv
2004.05150, section 5) extends RoBERTa's table the same way. The relative bias and sinusoids have no
last position and need nothing.

    D embed_dim   T positions of the table   V vocabulary
"""

import dataclasses

import torch
from torch import Tensor

from annotated_mpnet import conversion
from annotated_mpnet.conversion.foreign import LoadedWeights
from annotated_mpnet.conversion.vocabulary import check_vocabulary
from annotated_mpnet.errors import ConfigError
from annotated_mpnet.mpnet.collator import Vocabulary
from annotated_mpnet.mpnet.config import ArchitectureConfig, ModelConfig, flag
from annotated_mpnet.mpnet.local_start import start_locally
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining
from annotated_mpnet.mpnet.randomness import fold_in_seed
from annotated_mpnet.runs.texts import Text
from annotated_mpnet.settings.config import DEFAULT_TOKENIZER, PretrainingConfig
from annotated_mpnet.text.frequencies import unigram_log_probabilities
from annotated_mpnet.text.tokenizer import check_for_export

DROPOUTS = ("dropout", "attention_dropout", "activation_dropout")
"""The part of the architecture that no weight depends on."""
POSITIONS = "sentence_encoder.embed_positions.weight"
BY_TOKEN = ("sentence_encoder.embed_tokens.weight", "lm_head.bias")
"""The two tensors with a row for each token."""


def build_model(
    config: PretrainingConfig, text: Text, loaded: LoadedWeights | None = None
) -> tuple[MPNetForPretraining, list[str]]:
    """Return the network before the first update, on the CPU, and notes for the user.

    Args:
        config: of the run.
        text: of the run.
        loaded: the weights of `config.run.initial_weights`, if they are at hand.

    Raises:
        CheckpointError: the source is missing, damaged, not an MPNet, or has another vocabulary.
        ConfigError: `--head-bias frequencies`, and no text to count.
    """
    # Weights are a function of the seed alone: the demo builds the untrained network again.
    torch.manual_seed(fold_in_seed(config.run.seed, "weights") % 2**63)
    run, optimization = config.run, config.optimization
    source, notes = run.initial_weights, list[str]()
    if run.hf_model_path not in (None, source):
        reason = f"the weights are those of {source}" if source else "a resumed run has its weights"
        notes.append(f"--hf-model-path {run.hf_model_path} is ignored: {reason}")
    if source is None:
        model = MPNetForPretraining(_wanted(config, text.vocabulary))
        table = model.sentence_encoder.relative_attention_bias
        if table is not None and optimization.relative_bias_init != "normal":
            start_locally(table)
    else:
        loaded = loaded or conversion.load_any(source)
        model, said = _start_from(source, loaded, config, text)
        notes += said
        if optimization.relative_bias_init != "auto":
            notes.append(
                f"--relative-bias-init {optimization.relative_bias_init} has no effect: the bias "
                f"comes from {source}"
            )
    if config.run.trust_checkpoint:
        notes.append(
            "--trust-checkpoint has no effect: files are read as plain tensors, and nothing in "
            "them is run, trusted or not"
        )
    if run.resuming:
        return model, notes  # the weights will be the checkpoint's
    is_fresh = loaded is None or loaded.fresh_head
    if optimization.head_bias == "auto" and is_fresh:
        if text.training_counts is None:
            notes.append(
                "the head's bias starts from zeros: there is no text to count, as a stream is not "
                "read twice for it (--head-bias)"
            )
        else:
            _set_head_bias(model, text)
    elif optimization.head_bias == "frequencies":
        # Only a fresh bias is all zeros.
        if model.lm_head.bias.count_nonzero() == 0:
            _set_head_bias(model, text)
        else:
            notes.append(f"--head-bias frequencies has no effect: the head of {source} is trained")
    return model, notes


def check_export(vocabulary: Vocabulary, model: ModelConfig) -> list[str]:
    """Return warnings about what prevents the export at the end of the run.

    An architecture that Hugging Face cannot represent was asked for by flags: a warning. A wrong
    padding id comes with the tokenizer, and is refused now, not after a week.

    Raises:
        ConfigError: the tokenizer's padding id is not Hugging Face's.
    """
    if (reason := check_for_export(vocabulary)) is not None:
        raise ConfigError(reason)
    if reasons := conversion.reasons_not_representable(model):
        return [
            "there will be no Hugging Face export, which cannot represent this model: "
            f"{'; '.join(reasons)} (--no-export-hf silences this)"
        ]
    return []


def longer_table(table_TD: Tensor, positions: int) -> Tensor:
    """Return a position table (T, D) of `positions` >= T rows, without that of padding.

    >>> longer_table(torch.arange(3.0)[:, None], 3).flatten().tolist()
    [0.0, 1.0, 2.0]
    """
    length = len(table_TD)
    # A table of one or two positions has only ends to repeat.
    inner = range(1, length - 1) or range(length)
    repeated = [inner[i % len(inner)] for i in range(positions - length)]
    return table_TD[[*range(length - 1), *repeated, length - 1]]


def _wanted(config: PretrainingConfig, vocabulary: Vocabulary) -> ModelConfig:
    """Return the network that flags and tokenizer describe."""
    return ModelConfig(
        **dataclasses.asdict(config.model),
        vocab_size=vocabulary.size,
        max_positions=config.data.max_positions or config.data.max_tokens,
        pad_token_id=vocabulary.pad_id,
        mask_token_id=vocabulary.mask_id,
    )


def _set_head_bias(model: MPNetForPretraining, text: Text) -> None:
    """Start on the unigram plateau: softmax of the bias alone is the frequency of each token."""
    counts_V = text.training_counts
    if counts_V is None:
        raise ConfigError(
            "--head-bias frequencies needs text to count, and a stream is not read twice for "
            "it; give --eval-samples, --valid-file or --no-streaming"
        )
    frequencies_V = torch.from_numpy(unigram_log_probabilities(counts_V))
    with torch.no_grad():
        model.lm_head.bias.copy_(frequencies_V)


def _start_from(
    source: str, loaded: LoadedWeights, config: PretrainingConfig, text: Text
) -> tuple[MPNetForPretraining, list[str]]:
    """Return a network with the weights of a source, fitted to the run, and notes."""
    tokenizer = config.data.tokenizer_name or loaded.tokenizer or DEFAULT_TOKENIZER
    notes = check_vocabulary(loaded, source, text.tokenizer, tokenizer)
    if config.data.tokenizer_name is None and loaded.tokenizer is not None:
        notes.append(f"tokenizer: the model's own, {loaded.tokenizer}")
    wanted, tensors = _wanted(config, text.vocabulary), dict(loaded.tensors)
    # Vocabularies are sometimes padded: those rows belong to no token.
    for name in BY_TOKEN:
        tensors[name] = tensors[name][: wanted.vocab_size]
    # Never fewer than the source has: that would throw away what it learned.
    positions = max(wanted.max_positions, loaded.config.max_positions)
    if positions > loaded.config.max_positions:
        notes.append(_lengthen(loaded.config, tensors, positions))
    model_config = dataclasses.replace(
        loaded.config,
        vocab_size=wanted.vocab_size,
        max_positions=positions,
        mask_token_id=wanted.mask_token_id,
        **{name: vars(wanted)[name] for name in DROPOUTS},
    )
    model = MPNetForPretraining(model_config)
    model.load_state_dict(tensors)
    start = f"starting from {source}: weights only, from step 0"
    if differing := _flags_of_difference(model_config, wanted):
        start += f"; its architecture replaces the flags: {differing}"
    return model, [start, *loaded.notes, *notes]


def _lengthen(config: ModelConfig, tensors: dict[str, Tensor], positions: int) -> str:
    """Make the position table among the tensors longer, in place; return a note."""
    # Sinusoids are computed, not stored.
    if POSITIONS not in tensors:
        return f"positions: {config.max_positions} became {positions}, sinusoids, nothing to learn"
    # The table has T + padding id + 1 rows; those before position 0 are for padding or unused.
    first = config.pad_token_id + 1
    table_TD = tensors[POSITIONS]
    tensors[POSITIONS] = torch.cat([table_TD[:first], longer_table(table_TD[first:], positions)])
    return (
        f"positions: {config.max_positions} became {positions}; the new ones repeat the inner "
        "ones, and need training on sequences of that length"
    )


def _flags_of_difference(model: ModelConfig, wanted: ModelConfig) -> str:
    """Return the flags that describe the network as it is, where those given differ.

    >>> _flags_of_difference(ModelConfig(), ModelConfig(encoder_layers=3, normalize_before=True))
    '--encoder-layers 12 --no-normalize-before'
    """
    names = [each.name for each in dataclasses.fields(ArchitectureConfig)]
    given = []
    for name in [*names, "max_positions"]:
        value = vars(model)[name]
        if name in DROPOUTS or value == vars(wanted)[name]:
            continue
        if isinstance(value, bool):
            given.append(flag(name) if value else flag(f"no_{name}"))
        else:
            given.append(f"{flag(name)} {value}")
    return " ".join(given)
