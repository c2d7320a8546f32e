"""The paper's permuted two-stream MPNet, written as plainly as possible, to test our model.

Our model never permutes anything (`mpnet/two_stream.py`). To check that this is right, here is
MPNet as in the paper and in Microsoft's code, slow and literal: one sentence at a time, one head at
a time, every mask a separate matrix. It shares no code with the model, only the names of the
weights. The golden files show that it is right (`test_oracle.py`), so it can test shapes and
settings without golden files.

A sentence of L tokens, P of them predicted, is permuted so that the predicted ones come last, in
the order of their prediction. In `mpnet` mode the corrupted versions of the predicted tokens
(mostly masks) are appended, at the same positions. This is the *content stream*, M = L + P entries.
The *query stream* is the P corrupted tokens once more. Both attend to the content stream. An entry
that knows k predictions sees all tokens that are not predicted, the first k predicted tokens, and
the corrupted versions of the others. With four tokens, two of them predicted:

>>> for known in range(3):
...     print(known, staircase_line(2, 2, known))
0 [1, 1, 0, 0, 1, 1]
1 [1, 1, 1, 0, 0, 1]
2 [1, 1, 1, 1, 0, 0]

Content entry of prediction j: k = j. Query of prediction j: k = j - 1. All other content: k = 0.
In `plm` mode nothing is corrupted, and the queries start as masks. In `mlm` mode corrupted tokens
replace the predicted tokens, and there is no query stream.

    B batch   L tokens of a sentence   P predicted tokens   M content entries   Q queries
    D embed_dim   H heads   K head_dim   V vocabulary
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F

from annotated_mpnet.mpnet.batch import NOT_PREDICTED, Batch
from annotated_mpnet.mpnet.config import InputMode, ModelConfig

Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Layout:
    """One permuted sentence: the entries of the network, and which sees which (1 or 0)."""

    content_ids: list[int]
    content_positions: list[int]
    content_sees: list[list[int]]
    query_ids: list[int]
    query_positions: list[int]
    query_sees: list[list[int]]


def oracle_logits(
    weights: Weights, config: ModelConfig, batch: Batch, input_mode: InputMode = "mpnet"
) -> torch.Tensor:
    """Return logits (B, P, V) in the type of the weights, with nan in empty slots.

    `weights` has fairseq's names without the prefix `decoder.`.
    """
    vocab = weights["lm_head.bias"]
    logits_BPV = vocab.new_full((*batch.predicted_ids.shape, len(vocab)), math.nan)
    for sample in range(len(batch.input_ids)):
        slots = (batch.predicted_ids[sample] != NOT_PREDICTED).nonzero().flatten()
        if len(slots) == 0:
            continue
        layout = lay_out(batch, sample, input_mode, config.mask_token_id)
        content_MD, query_PD = two_streams(weights, config, layout)
        predicted_PD = content_MD[-len(slots) :] if input_mode == "mlm" else query_PD
        logits_BPV[sample, slots] = lm_head(weights, config, predicted_PD)
    return logits_BPV


def oracle_encode(
    weights: Weights, config: ModelConfig, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor:
    """Return the hidden states (B, L, D) of plain sentences, with nan at padding."""
    width = config.encoder_embed_dim
    hidden_BLD = weights["lm_head.bias"].new_full((*input_ids.shape, width), math.nan)
    for sample in range(len(input_ids)):
        real = attention_mask[sample].nonzero().flatten()
        everyone = [[1] * len(real) for _ in real]
        ids = input_ids[sample, real].tolist()
        layout = Layout(ids, list(range(len(real))), everyone, [], [], [])
        hidden_BLD[sample, real], _ = two_streams(weights, config, layout)
    return hidden_BLD


def lay_out(batch: Batch, sample: int, input_mode: InputMode, mask_token_id: int) -> Layout:
    """Permute one sentence of a batch, without padding and empty slots."""
    real = list(range(batch.input_ids.shape[1]))
    if batch.attention_mask is not None:
        real = batch.attention_mask[sample].nonzero().flatten().tolist()
    tokens = batch.input_ids[sample, real].tolist()
    slots = [
        (real.index(place), original)
        for place, original in zip(
            batch.predicted_positions[sample].tolist(),
            batch.predicted_ids[sample].tolist(),
            strict=True,
        )
        if original != NOT_PREDICTED
    ]
    predicted = [place for place, _ in slots]
    originals = [original for _, original in slots]
    others = [place for place in range(len(tokens)) if place not in predicted]
    N, P = len(others), len(predicted)

    permutation = others + predicted
    other_ids = [tokens[place] for place in others]
    corrupted = [tokens[place] for place in predicted]
    if input_mode == "mlm":
        everyone = [[1] * (N + P) for _ in permutation]
        return Layout(other_ids + corrupted, permutation, everyone, [], [], [])

    times = [0] * N + list(range(1, P + 1))
    if input_mode == "plm":
        return Layout(
            content_ids=other_ids + originals,
            content_positions=permutation,
            content_sees=[staircase_line(N, P, known)[: N + P] for known in times],
            query_ids=[mask_token_id] * P,
            query_positions=predicted,
            query_sees=[staircase_line(N, P, known)[: N + P] for known in range(P)],
        )
    return Layout(
        content_ids=other_ids + originals + corrupted,
        content_positions=permutation + predicted,
        content_sees=[staircase_line(N, P, known) for known in times + [0] * P],
        query_ids=corrupted,
        query_positions=predicted,
        query_sees=[staircase_line(N, P, known) for known in range(P)],
    )


def staircase_line(num_others: int, num_predicted: int, known: int) -> list[int]:
    """Return what an entry that knows some predictions sees (1) of [others, predicted tokens,
    corrupted tokens]."""
    hidden = num_predicted - known
    return [1] * num_others + [1] * known + [0] * hidden + [0] * known + [1] * hidden


def two_streams(
    weights: Weights, config: ModelConfig, layout: Layout
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run both streams through all layers and return them: (M, D) and (P, D)."""
    content_MD = embed(weights, config, layout.content_ids, layout.content_positions)
    query_PD = embed(weights, config, layout.query_ids, layout.query_positions)
    keys = layout.content_positions
    content_bias = position_bias(weights, config, layout.content_positions, keys)
    query_bias = position_bias(weights, config, layout.query_positions, keys)
    content_bias = hide(content_bias, layout.content_sees)
    query_bias = hide(query_bias, layout.query_sees)
    for number in range(config.encoder_layers):
        # Both streams attend to the content of the layer below.
        content_MD, query_PD = (
            layer(weights, config, number, (content_MD, content_MD, content_bias)),
            layer(weights, config, number, (query_PD, content_MD, query_bias)),
        )
    if config.normalize_before:
        name = "sentence_encoder.emb_layer_norm"
        return norm(weights, config, name, content_MD), norm(weights, config, name, query_PD)
    return content_MD, query_PD


def embed(
    weights: Weights, config: ModelConfig, ids: list[int], positions: list[int]
) -> torch.Tensor:
    """Return token plus position (M, D), normalised unless the layers are pre-norm."""
    tokens = weights["sentence_encoder.embed_tokens.weight"]
    hidden_MD = tokens[torch.tensor(ids, dtype=torch.long)]
    first = config.pad_token_id + 1
    if config.position_embedding == "learned":
        table = weights["sentence_encoder.embed_positions.weight"]
        hidden_MD = hidden_MD + table[torch.tensor([first + p for p in positions]).long()]
    else:
        vectors = [sinusoid(first + p, config.encoder_embed_dim) for p in positions]
        hidden_MD = hidden_MD + tokens.new_tensor(vectors).reshape(hidden_MD.shape)
    if config.normalize_before:
        return hidden_MD
    return norm(weights, config, "sentence_encoder.emb_layer_norm", hidden_MD)


def sinusoid(position: int, width: int) -> list[float]:
    """Return fairseq's sinusoidal embedding: first all sines, then all cosines."""
    half = width // 2
    angles = [position * math.exp(-math.log(10000) / (half - 1) * i) for i in range(half)]
    return [math.sin(a) for a in angles] + [math.cos(a) for a in angles] + [0.0] * (width % 2)


def position_bias(
    weights: Weights, config: ModelConfig, queries: list[int], keys: list[int]
) -> torch.Tensor:
    """Return the bias that each head adds to its scores, (H, Q, M)."""
    heads, buckets = config.encoder_attention_heads, config.relative_attention_num_buckets
    if not buckets:
        return weights["lm_head.bias"].new_zeros(heads, len(queries), len(keys))
    table = weights["sentence_encoder.relative_attention_bias.weight"]
    farthest = config.relative_attention_max_distance
    index = [[bucket_of(k - q, buckets, farthest) for k in keys] for q in queries]
    index_QM = torch.tensor(index, dtype=torch.long).reshape(len(queries), len(keys))
    return table[index_QM].permute(2, 0, 1)


@cache
def bucket_of(offset: int, num_buckets: int, max_distance: int) -> int:
    """Return the T5 bucket of a key at `offset` to the right of its query.

    The shared buckets are exact + floor(steps * log(d / exact) / log(max / exact)). Here in whole
    numbers, without logarithms: go up one bucket while (d / exact)^steps >= (max / exact)^k.
    """
    one_side = num_buckets // 2
    exact = one_side // 2
    steps = one_side - exact
    bucket = distance = abs(offset)
    if distance >= exact:
        k = 0
        while k < steps - 1 and (
            distance**steps * exact ** (k + 1) >= max_distance ** (k + 1) * exact**steps
        ):
            k += 1
        bucket = exact + k
    return bucket + one_side if offset > 0 else bucket


def hide(bias_HQM: torch.Tensor, sees: list[list[int]]) -> torch.Tensor:
    """Set the bias to minus infinity where a query does not see a key."""
    sees_QM = torch.tensor(sees, dtype=torch.bool).reshape(bias_HQM.shape[1:])
    return bias_HQM.masked_fill(~sees_QM, -math.inf)


def layer(
    weights: Weights,
    config: ModelConfig,
    number: int,
    streams: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Run one layer for one stream: entries (Q, D), content (M, D), bias (H, Q, M)."""
    query_input_QD, content_MD, bias_HQM = streams
    name = f"sentence_encoder.layers.{number}."
    before = config.normalize_before

    residual_QD = query_input_QD
    if before:
        query_input_QD = norm(weights, config, name + "self_attn_layer_norm", query_input_QD)
        content_MD = norm(weights, config, name + "self_attn_layer_norm", content_MD)
    attended_QD = attend(weights, name + "self_attn", query_input_QD, content_MD, bias_HQM)
    hidden_QD = residual_QD + attended_QD
    if not before:
        hidden_QD = norm(weights, config, name + "self_attn_layer_norm", hidden_QD)

    residual_QD = hidden_QD
    if before:
        hidden_QD = norm(weights, config, name + "final_layer_norm", hidden_QD)
    hidden_QD = activation(config.activation_fn, linear(weights, name + "fc1", hidden_QD))
    hidden_QD = residual_QD + linear(weights, name + "fc2", hidden_QD)
    if not before:
        hidden_QD = norm(weights, config, name + "final_layer_norm", hidden_QD)
    return hidden_QD


def attend(
    weights: Weights,
    name: str,
    query_input_QD: torch.Tensor,
    content_MD: torch.Tensor,
    bias_HQM: torch.Tensor,
) -> torch.Tensor:
    """Run attention, one head after the other."""
    query_weight, key_weight, value_weight = weights[f"{name}.in_proj_weight"].chunk(3)
    query_bias, key_bias, value_bias = weights[f"{name}.in_proj_bias"].chunk(3)
    query_QD = query_input_QD @ query_weight.T + query_bias
    key_MD = content_MD @ key_weight.T + key_bias
    value_MD = content_MD @ value_weight.T + value_bias
    heads = len(bias_HQM)
    K = query_input_QD.shape[1] // heads
    attended = []
    for head in range(heads):
        part = slice(head * K, (head + 1) * K)
        score_QM = query_QD[:, part] @ key_MD[:, part].T / math.sqrt(K) + bias_HQM[head]
        attended.append(score_QM.softmax(dim=1) @ value_MD[:, part])
    return linear(weights, f"{name}.out_proj", torch.cat(attended, dim=1))


def lm_head(weights: Weights, config: ModelConfig, hidden_PD: torch.Tensor) -> torch.Tensor:
    """Return logits (P, V)."""
    hidden_PD = activation(config.activation_fn, linear(weights, "lm_head.dense", hidden_PD))
    hidden_PD = norm(weights, config, "lm_head.layer_norm", hidden_PD)
    table = weights["sentence_encoder.embed_tokens.weight"]
    return hidden_PD @ table.T + weights["lm_head.bias"]


def linear(weights: Weights, name: str, values: torch.Tensor) -> torch.Tensor:
    """Return the affine map of that name."""
    return values @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def norm(weights: Weights, config: ModelConfig, name: str, values: torch.Tensor) -> torch.Tensor:
    """Return the LayerNorm of that name."""
    scale, shift = weights[f"{name}.weight"], weights[f"{name}.bias"]
    return F.layer_norm(values, scale.shape, scale, shift, config.layer_norm_eps)


def activation(name: str, x: torch.Tensor) -> torch.Tensor:
    """Return the activation of that name, by its formula."""
    cubic = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    formulas = {
        "gelu": x * (1 + torch.erf(x / math.sqrt(2))) / 2,
        "gelu_accurate": x * (1 + torch.tanh(cubic)) / 2,
        "relu": x.clamp(min=0),
        "relu2": x.clamp(min=0) ** 2,
        "silu": x / (1 + torch.exp(-x)),
        "tanh": torch.tanh(x),
        "linear": x,
    }
    return formulas[name]
