"""A padded vocabulary changes neither loss nor gradients nor predictions."""

import torch
from samples import TINY, logits_of, random_batch, random_model, relative_difference

from annotated_mpnet.fast.projection import MULTIPLE, padded_linear
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining

BATCH = random_batch(1, [18, 12], [3, 2])


def gradients(model: MPNetForPretraining) -> list[torch.Tensor]:
    loss = model.loss_sum(BATCH)
    loss.backward()  # type: ignore[no-untyped-call]
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def test_padding_changes_neither_loss_nor_gradients() -> None:
    assert TINY.vocab_size % MULTIPLE != 0
    plain, padded = random_model(TINY), random_model(TINY)
    padded.lm_head.project = padded_linear
    wanted, found = gradients(plain), gradients(padded)
    assert len(wanted) == len(found)
    for one, other in zip(found, wanted, strict=True):
        assert one.isfinite().all()
        assert relative_difference(one, other) < 1e-6


def test_no_token_beyond_the_vocabulary_is_likely() -> None:
    model = random_model(TINY).eval()
    model.lm_head.project = padded_linear
    with torch.no_grad():
        logits_BPV = logits_of(model, random_batch(1, [18, 12], [3, 3]), "mpnet")
    assert logits_BPV.shape[2] % MULTIPLE == 0
    assert logits_BPV.softmax(2)[:, :, TINY.vocab_size :].max() == 0
