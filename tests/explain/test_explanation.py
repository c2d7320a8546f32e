"""What is explained is what training computes."""

import math

import numpy as np
import pytest
import torch
from examples import MODES, SENTENCE, explained, explained_by_a_model, tiny_asked, with_specials
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from annotated_mpnet.errors import ConfigError
from annotated_mpnet.explain.explanation import explain
from annotated_mpnet.explain.sentence import word_tokenizer
from annotated_mpnet.mpnet.attention import EAGER, SDPA
from annotated_mpnet.mpnet.batch import Batch
from annotated_mpnet.mpnet.collator import (
    DataCollatorForMaskedPermutedLanguageModeling,
    NumberedSequence,
)
from annotated_mpnet.mpnet.config import InputMode, ObjectiveConfig
from annotated_mpnet.mpnet.pictures import draw_visibility
from annotated_mpnet.mpnet.positions import relative_position_bucket
from annotated_mpnet.mpnet.two_stream import mlm_entries, mpnet_entries, plm_entries
from annotated_mpnet.text.tokenizer import vocabulary_of


def batch_of_training(mode: InputMode, seed: int) -> tuple[Batch, PreTrainedTokenizerFast]:
    """Return the first sequence of the first epoch, as training would make it of `SENTENCE`."""
    tokenizer = word_tokenizer(SENTENCE)
    ids = [0, *tokenizer(SENTENCE, add_special_tokens=False).input_ids, 2]
    collator = DataCollatorForMaskedPermutedLanguageModeling(
        vocabulary_of(tokenizer),
        ObjectiveConfig(input_mode=mode, pred_prob=0.3),
        max_tokens=len(ids),
        seed=seed,
    )
    return collator([NumberedSequence(np.array(ids), epoch=0, index=0)]), tokenizer


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_the_explanation_draws_the_picture_of_the_book(mode: InputMode, seed: int) -> None:
    batch, tokenizer = batch_of_training(mode, seed)
    slots = batch.input_ids, batch.predicted_positions, batch.predicted_ids
    mask = tokenizer.mask_token_id
    entries = {
        "mpnet": lambda: mpnet_entries(*slots),
        "mlm": lambda: mlm_entries(*slots),
        "plm": lambda: plm_entries(*slots, mask_token_id=mask),
    }[mode]()
    words = [tokenizer.convert_ids_to_tokens(each) for each in range(len(tokenizer))]
    picture = draw_visibility(entries, words).splitlines()[1:]

    objective = explained(mode=mode, seed=seed).shown
    predicting = [each.entry for each in objective.predictions]
    drawn = []
    for number, entry in enumerate(objective.entries):
        cells = "".join(f"{'x' if sees else '.':>4}    " for sees in entry.sees)
        end = "-> loss" if number in predicting else ""
        drawn.append(f"{number:2} {entry.position:2} {entry.reads:12}{cells}{end}".rstrip())
    assert drawn == picture


@pytest.mark.parametrize("mode", MODES)
def test_a_model_attends_to_what_a_prediction_sees_and_to_nothing_else(mode: InputMode) -> None:
    objective = explained_by_a_model(mode).shown
    for each in objective.predictions:
        sees = objective.entries[each.entry].sees
        assert len(each.answer.attention) == 3
        for layer in each.answer.attention:
            assert len(layer) == 4
            for head in layer:
                assert len(head) == len(objective.keys)
                assert sum(head) == pytest.approx(1000, abs=len(head))
                assert not any(weight for weight, seen in zip(head, sees, strict=True) if not seen)
    # No weight is hidden in the rounding of all heads: what is seen is attended to by one of them.
    weights = np.array(objective.predictions[-1].answer.attention).max(axis=(0, 1))
    assert (weights > 0).tolist() == list(objective.entries[objective.predictions[-1].entry].sees)


@pytest.mark.parametrize("mode", MODES)
def test_bits_are_the_loss_of_training_and_the_best_guess_is_the_likeliest(mode: InputMode) -> None:
    batch, tokenizer = batch_of_training(mode, seed=12345)
    model = tiny_asked(tokenizer).model
    objective = explained_by_a_model(mode).shown
    with torch.no_grad():
        slots = batch.predicted_positions, batch.predicted_ids
        logits_BPV = model(batch.input_ids, *slots, input_mode=mode)
        loss = model.loss_sum(batch, mode).item()
    bits = [each.answer.bits for each in objective.predictions if each.answer.bits is not None]
    assert sum(bits) == pytest.approx(loss / math.log(2), rel=1e-5)
    assert objective.bits == pytest.approx(loss / math.log(2) / batch.num_predicted, rel=1e-5)
    best, chance = logits_BPV[0].softmax(1).max(1)[::-1]
    guesses = [each.answer.guesses[0] for each in objective.predictions]
    assert [guess.token for guess in guesses] == tokenizer.convert_ids_to_tokens(best.tolist())
    assert [guess.probability for guess in guesses] == pytest.approx(chance.tolist(), rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_recording_attention_changes_no_output(mode: InputMode) -> None:
    batch, tokenizer = batch_of_training(mode, seed=1)
    asked = tiny_asked(tokenizer)
    slots = batch.input_ids, batch.predicted_positions, batch.predicted_ids
    asked.model.use_attention(EAGER)
    with torch.no_grad():
        plain = asked.model(*slots, input_mode=mode)
        explained(mode=mode, asked=asked)  # switches recording on
        recorded = asked.model(*slots, input_mode=mode)
        asked.model.use_attention(SDPA)
        fast = asked.model(*slots, input_mode=mode)
    assert torch.equal(plain, recorded)
    torch.testing.assert_close(fast, recorded)


def test_a_sentence_encoder_attends_but_predicts_nothing() -> None:
    objective = explained_by_a_model(has_head=False).shown
    assert objective.bits is None
    for answer in (each.answer for each in objective.predictions):
        assert answer.bits is None
        assert not answer.guesses
        assert answer.attention


def test_the_shares_are_those_of_the_book() -> None:
    # As in `mpnet/pictures.py`: 100 tokens, of which the last 15 are predicted.
    text = " ".join(f"w{number}" for number in range(98))
    chosen = ",".join(map(str, range(84, 99)))
    settings = ObjectiveConfig(rand_prob=0.5, keep_prob=0.5)
    objectives = explain(text, word_tokenizer(text), settings, predict=chosen).objectives
    shares = {mode: (each.tokens, each.positions) for mode, each in objectives.items()}
    assert shares == {"mpnet": (0.92, 1.0), "mlm": (0.85, 1.0), "plm": (0.92, 0.92)}


def test_buckets_are_those_of_the_model() -> None:
    tokenizer = word_tokenizer(SENTENCE)
    numbers = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}
    explanation = explained(asked=tiny_asked(tokenizer, **numbers))
    for query, key in ((0, 0), (3, 1), (1, 3), (0, 18), (18, 0)):
        wanted = relative_position_bucket(torch.tensor(key - query), 8, 12).item()
        assert explanation.bucket(query, key) == wanted
    without = tiny_asked(tokenizer, relative_attention_num_buckets=0)
    assert explained(asked=without).buckets == ()


def test_words_that_are_named_are_predicted_in_their_order() -> None:
    def predicted(names: str) -> list[int]:
        return [each.position for each in explained(predict=names).shown.predictions]

    assert predicted("mat, sat") == [6, 3]
    assert predicted("cat,CAT") == [2, 11]
    assert predicted("the") == [5]  # before "The", which differs in a letter
    assert predicted("the,the,the,the") == [5, 9, 16, 1]
    assert predicted("7,1") == [7, 1]
    assert {each.rank for each in explained(predict="mat, sat").tokens} == {0, 1, 2}


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("dog", "--predict has 'dog', which is not in the sentence"),
        ("mat,mat", "--predict has 'mat', which occurs less often"),
        ("6,6", "--predict has '6', which occurs less often"),
        ("mat,6", "--predict has '6', which occurs less often"),
        ("0", "--predict has '0', which is not"),
        ("99", "--predict has '99', which is not"),
        ("mat,,sat", "--predict has '', which is not"),
        ("the cat", "--predict has 'the cat', which is not"),
    ],
)
def test_a_word_that_is_not_there_is_an_error(names: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        explained(predict=names)
    assert said in str(caught.value)
    assert "'mat'" in str(caught.value)


@pytest.mark.parametrize("text", ["", "  \n\t"])
def test_a_blank_sentence_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError, match="no token that could be predicted"):
        explained(text)


def test_a_sentence_that_is_too_long_is_an_error() -> None:
    explained("a " * 126)
    with pytest.raises(
        ConfigError, match=r"129 tokens .* at most 128, the number that can be drawn"
    ):
        explained("a " * 127)
    with pytest.raises(ConfigError, match="at most 9, the number of the checkpoint"):
        explained(asked=tiny_asked(word_tokenizer(SENTENCE), max_positions=9))


def test_each_token_has_the_kind_of_its_replacement() -> None:
    def kinds(**settings: float) -> set[str]:
        text = " ".join(f"w{number}" for number in range(60))
        explanation = explain(
            text, word_tokenizer(text), ObjectiveConfig(pred_prob=0.5, **settings)
        )
        for token in explanation.tokens:
            assert (token.rank > 0) == (token.kind != "")
            assert token.kind != "mask" or token.reads == "<mask>"
            assert token.kind != "kept" or token.reads == token.text
            assert token.kind != "random" or token.reads != token.text
        return {token.kind for token in explanation.tokens}

    assert kinds(rand_prob=0, keep_prob=0) == {"", "mask"}
    assert kinds(rand_prob=0, keep_prob=1) == {"", "kept"}
    assert kinds(rand_prob=0.5, keep_prob=0) == {"", "mask", "random"}


def test_pieces_of_a_word_are_one_word_and_are_predicted_together() -> None:
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "un", "##bel", "##ie", "tall", "<mask>"]
    backend = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # A template adds special tokens, which must not be there twice.
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer = with_specials(backend)
    explanation = explain(
        "tall unbelie <mask> zzz", tokenizer, ObjectiveConfig(), predict="unbelie"
    )
    assert [each.text for each in explanation.tokens] == [
        *("<s>", "tall", "un", "##bel", "##ie"),
        *("<unk>", "<unk>", "<unk>", "<unk>", "</s>"),  # `<mask>` in a text is text
    ]
    assert [each.rank for each in explanation.tokens] == [0, 0, 1, 2, 3, 0, 0, 0, 0, 0]
    assert [each.word for each in explanation.tokens][:6] == [-1, 1, 2, 2, 2, -1]
    with pytest.raises(ConfigError, match="no token that could be predicted"):
        explain("zzz", tokenizer, ObjectiveConfig())


def test_byte_level_pieces_are_shown_as_text() -> None:
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "c", "a", "f", "Ã", "©", "Ġ", "Ġc"]
    backend = Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, [("Ġ", "c")], unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    explanation = explain("café", with_specials(backend), ObjectiveConfig(), predict="café")
    assert [each.text for each in explanation.tokens] == ["<s>", *"caf", "\ufffd", "\ufffd", "</s>"]
    assert [each.rank for each in explanation.tokens] == [0, 1, 2, 3, 4, 5, 0]
