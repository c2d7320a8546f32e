"""Batches and networks for tests: golden and random ones."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from safetensors import safe_open

from annotated_mpnet.mpnet.batch import NOT_PREDICTED, Batch
from annotated_mpnet.mpnet.config import InputMode, ModelConfig
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining

GOLDEN_DIRECTORY = Path(__file__).parent.parent / "golden"
GOLDEN_NAMES = ("mpnet_rel", "mpnet_norel", "mpnet_rel_prenorm", "plm_rel", "mlm_rel")
INPUT_MODES: tuple[InputMode, ...] = ("mpnet", "mlm", "plm")

LOGIT_TOLERANCE = 2e-5
LOSS_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 2e-5


@dataclass(frozen=True)
class Golden:
    """A golden file in our model's format. Names of weights and gradients keep `decoder.`."""

    config: ModelConfig
    input_mode: InputMode
    batch: Batch
    weights: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]
    logits: torch.Tensor
    loss_sum: float


def without_prefix(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("decoder."): tensor for name, tensor in tensors.items()}


def load_golden(name: str) -> Golden:
    with safe_open(GOLDEN_DIRECTORY / f"{name}.safetensors", "pt") as file:
        told = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    sizes = {
        key: int(told[key])
        for key in (
            "vocab_size",
            "encoder_layers",
            "encoder_embed_dim",
            "encoder_ffn_dim",
            "encoder_attention_heads",
            "max_positions",
            "relative_attention_num_buckets",
            "relative_attention_max_distance",
        )
    }
    if told["use_relative_positions"] == "False":
        sizes["relative_attention_num_buckets"] = 0
    config = ModelConfig(
        **sizes,
        normalize_before=told["normalize_before"] == "True",
        activation_fn=told["activation_fn"],
        pad_token_id=int(told["pad_id"]),
        mask_token_id=int(told["mask_id"]),
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
    )
    return Golden(
        config=config,
        input_mode=cast(InputMode, told["mode"]),
        batch=_golden_batch(tensors, told["mode"], int(told["pred_size"])),
        weights=_strip("weights.", tensors),
        gradients=_strip("grads.", tensors),
        logits=tensors["outputs.logits"],
        loss_sum=tensors["outputs.loss_sum"].item(),
    )


def _golden_batch(tensors: dict[str, torch.Tensor], input_mode: str, num_slots: int) -> Batch:
    input_ids = tensors["inputs.tokens"].clone()
    predicted_positions = tensors["inputs.permutation"][:, -num_slots:]
    if input_mode != "plm":
        input_ids.scatter_(1, predicted_positions, tensors["inputs.corrupted_predicted_tokens"])
    targets = tensors["inputs.targets"]
    return Batch(input_ids, predicted_positions, targets, None, input_ids.numel(), targets.numel())


def _strip(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


TINY = ModelConfig(
    vocab_size=31,
    encoder_layers=2,
    encoder_embed_dim=16,
    encoder_ffn_dim=24,
    encoder_attention_heads=4,
    max_positions=40,
    dropout=0.0,
    attention_dropout=0.0,
    activation_dropout=0.0,
)


def random_model(config: ModelConfig, seed: int = 0) -> MPNetForPretraining:
    """Return a model in evaluation mode whose weights are large enough for every part to matter.

    With initial weights of 0.02 and biases of zero, tests would not notice missing parts.
    """
    model = MPNetForPretraining(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if name.endswith("norm.weight") else 0.3 * noise)
    return model.eval()


def random_batch(
    seed: int,
    lengths: Sequence[int],
    num_predicted: Sequence[int],
    *,
    input_mode: InputMode = "mpnet",
    vocab_size: int = TINY.vocab_size,
) -> Batch:
    """Return random sentences, padded on the right to the longest, with their predictions.

    Predicted tokens are masked, replaced at random, or kept. Empty slots and padding hold what
    would do the most harm if it were read.
    """
    rng = np.random.default_rng(seed)
    shape = len(lengths), max(lengths)
    originals_BL = rng.integers(5, vocab_size, size=shape)
    input_BL = originals_BL.copy()
    positions_BP = rng.integers(0, max(lengths), size=(shape[0], max(num_predicted)))
    ids_BP = np.full_like(positions_BP, NOT_PREDICTED)
    for i, (length, count) in enumerate(zip(lengths, num_predicted, strict=True)):
        chosen = rng.permutation(length)[:count]
        positions_BP[i, :count] = chosen
        ids_BP[i, :count] = originals_BL[i, chosen]
        if input_mode != "plm":
            kinds = rng.random(count)
            random_ids = rng.integers(5, vocab_size, size=count)
            replacements = np.where(kinds < 0.6, 4, random_ids)
            input_BL[i, chosen] = np.where(kinds < 0.8, replacements, originals_BL[i, chosen])
    attention_mask = np.arange(shape[1])[None] < np.asarray(lengths)[:, None]
    return Batch(
        input_ids=torch.from_numpy(input_BL),
        predicted_positions=torch.from_numpy(positions_BP),
        predicted_ids=torch.from_numpy(ids_BP),
        attention_mask=None if attention_mask.all() else torch.from_numpy(attention_mask).long(),
        num_tokens=sum(lengths),
        num_predicted=sum(num_predicted),
    )


def logits_of(
    model: MPNetForPretraining, batch: Batch, input_mode: InputMode = "mpnet"
) -> torch.Tensor:
    """Return the model's logits (B, P, V), with nan in empty slots."""
    logits_BPV = model(
        batch.input_ids,
        batch.predicted_positions,
        batch.predicted_ids,
        batch.attention_mask,
        input_mode,
    )
    empty_BP1 = (batch.predicted_ids == NOT_PREDICTED)[:, :, None]
    return logits_BPV.masked_fill(empty_BP1, torch.nan)


def with_token(batch: Batch, name: str, place: tuple[int, int], token: int) -> Batch:
    """Return the batch with one entry of one of its tensors replaced."""
    changed = {
        "input_ids": batch.input_ids.clone(),
        "predicted_ids": batch.predicted_ids.clone(),
        "predicted_positions": batch.predicted_positions.clone(),
    }[name]
    changed[place] = token
    return replace(batch, **{name: changed})


def relative_difference(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the norm of the difference, divided by the norm of `wanted`."""
    distance = (actual.double() - wanted.double()).norm()
    return float(distance / wanted.double().norm().clamp(min=1e-12))
