"""What a run needs before its first update: device, text, network, and a plan to show.

The order is that of what can go wrong: cheap checks come before expensive ones. All text is found
(`data/texts.py`) before a network is built.

Next: `run.py`, which puts these together.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from annotated_mpnet import conversion
from annotated_mpnet.config import ModelConfig, PretrainingConfig
from annotated_mpnet.data import PackedRows, tokenizer_hash
from annotated_mpnet.data.statistics import (
    token_counts,
    unigram_accuracy,
    unigram_bits,
    unigram_log_probabilities,
)
from annotated_mpnet.data.texts import Text
from annotated_mpnet.errors import CheckpointError, ConfigError
from annotated_mpnet.modeling import MPNetForPretraining
from annotated_mpnet.randomness import fold_in_seed


@dataclass(frozen=True)
class Plateau:
    """What guessing by frequency reaches on the validation text (`data/statistics.py`).

    Attributes:
        bits: per predicted token.
        accuracy: of always guessing the most frequent token.
    """

    bits: float
    accuracy: float


def choose_device(config: PretrainingConfig) -> tuple[torch.device, bool]:
    """Return the device to train on, and whether matrix products run in bfloat16 there.

    bfloat16 has the range of float32 with 8 instead of 24 bits of precision: no loss scaling is
    needed, as with float16, and a GPU computes products several times faster. A CPU stays with
    float32 unless told otherwise: few CPUs gain by it, and exactness is worth more there.

    Raises:
        ConfigError: the device that was asked for is not there.
    """
    # In the order of preference.
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    wanted = config.machine.device
    if wanted == "auto":
        name = next(name for name, there in available.items() if there)
    elif available[wanted]:
        name = wanted
    else:
        there = ", ".join(name for name, is_there in available.items() if is_there)
        raise ConfigError(f"--device is {wanted}, which PyTorch does not find here; it has {there}")
    precision = config.machine.precision
    return torch.device(name), precision == "bf16" or (precision == "auto" and name == "cuda")


def build_model(config: PretrainingConfig, text: Text) -> tuple[MPNetForPretraining, list[str]]:
    """Return the network as it is before the first update, on the CPU, and notes for the user.

    Raises:
        CheckpointError: `--hf-model-path` holds no MPNet, or one with another vocabulary or with
            fewer positions than a row has.
    """
    # Weights are a function of the seed alone: the demo makes the untrained network once more.
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
        counts_V = text.training_counts
        if counts_V is None:
            raise ConfigError(
                "--head-bias frequencies needs text to count, and a stream is not read twice for "
                "it; give --eval-samples, --valid-file or --no-streaming"
            )
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
        "packing": config.data.packing,
        "masking": (
            f"{objective.input_mode}, predicted {objective.pred_prob:g}, kept "
            f"{objective.keep_prob:g}, random {objective.rand_prob:g}, whole words "
            f"{objective.whole_word_mask}"
        ),
    }


def measure_plateau(text: Text) -> Plateau | None:
    """Return the unigram plateau of the validation text, if there is one."""
    train_V = text.training_counts
    if text.valid is None or train_V is None:
        return None
    valid_V = token_counts(text.valid, text.vocabulary.is_special_V)
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
    why = "asked for" if config.machine.device != "auto" else "the best that PyTorch finds here"
    yield f"device: {device} ({why}), {'bfloat16' if bf16 else 'float32'}"
    yield (
        f"model: {parameters / 1e6:.1f} M parameters, {model.config.encoder_layers} layers, "
        f"{model.config.encoder_embed_dim} wide, {model.config.vocab_size:,} tokens"
    )
    if isinstance(text.train, PackedRows):
        yield f"training text: {text.train.report}"
        epochs = f"; {sequences * optimization.total_updates / len(text.train):.2f} epochs"
    else:
        yield f"training text: stream of {text.train.fingerprint}"
        epochs = ""
    if text.valid is not None:
        yield f"validation text: {text.valid.report}"
    else:
        yield "no validation text: the last model counts as the best (give --valid-file)"
    yield (
        f"training: {optimization.total_updates:,} updates of {sequences:,} rows, up to "
        f"{sequences * config.data.max_tokens:,} tokens{epochs}"
    )
