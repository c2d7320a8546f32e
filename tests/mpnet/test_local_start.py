"""The local start changes the bias table by its formula, and nothing else."""

import math

import pytest
import torch

from annotated_mpnet.mpnet.config import ModelConfig
from annotated_mpnet.mpnet.local_start import local_bias, start_locally
from annotated_mpnet.mpnet.positions import relative_position_bucket
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining

SMALL = {"encoder_layers": 1, "encoder_embed_dim": 12, "encoder_ffn_dim": 12, "vocab_size": 20}


def bucket_of(distance: int) -> int:
    return int(relative_position_bucket(torch.tensor(distance), 32, 128))


@pytest.mark.parametrize(("head", "offset"), [(0, -1), (1, 1), (4, -1), (9, 1)])
def test_a_local_head_prefers_its_neighbour_by_the_formula(head: int, offset: int) -> None:
    bias_SH = local_bias(32, 128, num_heads=12)
    # Up to 7, a bucket holds one distance; bucket 8 holds 8 to 11, bucket 15 all from 91.
    for distance in range(-7, 8):
        expected = -2 * math.log2(1 + abs(distance - offset))
        assert bias_SH[bucket_of(distance), head] == pytest.approx(expected, abs=1e-5)
    for distances in (range(8, 12), range(-11, -7), range(91, 129), range(-128, -90)):
        mean = sum(-2 * math.log2(1 + abs(each - offset)) for each in distances) / len(distances)
        assert bias_SH[bucket_of(distances[0]), head] == pytest.approx(mean, abs=1e-4)


def test_half_of_the_heads_start_free() -> None:
    bias_SH = local_bias(32, 128, num_heads=12)
    free = [head for head in range(12) if not bias_SH[:, head].any()]
    assert free == [2, 3, 6, 7, 10, 11]


@pytest.mark.parametrize(("buckets", "distance"), [(4, 2), (8, 8), (64, 500), (32, 128)])
@pytest.mark.parametrize("heads", [1, 2, 3, 16])
def test_any_table_gets_finite_values_and_0_at_the_preferred_distance(
    buckets: int, distance: int, heads: int
) -> None:
    bias_SH = local_bias(buckets, distance, heads)
    assert bias_SH.shape == (buckets, heads)
    assert bias_SH.isfinite().all()
    assert (bias_SH <= 0).all()


def test_only_the_table_changes_and_keeps_its_noise() -> None:
    torch.manual_seed(0)
    model = MPNetForPretraining(ModelConfig(**SMALL))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    table = model.sentence_encoder.relative_attention_bias
    assert table is not None
    start_locally(table)
    for name, tensor in model.state_dict().items():
        added = tensor - before[name]
        expected = local_bias(32, 128, 12) if name.endswith("relative_attention_bias.weight") else 0
        torch.testing.assert_close(added, torch.zeros_like(added) + expected, atol=1e-5, rtol=0)
    assert table.weight.requires_grad
