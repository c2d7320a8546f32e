"""Which entry sees which: the paper's claims, tested on the behaviour of the network.

Only the last few tests look at masks. The others change an input token: exactly the outputs that
may depend on it change, and the others keep their bits.
"""

import dataclasses
from dataclasses import replace

import pytest
import torch
from samples import (
    INPUT_MODES,
    TINY,
    logits_of,
    random_batch,
    random_model,
    with_token,
)

from annotated_mpnet.mpnet.batch import NOT_PREDICTED, Batch
from annotated_mpnet.mpnet.config import InputMode
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining
from annotated_mpnet.mpnet.two_stream import Block, mpnet_entries, plm_entries

# With one layer an entry knows only what it sees; with two, also what its keys have seen.
ONE_LAYER = dataclasses.replace(TINY, encoder_layers=1)
NUM_PREDICTED = 5


def sentence(input_mode: InputMode) -> Batch:
    return random_batch(1, [18], [NUM_PREDICTED], input_mode=input_mode)


def changed_slots(
    model: MPNetForPretraining, one: Batch, other: Batch, mode: InputMode
) -> list[int]:
    """Return the slots 1..P whose logits differ at all."""
    with torch.no_grad():
        one_PV = logits_of(model, one, mode)[0]
        other_PV = logits_of(model, other, mode)[0]
    return [
        slot + 1 for slot in range(len(one_PV)) if not torch.equal(one_PV[slot], other_PV[slot])
    ]


def with_other_original(batch: Batch, slot: int, input_mode: InputMode) -> Batch:
    """Replace the original token of a slot, wherever the mode keeps it."""
    place = int(batch.predicted_positions[0, slot - 1])
    other = int(batch.predicted_ids[0, slot - 1]) % 20 + 6
    changed = with_token(batch, "predicted_ids", (0, slot - 1), other)
    return with_token(changed, "input_ids", (0, place), other) if input_mode == "plm" else changed


@pytest.mark.parametrize("slot", range(1, NUM_PREDICTED + 1))
@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("input_mode", ["mpnet", "plm"])
def test_query_never_sees_the_token_it_predicts(
    input_mode: InputMode, pre_norm: bool, slot: int
) -> None:
    model = random_model(dataclasses.replace(TINY, normalize_before=pre_norm))
    batch = sentence(input_mode)
    other = with_other_original(batch, slot, input_mode)
    later = list(range(slot + 1, NUM_PREDICTED + 1))
    assert changed_slots(model, batch, other, input_mode) == later


def test_masked_language_model_sees_no_original_token_at_all() -> None:
    batch = sentence("mlm")
    for slot in range(1, NUM_PREDICTED + 1):
        other = with_other_original(batch, slot, "mlm")
        assert changed_slots(random_model(TINY), batch, other, "mlm") == []


@pytest.mark.parametrize("input_mode", INPUT_MODES)
def test_every_prediction_sees_all_tokens_that_are_not_predicted(input_mode: InputMode) -> None:
    batch = sentence(input_mode)
    known = next(p for p in range(18) if p not in batch.predicted_positions[0].tolist())
    other = with_token(batch, "input_ids", (0, known), 30)
    everyone = list(range(1, NUM_PREDICTED + 1))
    assert changed_slots(random_model(ONE_LAYER), batch, other, input_mode) == everyone


@pytest.mark.parametrize("slot", range(1, NUM_PREDICTED + 1))
def test_a_corrupted_token_is_seen_until_the_original_is_revealed(slot: int) -> None:
    batch = sentence("mpnet")
    place = int(batch.predicted_positions[0, slot - 1])
    other = with_token(batch, "input_ids", (0, place), 30)
    before = list(range(1, slot + 1))
    assert changed_slots(random_model(ONE_LAYER), batch, other, "mpnet") == before


def test_a_query_starts_as_the_corrupted_token_of_its_position() -> None:
    # Without attention, a query knows only its own input.
    model = random_model(TINY)
    with torch.no_grad():
        for layer in model.sentence_encoder.layers:
            layer.self_attn.out_proj.weight.zero_()
    batch = sentence("mpnet")
    for slot in range(1, NUM_PREDICTED + 1):
        place = int(batch.predicted_positions[0, slot - 1])
        other = with_token(batch, "input_ids", (0, place), 30)
        assert changed_slots(model, batch, other, "mpnet") == [slot]


def test_queries_of_permuted_language_modelling_start_as_masks() -> None:
    batch = sentence("plm")
    model = random_model(TINY)
    config = dataclasses.replace(TINY, mask_token_id=9)
    other = MPNetForPretraining(config).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        before, after = logits_of(model, batch, "plm"), logits_of(other, batch, "plm")
        assert not torch.isclose(before, after).all(dim=2).any()
        # The other two modes read masks from the input and need no mask id.
        for mode in ("mpnet", "mlm"):
            assert torch.equal(logits_of(model, batch, mode), logits_of(other, batch, mode))


def test_first_prediction_is_berts_and_the_second_is_not() -> None:
    model, batch = random_model(TINY), sentence("mpnet")
    with torch.no_grad():
        mpnet_PV, mlm_PV = logits_of(model, batch, "mpnet")[0], logits_of(model, batch, "mlm")[0]
    torch.testing.assert_close(mpnet_PV[0], mlm_PV[0], rtol=0, atol=1e-4)
    for slot in range(1, NUM_PREDICTED):
        assert (mpnet_PV[slot] - mlm_PV[slot]).abs().max() > 1e-2


def test_only_masked_language_modelling_ignores_the_order() -> None:
    order = torch.tensor([3, 0, 4, 1, 2])
    for mode in INPUT_MODES:
        batch, model = sentence(mode), random_model(TINY)
        turned = replace(
            batch,
            predicted_positions=batch.predicted_positions[:, order],
            predicted_ids=batch.predicted_ids[:, order],
        )
        with torch.no_grad():
            one_PV, other_PV = logits_of(model, batch, mode)[0], logits_of(model, turned, mode)[0]
        difference = (one_PV[order] - other_PV).abs().max()
        assert difference < 1e-4 if mode == "mlm" else difference > 1e-2


def test_encode_with_the_head_is_masked_language_modelling() -> None:
    model = random_model(TINY)
    batch = random_batch(4, [9, 16], [2, 3])
    with torch.no_grad():
        hidden_BLD = model.encode(batch.input_ids, batch.attention_mask)
        logits_BPV = logits_of(model, batch, "mlm")
        every_logit_BLV = model.logits(hidden_BLD)
    for i, slot in (batch.predicted_ids != NOT_PREDICTED).nonzero().tolist():
        place = batch.predicted_positions[i, slot]
        torch.testing.assert_close(
            every_logit_BLV[i, place], logits_BPV[i, slot], rtol=0, atol=1e-4
        )


@pytest.mark.parametrize("input_mode", INPUT_MODES)
def test_padding_is_never_seen(input_mode: InputMode) -> None:
    model = random_model(TINY)
    batch = random_batch(2, [7, 12], [2, 3], input_mode=input_mode)
    filled = with_token(batch, "input_ids", (0, 9), 30)
    with torch.no_grad():
        before, after = logits_of(model, batch, input_mode), logits_of(model, filled, input_mode)
        hidden = model.encode(batch.input_ids, batch.attention_mask)[0, :7]
        hidden_after = model.encode(filled.input_ids, batch.attention_mask)[0, :7]
    assert torch.equal(before.nan_to_num(), after.nan_to_num())
    assert torch.equal(hidden, hidden_after)


@pytest.mark.parametrize("input_mode", INPUT_MODES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(side: str, input_mode: InputMode) -> None:
    model, width = random_model(TINY), 6
    batch = random_batch(3, [14, 14], [4, 2], input_mode=input_mode)
    padding = (width, 0) if side == "left" else (0, width)
    padded = replace(
        batch,
        input_ids=torch.nn.functional.pad(batch.input_ids, padding, value=TINY.pad_token_id),
        attention_mask=torch.nn.functional.pad(torch.ones(2, 14, dtype=torch.long), padding),
        predicted_positions=batch.predicted_positions + padding[0],
    )
    with torch.no_grad():
        before, after = logits_of(model, batch, input_mode), logits_of(model, padded, input_mode)
    torch.testing.assert_close(before, after, rtol=0, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("input_mode", INPUT_MODES)
@pytest.mark.parametrize("used", [[0, 1, 2], [1, 2, 4], [2, 3, 4]])
def test_empty_slots_change_nothing(used: list[int], input_mode: InputMode) -> None:
    model = random_model(TINY)
    batch = random_batch(5, [15, 11], [3, 3], input_mode=input_mode)
    # Empty slots hold the position of a token that is predicted elsewhere.
    positions = batch.predicted_positions[:, :1].repeat(1, 5)
    positions[:, used] = batch.predicted_positions
    ids = torch.full((2, 5), NOT_PREDICTED)
    ids[:, used] = batch.predicted_ids
    wider = replace(batch, predicted_positions=positions, predicted_ids=ids)
    with torch.no_grad():
        before, after = logits_of(model, batch, input_mode), logits_of(model, wider, input_mode)
        losses = model.loss_sum(batch, input_mode), model.loss_sum(wider, input_mode)
    torch.testing.assert_close(before, after[:, used], rtol=0, atol=1e-4)
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("input_mode", INPUT_MODES)
def test_the_content_of_an_empty_slot_changes_nothing(input_mode: InputMode) -> None:
    model = random_model(TINY)
    batch = random_batch(6, [15, 11], [3, 1], input_mode=input_mode)
    garbage = with_token(batch, "predicted_positions", (1, 2), 12345)
    garbage = with_token(garbage, "predicted_positions", (1, 1), -1)
    with torch.no_grad():
        before, after = logits_of(model, batch, input_mode), logits_of(model, garbage, input_mode)
    assert torch.equal(before.nan_to_num(), after.nan_to_num())


@pytest.mark.parametrize("input_mode", INPUT_MODES)
def test_a_sample_does_not_depend_on_its_batch(input_mode: InputMode) -> None:
    model = random_model(TINY)
    lengths, counts = [9, 17, 12], [2, 4, 3]
    batch = random_batch(8, lengths, counts, input_mode=input_mode)
    assert batch.attention_mask is not None
    with torch.no_grad():
        together_BPV = logits_of(model, batch, input_mode)
        for i, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            alone = Batch(
                batch.input_ids[i : i + 1, :length],
                batch.predicted_positions[i : i + 1, :count],
                batch.predicted_ids[i : i + 1, :count],
                None,
                length,
                count,
            )
            alone_PV = logits_of(model, alone, input_mode)[0]
            torch.testing.assert_close(together_BPV[i, :count], alone_PV, rtol=0, atol=1e-4)


def test_encode_sees_tokens_on_both_sides() -> None:
    model, input_ids = random_model(ONE_LAYER), sentence("mlm").input_ids
    with torch.no_grad():
        before_LD = model.encode(input_ids)[0]
        for place in (0, 8, 17):
            other = input_ids.clone()
            other[0, place] = 30
            assert not (model.encode(other)[0] == before_LD).all(dim=1).any()


@pytest.mark.parametrize("kind", ["dropout", "attention_dropout", "activation_dropout"])
@pytest.mark.parametrize("input_mode", INPUT_MODES)
def test_dropout_acts_in_training_only(kind: str, input_mode: InputMode) -> None:
    plain = random_model(TINY)
    dropping = MPNetForPretraining(dataclasses.replace(TINY, **{kind: 0.5}))
    dropping.load_state_dict(plain.state_dict())
    batch = sentence(input_mode)
    with torch.no_grad():
        wanted = logits_of(plain, batch, input_mode)
        assert torch.equal(logits_of(dropping.eval(), batch, input_mode), wanted)
        torch.manual_seed(0)
        assert not torch.isclose(logits_of(dropping.train(), batch, input_mode), wanted).all()
        assert torch.equal(logits_of(plain.train(), batch, input_mode), wanted)


SILENCED = {
    "the embeddings": (".out_proj.", ".fc2."),
    "the attention result": (".emb_layer_norm.", ".fc2."),
    "the feed-forward result": (".emb_layer_norm.", ".out_proj."),
}


@pytest.mark.parametrize("place", SILENCED)
def test_dropout_acts_on(place: str) -> None:
    # Dropout leaves zeros alone. With zeros in the other two places, only this one can act.
    model = random_model(dataclasses.replace(ONE_LAYER, dropout=0.5))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in SILENCED[place]):
                parameter.zero_()
        wanted = logits_of(model, sentence("mlm"), "mlm")
        torch.manual_seed(0)
        assert not torch.isclose(logits_of(model.train(), sentence("mlm"), "mlm"), wanted).all()


@pytest.mark.parametrize("input_mode", INPUT_MODES)
def test_every_weight_is_used(input_mode: InputMode) -> None:
    model, batch = random_model(TINY), random_batch(9, [30], [6], input_mode=input_mode)
    model.loss_sum(batch, input_mode).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("input_mode", INPUT_MODES)
def test_a_batch_that_predicts_nothing_has_no_loss_and_no_gradient(input_mode: InputMode) -> None:
    model, batch = random_model(TINY), sentence(input_mode)
    nothing = replace(batch, predicted_ids=torch.full_like(batch.predicted_ids, NOT_PREDICTED))
    loss_sum = model.loss_sum(nothing, input_mode)
    assert loss_sum.item() == 0.0
    loss_sum.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or not parameter.grad.any(), name


def test_an_unknown_mode_and_a_sequence_that_is_too_long_are_refused() -> None:
    model, batch = random_model(TINY), sentence("mpnet")
    with pytest.raises(ValueError, match="input_mode is 'bert'"):
        model.loss_sum(batch, "bert")  # type: ignore[arg-type]
    long = random_batch(0, [TINY.max_positions + 1], [2])
    with pytest.raises(ValueError, match="41 tokens"):
        model.loss_sum(long)
    with pytest.raises(ValueError, match="41 tokens"):
        model.encode(long.input_ids)


# The masks themselves.


def visible(block: Block) -> torch.Tensor:
    assert block.visibility is not None
    return block.visibility.matrix()


@pytest.mark.parametrize("lengths", [[18, 18], [18, 11]])
def test_every_entry_sees_each_position_exactly_once(lengths: list[int]) -> None:
    batch = random_batch(10, lengths, [5, 3])
    entries = mpnet_entries(
        batch.input_ids, batch.predicted_positions, batch.predicted_ids, batch.attention_mask
    )
    sentence_block, staircase = entries.blocks
    assert sentence_block.query_positions.shape == (1, 18)
    assert sentence_block.key_positions.shape == (1, 18)
    if batch.attention_mask is None:
        assert sentence_block.visibility is None
    else:
        seen = visible(sentence_block).expand(2, 18, 18).sum(dim=2)
        assert (seen == torch.tensor(lengths)[:, None]).all()

    used_BP = batch.predicted_ids != NOT_PREDICTED
    for sample, query in torch.cat([used_BP, used_BP], dim=1).nonzero().tolist():
        seen = staircase.key_positions[sample][visible(staircase)[sample, query]]
        assert sorted(seen.tolist()) == list(range(lengths[sample]))


@pytest.mark.parametrize("mode", ["mpnet", "plm"])
def test_the_last_layer_sees_what_the_queries_see_in_the_others(mode: InputMode) -> None:
    batch = random_batch(11, [18, 11], [5, 3], input_mode=mode)
    tensors = batch.input_ids, batch.predicted_positions, batch.predicted_ids, batch.attention_mask
    entries = plm_entries(*tensors, mask_token_id=4) if mode == "plm" else mpnet_entries(*tensors)
    in_others = visible(entries.blocks[-1])[:, -NUM_PREDICTED:]
    assert torch.equal(visible(entries.last_block), in_others)


def test_an_entry_of_permuted_language_modelling_sees_the_revealed_tokens() -> None:
    batch = random_batch(12, [18, 11], [5, 3], input_mode="plm")
    entries = plm_entries(
        batch.input_ids,
        batch.predicted_positions,
        batch.predicted_ids,
        batch.attention_mask,
        mask_token_id=4,
    )
    (block,) = entries.blocks
    for sample, (length, count) in enumerate([(18, 5), (11, 3)]):
        predicted = batch.predicted_positions[sample, :count].tolist()
        known = set(range(length)) - set(predicted)
        for j, place in enumerate(predicted):
            content = visible(block)[sample, place].nonzero().flatten().tolist()
            query = visible(block)[sample, 18 + j].nonzero().flatten().tolist()
            assert set(content) == known | set(predicted[: j + 1])
            assert set(query) == known | set(predicted[:j])


def test_only_the_staircase_costs_more_than_bert() -> None:
    length, num_predicted = 20, 3
    batch = random_batch(13, [length], [num_predicted])
    entries = mpnet_entries(
        batch.input_ids, batch.predicted_positions, batch.predicted_ids, batch.attention_mask
    )
    scores = sum(
        block.query_positions.shape[1] * block.key_positions.shape[1] for block in entries.blocks
    )
    assert scores / length**2 == pytest.approx(1.345)
