"""How much of a difference a mistake makes: the table in the docstring of `proof.py`."""

import dataclasses

import pytest
import torch
from torch import Tensor
from transformers import MPNetForMaskedLM

from annotated_mpnet.conversion.names import to_hugging_face, to_mpnet_config
from annotated_mpnet.conversion.proof import TOLERANCE, probe_batch
from annotated_mpnet.mpnet.config import ModelConfig
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining

# As wide as MPNet-base: in a narrow network with fresh weights all scores are almost zero, and what
# is wrong with attention makes no difference.
CONFIG = ModelConfig(vocab_size=99, encoder_layers=1)
ATTENTION = "mpnet.encoder.layer.0.attention.attn"


@pytest.fixture(scope="module")
def fresh() -> MPNetForPretraining:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MPNetForPretraining(CONFIG).eval()


def difference(ours: MPNetForPretraining, theirs: dict[str, Tensor], **changes: object) -> float:
    """Return what `compare_logits` would for these tensors under a changed configuration."""
    changed = dataclasses.replace(CONFIG, **changes)  # type: ignore[arg-type]
    model = MPNetForMaskedLM(to_mpnet_config(changed, 0, 2)).eval()
    model.load_state_dict(theirs, strict=False)
    input_ids, attention_mask = probe_batch(CONFIG)
    with torch.no_grad():
        wanted = ours.logits(ours.encode(input_ids, attention_mask))
        found = model(input_ids=input_ids, attention_mask=attention_mask).logits
    return float((wanted - found).abs()[attention_mask != 0].max())


def swapped(tensors: dict[str, Tensor], first: str, second: str) -> dict[str, Tensor]:
    pairs = [(f"{first}.{leaf}", f"{second}.{leaf}") for leaf in ("weight", "bias")]
    other = {a: tensors[b] for a, b in pairs} | {b: tensors[a] for a, b in pairs}
    return {**tensors, **other}


def test_each_mistake_makes_the_difference_that_the_docstring_says(
    fresh: MPNetForPretraining,
) -> None:
    right = to_hugging_face(fresh.state_dict())
    positions = "mpnet.embeddings.position_embeddings.weight"
    bias = "mpnet.encoder.relative_attention_bias.weight"
    found = {
        "positions": difference(fresh, {**right, positions: right[positions].roll(1, 0)}),
        "q and v": difference(fresh, swapped(right, f"{ATTENTION}.q", f"{ATTENTION}.v")),
        "q and k": difference(fresh, swapped(right, f"{ATTENTION}.q", f"{ATTENTION}.k")),
        "bias": difference(fresh, {**right, bias: torch.zeros_like(right[bias])}),
        "eps": difference(fresh, right, layer_norm_eps=1e-12),
        "nothing": difference(fresh, right),
    }
    assert found.pop("nothing") < TOLERANCE / 10
    said = {"positions": 2.4, "q and v": 0.7, "q and k": 0.05, "bias": 0.002, "eps": 0.0005}
    assert found == pytest.approx(said, rel=0.3)
    assert min(found.values()) > TOLERANCE


def test_what_only_training_can_tell_apart_is_not_seen_before(fresh: MPNetForPretraining) -> None:
    right = to_hugging_face(fresh.state_dict())
    layer = "mpnet.encoder.layer.0"
    other = swapped(right, f"{layer}.attention.LayerNorm", f"{layer}.output.LayerNorm")
    assert difference(fresh, other) < TOLERANCE
