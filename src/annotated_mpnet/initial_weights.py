"""The network before its first update: fresh weights, or somebody's.

MPNet-base has read 160 GB of text, and need not learn again what a word is. Whoever wants a model
of contracts, or of case notes, can go on from its weights in place of N(0, 0.02). Two flags decide
where update 0 begins:

    neither                          fresh weights, of the architecture in the flags
    --hf-model-path PATH or NAME     the weights of a Hugging Face model; also of a checkpoint, a
                                     run or an export of ours, or of a .pt file
    --resume-checkpoint FILE.pt      the weights of a file of annotated-mpnet's or Microsoft's

Fresh weights are N(0, 0.02), and on top of that some heads start with a preference for a neighbour
(`--relative-bias-init`, `modeling/local_start.py`).

(`conversion/recognise.py` tells the sources apart.) A run that starts from weights is a new run:
update 0, warm-up, no memory of an optimizer. One that is *resumed* is another matter
(`training/resume.py`).

**What must fit, and what is fitted.** Weights are the numbers of one particular network over one
particular vocabulary. What they depend on is therefore the source's, and the rest is the run's:

    architecture     the source's; flags that say something else give way, and that is said
    vocabulary       must be the same, token by token (`conversion/vocabulary.py`), else refused
    position table   the source's, and made longer where the run needs more rows than it has
    dropout          the run's: no weight has a shape that depends on it
    head             the source's; where an encoder comes without one, a fresh one

**A fresh head** has nothing to say at first, and speaks into a network that was trained. How it is
made (`conversion/hugging_face.py`) decides whether the first hundred updates repair the damage that
a random one does, or go on from where the encoder is. Its bias is the one part of it that can be
known beforehand: `--head-bias frequencies` sets it to how often each token occurs. Without that,
all tokens start as equals, and learning otherwise comes before anything else. all-mpnet-base-v2 on
the demo's text, before the first update:

    head                                       bits per predicted token
    -----------------------------------------  -----------------------------------------
    guessing all 30,527 tokens evenly          14.9
    drawn from N(0, 0.02), bias zero           18 to 19
    ours, bias zero                            14.6
    guessing by frequency                       9.3
    ours, bias from frequencies                 9.1

**Longer rows.** A learned table ends: the network has never been at position 512. `longer_table`
makes new rows of old ones, and a look at the table of a real model says which. In all-mpnet-base-v2
the rows are about 1.0 long, and neighbours are alike (their cosine is 0.98); but the first and the
last are 5.9 and 5.4 long, and like no other. Packed rows of 512 tokens have taught it: at position
0 there always is `<s>`, at position 511 always `</s>`. They say "an end of the row" rather than
"place 511". So the ends stay the ends, and between them the inner rows are repeated in order:

>>> longer_table(torch.arange(6.0)[:, None], 13).flatten().tolist()  # 6 positions become 13
[0.0, 1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 3.0, 5.0]

Everything before the last of the old rows stays as it was, so that a shorter text has the same
hidden states as before; neighbours stay neighbours, but at the seams; and nothing is random. It is
a start, and training has to do the rest. Longformer (Beltagy, Peters, Cohan, arXiv 2004.05150,
section 5) copies RoBERTa's table in the same way, ends included. The relative bias needs nothing:
beyond distance 91 all distances share a bucket. Nor do sinusoids, which have no end.

A shorter row needs no shorter table: it stays as long as the source has it.

HF: `resize_position_embeddings` is there for every model, and raises `NotImplementedError` for
MPNet. annotated-mpnet takes a BERT directory for one of MPNet's, finds none of its names in it,
trains from random weights and reports success; here BERT is refused.

Next: `training/trainer.py`.

    D embed_dim   T rows of the position table   V vocabulary
"""

import dataclasses

import torch
from torch import Tensor

from annotated_mpnet import conversion
from annotated_mpnet.config import ArchitectureConfig, ModelConfig, PretrainingConfig
from annotated_mpnet.conversion.vocabulary import check_vocabulary
from annotated_mpnet.data.statistics import unigram_log_probabilities
from annotated_mpnet.data.texts import Text
from annotated_mpnet.data.tokenizer import Vocabulary, check_for_export
from annotated_mpnet.errors import ConfigError
from annotated_mpnet.modeling import MPNetForPretraining
from annotated_mpnet.modeling.local_start import start_locally
from annotated_mpnet.options import flag
from annotated_mpnet.randomness import fold_in_seed

DROPOUTS = ("dropout", "attention_dropout", "activation_dropout")
"""What of the architecture no weight depends on."""
POSITIONS = "sentence_encoder.embed_positions.weight"
BY_TOKEN = ("sentence_encoder.embed_tokens.weight", "lm_head.bias")
"""The two tensors that have a row for each token."""


def build_model(config: PretrainingConfig, text: Text) -> tuple[MPNetForPretraining, list[str]]:
    """Return the network as it is before the first update, on the CPU, and notes for the user.

    Raises:
        CheckpointError: what was to be started from is not there, is no MPNet, is not whole, or
            has another vocabulary; with the flag that mends it.
        ConfigError: `--head-bias frequencies`, and nothing to count.
    """
    # Weights are a function of the seed alone: the demo makes the untrained network once more.
    torch.manual_seed(fold_in_seed(config.run.seed, "weights") % 2**63)
    source = config.run.initial_weights
    notes: list[str] = []
    if source is None:
        model = MPNetForPretraining(_wanted(config, text.vocabulary))
    else:
        model, notes = _start_from(source, config, text)
    bias_start = config.optimization.relative_bias_init
    if source is None:
        table = model.sentence_encoder.relative_attention_bias
        if table is not None and bias_start != "normal":
            start_locally(table)
    elif bias_start != "auto":
        notes.append(
            f"--relative-bias-init {bias_start} has no effect: the bias comes from {source}"
        )
    # Old command lines carry the flag, and go on working: what it once allowed is never done.
    if config.run.trust_checkpoint:
        notes.append(
            "--trust-checkpoint has no effect: files are read as plain tensors, and nothing in "
            "them is run, trusted or not"
        )
    if config.optimization.head_bias == "frequencies":
        # A trained bias is not zero, and a fresh one is: so there is no other record of it.
        if model.lm_head.bias.count_nonzero() == 0:
            _set_head_bias(model, text)
        else:
            notes.append(f"--head-bias frequencies has no effect: the head of {source} is trained")
    return model, notes


def check_export(config: PretrainingConfig, text: Text, model: MPNetForPretraining) -> list[str]:
    """Say before training what would keep the export at its end from happening.

    Two kinds of reasons. An architecture that Hugging Face cannot represent was asked for by flags,
    and may well be worth training: a warning. A padding id was not asked for, it comes with the
    tokenizer; to find out after a week that it should have been 1 would be a bad surprise: refused.

    Returns:
        Warnings; none if the model can be exported, or is not to be.

    Raises:
        ConfigError: the tokenizer's padding id is not Hugging Face's, and `--export-hf` is on.
    """
    if not config.run.export_hf:
        return []
    if (reason := check_for_export(text.vocabulary)) is not None:
        raise ConfigError(reason)
    if reasons := conversion.reasons_not_representable(model.config):
        return [
            f"there will be no Hugging Face export, which cannot be this model: "
            f"{'; '.join(reasons)} (--no-export-hf silences this)"
        ]
    return []


def longer_table(table_TD: Tensor, rows: int) -> Tensor:
    """Return a position table of so many rows: the ends stay, the inner rows are repeated.

    Args:
        table_TD: (T, D), the rows of positions 0 to T - 1, without that of padding.
        rows: how many there shall be, T or more.

    >>> longer_table(torch.arange(3.0)[:, None], 3).flatten().tolist()
    [0.0, 1.0, 2.0]
    """
    length = len(table_TD)
    # A table of one or two rows has ends only, and nothing else to repeat.
    inner = range(1, length - 1) or range(length)
    repeated = [inner[i % len(inner)] for i in range(rows - length)]
    return table_TD[[*range(length - 1), *repeated, length - 1]]


def _wanted(config: PretrainingConfig, vocabulary: Vocabulary) -> ModelConfig:
    """Return the network that flags and tokenizer describe.

    With weights to start from it is a wish: `_start_from` compares it with what the source is.
    """
    return ModelConfig(
        **dataclasses.asdict(config.model),
        vocab_size=vocabulary.size,
        max_positions=config.data.max_positions or config.data.max_tokens,
        pad_token_id=vocabulary.pad_id,
        mask_token_id=vocabulary.mask_id,
    )


def _set_head_bias(model: MPNetForPretraining, text: Text) -> None:
    """Begin on the unigram plateau: softmax of the bias alone is the frequency of each token.

    The rest of a fresh head adds little to the bias, so that the network first guesses by frequency
    whatever it sees, and has only what depends on the context left to learn.
    """
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
    source: str, config: PretrainingConfig, text: Text
) -> tuple[MPNetForPretraining, list[str]]:
    """Return a network with the weights of a source, fitted to the run.

    The notes say all that is not as the command line has it. They also hold the flags that a later
    `--resume` needs: it finds a checkpoint and no source any more, and builds the network from its
    flags before it compares the two.
    """
    loaded = conversion.load_any(source)
    # Refusals first, by what costs nothing to compare.
    notes = check_vocabulary(loaded, source, text.tokenizer, config.data.tokenizer_name)
    wanted, tensors = _wanted(config, text.vocabulary), dict(loaded.tensors)
    # Rows that stand for no token, from a vocabulary that was padded: not part of the network.
    for name in BY_TOKEN:
        tensors[name] = tensors[name][: wanted.vocab_size]
    # As many positions as the run needs, and never fewer than there are: a shorter table would
    # throw away what was learned, to save 3 kB a row.
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
    # Strict: a tensor that is missing here, or left over, would be an error of this project's.
    model = MPNetForPretraining(model_config)
    model.load_state_dict(tensors)
    start = f"starting from {source}: weights only, from step 0"
    if differing := _flags_of_difference(model_config, wanted):
        start += f"; its architecture replaces the flags (a --resume needs {differing})"
    return model, [start, *loaded.notes, *notes]


def _lengthen(config: ModelConfig, tensors: dict[str, Tensor], positions: int) -> str:
    """Make the position table among the tensors longer, in place; return what to tell.

    The table in the file has more rows than there are positions: (T + padding id + 1, D).
    """
    # Sinusoids are computed, for any number of positions: no tensor holds them.
    if POSITIONS not in tensors:
        return f"positions: {config.max_positions} became {positions}, sinusoids, nothing is new"
    # The rows before position 0 belong to padding and, with a padding id of 1, to nobody.
    first = config.pad_token_id + 1
    table_TD = tensors[POSITIONS]
    tensors[POSITIONS] = torch.cat([table_TD[:first], longer_table(table_TD[first:], positions)])
    return (
        f"positions: {config.max_positions} became {positions}; the new rows of the table repeat "
        "its inner rows, and want training on rows of that length"
    )


def _flags_of_difference(model: ModelConfig, wanted: ModelConfig) -> str:
    """Return the flags by which the network would be described as it is; empty if they are given.

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
