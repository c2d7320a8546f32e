"""Documents that share a sequence do not see each other."""

from dataclasses import dataclass

import pytest
import torch

from annotated_mpnet.mpnet.batch import NOT_PREDICTED
from annotated_mpnet.mpnet.config import InputMode, ModelConfig
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining, cross_entropy_sum

TOLERANCE = 1e-5
LENGTHS = (9, 17, 6)
PADDING = 3
CONFIG = ModelConfig(
    vocab_size=53,
    encoder_layers=3,
    encoder_embed_dim=32,
    encoder_ffn_dim=64,
    encoder_attention_heads=4,
    max_positions=64,
    dropout=0.0,
    attention_dropout=0.0,
    activation_dropout=0.0,
)


@dataclass
class Document:
    input_ids: torch.Tensor
    predicted_positions: torch.Tensor
    predicted_ids: torch.Tensor


def make_documents() -> list[Document]:
    generator = torch.Generator().manual_seed(3)
    documents = []
    for length in LENGTHS:
        order = torch.randperm(length - 2, generator=generator) + 1
        predicted = order[: max(1, round(0.3 * length))]
        ids = torch.randint(5, 53, (length,), generator=generator)
        documents.append(Document(ids, predicted, ids.flip(0)[predicted]))
    return documents


def share_a_sequence(documents: list[Document]) -> tuple[torch.Tensor, ...]:
    """Return the tensors of one sequence with all documents, padding and two empty slots."""
    starts = torch.tensor([0, *LENGTHS]).cumsum(0)
    numbers = [torch.full((len(d.input_ids),), n + 1) for n, d in enumerate(documents)]
    sequence = (
        torch.cat([*(d.input_ids for d in documents), torch.ones(PADDING, dtype=torch.long)]),
        torch.cat(
            [
                *(d.predicted_positions + s for d, s in zip(documents, starts, strict=False)),
                torch.zeros(2, dtype=torch.long),
            ]
        ),
        torch.cat([*(d.predicted_ids for d in documents), torch.full((2,), NOT_PREDICTED)]),
        torch.cat([*numbers, torch.zeros(PADDING, dtype=torch.long)]),
    )
    return tuple(tensor[None] for tensor in sequence)


def make_model(**changes: object) -> MPNetForPretraining:
    torch.manual_seed(0)
    model = MPNetForPretraining(ModelConfig(**{**vars(CONFIG), **changes}))
    for parameter in model.parameters():  # larger than initial weights, so that attention matters
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("mode", ["mpnet", "mlm", "plm"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"relative_attention_num_buckets": 0}, {"normalize_before": True}],
    ids=["post-norm", "no bias", "pre-norm"],
)
def test_documents_in_one_sequence_have_the_same_loss_and_gradients_as_alone(
    mode: InputMode, changes: dict[str, object]
) -> None:
    documents, model = make_documents(), make_model(**changes)
    input_ids, positions, ids, numbers = share_a_sequence(documents)
    together = model(input_ids, positions, ids, numbers, mode)
    loss = cross_entropy_sum(together, ids)
    loss.backward()
    shared = {name: p.grad.clone() for name, p in model.named_parameters()}

    model.zero_grad()
    alone = [
        model(d.input_ids[None], d.predicted_positions[None], d.predicted_ids[None], None, mode)
        for d in documents
    ]
    losses = [
        cross_entropy_sum(logits, d.predicted_ids[None])
        for logits, d in zip(alone, documents, strict=True)
    ]
    torch.stack(losses).sum().backward()

    used = torch.cat(alone, dim=1)
    torch.testing.assert_close(together[:, : used.shape[1]], used, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(loss, torch.stack(losses).sum(), atol=TOLERANCE, rtol=1e-6)
    for name, parameter in model.named_parameters():
        difference = (shared[name] - parameter.grad).norm() / parameter.grad.norm().clamp(min=1e-6)
        assert difference < TOLERANCE, name


def test_documents_in_one_sequence_have_the_same_hidden_states_as_alone() -> None:
    documents, model = make_documents(), make_model()
    input_ids, _, _, numbers = share_a_sequence(documents)
    together = model.encode(input_ids, numbers)[0].split([*LENGTHS, PADDING])
    for document, hidden in zip(documents, together, strict=False):
        alone = model.encode(document.input_ids[None])[0]
        torch.testing.assert_close(hidden, alone, atol=TOLERANCE, rtol=0)


def test_without_document_numbers_they_would_see_each_other() -> None:
    # So the two tests above can fail.
    documents, model = make_documents(), make_model()
    input_ids, _, _, numbers = share_a_sequence(documents)
    blind = model.encode(input_ids, (numbers != 0).long())[0, : LENGTHS[0]]
    alone = model.encode(documents[0].input_ids[None])[0]
    assert (blind - alone).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int32])
def test_an_attention_mask_of_any_type_means_the_same(dtype: torch.dtype) -> None:
    model = make_model()
    input_ids = torch.randint(5, 53, (2, 10))
    mask = torch.tensor([[1] * 10, [0, 0] + [1] * 6 + [0, 0]])
    torch.testing.assert_close(
        model.encode(input_ids, mask.to(dtype)), model.encode(input_ids, mask)
    )


def test_padding_on_the_left_changes_no_position() -> None:
    model = make_model()
    ids = torch.randint(5, 53, (1, 8))
    padded = torch.cat([torch.ones(1, 3, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(11) >= 3).long()[None]
    torch.testing.assert_close(
        model.encode(padded, mask)[:, 3:], model.encode(ids), atol=TOLERANCE, rtol=0
    )
