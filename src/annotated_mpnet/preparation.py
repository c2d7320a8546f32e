"""What a run needs before its first update: device, text, network, and a plan to show.

The order is that of what can go wrong: cheap checks come before expensive ones. All files are
looked for before the first one is read, and all of them are read, and found to be text, before a
network is built.

Next: `run.py`, which puts these together.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast

from annotated_mpnet import conversion
from annotated_mpnet.config import ModelConfig, PretrainingConfig
from annotated_mpnet.data import (
    PackedRows,
    Vocabulary,
    find_text_files,
    load_tokenizer,
    pack_rows,
    tokenizer_hash,
)
from annotated_mpnet.data.statistics import (
    token_counts,
    unigram_accuracy,
    unigram_bits,
    unigram_log_probabilities,
)
from annotated_mpnet.errors import CheckpointError, ConfigError
from annotated_mpnet.modeling import MPNetForPretraining
from annotated_mpnet.randomness import fold_in_seed


@dataclass(frozen=True)
class Text:
    """The text of a run, as rows of tokens, and the tokenizer that made them."""

    tokenizer: PreTrainedTokenizerFast
    vocabulary: Vocabulary
    train: PackedRows
    valid: PackedRows | None
    test: PackedRows | None


@dataclass(frozen=True)
class Plateau:
    """What guessing by frequency reaches on the validation text (`data/statistics.py`)."""

    bits: float
    accuracy: float


def choose_device(config: PretrainingConfig) -> tuple[torch.device, bool]:
    """Return the device to train on, and whether matrix products run in bfloat16 there.

    Raises:
        ConfigError: the device that was asked for is not there.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    wanted = config.run.device
    if wanted == "auto":
        name = next(name for name, there in available.items() if there)
    elif available[wanted]:
        name = wanted
    else:
        there = ", ".join(name for name, is_there in available.items() if is_there)
        raise ConfigError(f"--device is {wanted}, which PyTorch does not find here; it has {there}")
    precision = config.run.precision
    return torch.device(name), precision == "bf16" or (precision == "auto" and name == "cuda")


def read_text(config: PretrainingConfig) -> Text:
    """Load the tokenizer and turn all text into rows.

    Raises:
        ConfigError: the tokenizer will not do.
        DataError: the text will not.
    """
    data = config.data
    if data.train_dir is None:
        raise ConfigError(
            "--train-dir is not given; expected a directory of text files, or --preset demo to see "
            "it work on text that comes with the package"
        )
    # All files are looked for before the first one is read.
    files = {
        name: find_text_files(path, flag)
        for name, path, flag in (
            ("train", data.train_dir, "--train-dir"),
            ("valid", data.valid_file, "--valid-file"),
            ("test", data.test_file, "--test-file"),
        )
        if path is not None
    }
    tokenizer = load_tokenizer(data.tokenizer_name)
    rows = {
        name: pack_rows(paths, tokenizer, data.max_tokens, num_workers=data.num_workers)
        for name, paths in files.items()
    }
    return Text(
        tokenizer=tokenizer,
        vocabulary=Vocabulary.of(tokenizer),
        train=rows["train"],
        valid=rows.get("valid"),
        test=rows.get("test"),
    )


def build_model(config: PretrainingConfig, text: Text) -> tuple[MPNetForPretraining, list[str]]:
    """Return the network as it is before the first update, on the CPU, and notes for the user.

    Raises:
        CheckpointError: `--hf-model-path` holds no MPNet, or one with another vocabulary or with
            fewer positions than a row has.
    """
    torch.manual_seed(fold_in_seed(config.run.seed, "weights") % 2**63)
    if config.run.hf_model_path is not None:
        return _load_initial_weights(config, text)
    vocabulary = text.vocabulary
    model = MPNetForPretraining(
        ModelConfig(
            **dataclasses.asdict(config.model),
            vocab_size=vocabulary.size,
            max_positions=config.data.max_positions or config.data.max_tokens,
            pad_token_id=vocabulary.pad_id,
            mask_token_id=vocabulary.mask_id,
        )
    )
    if config.optimization.head_bias == "frequencies":
        counts_V = token_counts(text.train, vocabulary.is_special_V)
        frequencies = torch.from_numpy(unigram_log_probabilities(counts_V))
        with torch.no_grad():
            model.lm_head.bias.copy_(frequencies)
    return model, []


def _load_initial_weights(
    config: PretrainingConfig, text: Text
) -> tuple[MPNetForPretraining, list[str]]:
    name = config.run.hf_model_path
    assert name is not None
    loaded, tensors, notes = conversion.load_hugging_face(name)
    if loaded.vocab_size != text.vocabulary.size:
        raise CheckpointError(
            f"--hf-model-path {name} has {loaded.vocab_size} tokens, the tokenizer "
            f"{config.data.tokenizer_name} has {text.vocabulary.size}: their ids mean different "
            f"words; give --tokenizer-name {name}"
        )
    if loaded.max_positions < config.data.max_tokens:
        raise CheckpointError(
            f"--hf-model-path {name} knows {loaded.max_positions} positions, fewer than "
            f"--max-tokens {config.data.max_tokens}; lower --max-tokens"
        )
    # The network is what the weights are; only what no weight depends on is still free to choose.
    model_config = dataclasses.replace(
        loaded,
        dropout=config.model.dropout,
        attention_dropout=config.model.attention_dropout,
        activation_dropout=config.model.activation_dropout,
        mask_token_id=text.vocabulary.mask_id,
    )
    model = MPNetForPretraining(model_config)
    model.load_state_dict(tensors)
    return model, [f"starting from {name}: its architecture replaces the flags", *notes]


def identity_of(config: PretrainingConfig, text: Text) -> dict[str, str | int | float]:
    """Return what must be the same when a run is resumed, under the names of `--allow-change`."""
    objective, optimization = config.objective, config.optimization
    return {
        "data": text.train.fingerprint,
        "tokenizer": tokenizer_hash(text.tokenizer),
        "seed": config.run.seed,
        "batch": optimization.batch_size * optimization.update_freq,
        "length": config.data.max_tokens,
        "masking": (
            f"{objective.input_mode}, predicted {objective.pred_prob:g}, kept "
            f"{objective.keep_prob:g}, random {objective.rand_prob:g}, whole words "
            f"{objective.whole_word_mask}"
        ),
    }


def measure_plateau(text: Text) -> Plateau | None:
    """Return the unigram plateau of the validation text, if there is one."""
    if text.valid is None:
        return None
    is_special_V = text.vocabulary.is_special_V
    train_V = token_counts(text.train, is_special_V)
    valid_V = token_counts(text.valid, is_special_V)
    return Plateau(unigram_bits(train_V, valid_V), unigram_accuracy(train_V, valid_V))


def plan(
    config: PretrainingConfig,
    text: Text,
    model: MPNetForPretraining,
    device: torch.device,
    bf16: bool,
) -> Iterator[str]:
    """Yield the lines that say what is about to be done."""
    optimization = config.optimization
    sequences = optimization.batch_size * optimization.update_freq
    parameters = sum(parameter.numel() for parameter in model.parameters())
    epochs = sequences * optimization.total_updates / len(text.train)
    why = "asked for" if config.run.device != "auto" else "the best that PyTorch finds here"
    yield f"device: {device} ({why}), {'bfloat16' if bf16 else 'float32'}"
    yield (
        f"model: {parameters / 1e6:.1f} M parameters, {model.config.encoder_layers} layers, "
        f"{model.config.encoder_embed_dim} wide, {model.config.vocab_size:,} tokens"
    )
    yield f"training text: {text.train.report}"
    if text.valid is not None:
        yield f"validation text: {text.valid.report}"
    else:
        yield "no validation text: the last model counts as the best (give --valid-file)"
    yield (
        f"training: {optimization.total_updates:,} updates of {sequences:,} rows, up to "
        f"{sequences * config.data.max_tokens:,} tokens; {epochs:.2f} epochs"
    )
