import json

import numpy as np
import pytest
import toy_tokenizer
from huggingface_hub import HfApi
from tokenizers import AddedToken
from transformers import CanineTokenizer, PreTrainedTokenizerFast

from annotated_mpnet.errors import ConfigError
from annotated_mpnet.text.tokenizer import (
    check_for_export,
    load_tokenizer,
    tokenizer_hash,
    vocabulary_of,
)


@pytest.fixture
def directory(tmp_path):
    toy_tokenizer.word_piece().save_pretrained(tmp_path)
    return tmp_path


def starters(tokenizer: PreTrainedTokenizerFast) -> set[str]:
    vocabulary = vocabulary_of(tokenizer)
    ordinary = tokenizer.convert_ids_to_tokens(vocabulary.random_ids.tolist())
    starts = vocabulary.starts_word_V[vocabulary.random_ids]
    return {piece for piece, start in zip(ordinary, starts, strict=True) if start}


def test_vocabulary_knows_the_special_tokens_by_purpose():
    tokenizer = toy_tokenizer.word_piece()
    vocabulary = vocabulary_of(tokenizer)
    assert (vocabulary.cls_id, vocabulary.pad_id, vocabulary.sep_id, vocabulary.unk_id) == (
        0,
        1,
        2,
        3,
    )
    assert vocabulary.mask_id == vocabulary.size - 1 == len(tokenizer) - 1
    assert np.flatnonzero(vocabulary.is_special_V).tolist() == [0, 1, 2, 3, vocabulary.mask_id]
    assert not vocabulary.is_special_V[vocabulary.random_ids].any()


def test_bos_and_eos_serve_where_cls_and_sep_are_missing():
    tokenizer = toy_tokenizer.word_piece(
        cls_token=None, sep_token=None, bos_token="<s>", eos_token="</s>"
    )
    vocabulary = vocabulary_of(tokenizer)
    assert (vocabulary.cls_id, vocabulary.sep_id) == (0, 2)


def test_special_token_without_a_purpose_is_special_all_the_same():
    # MPNet's own vocabulary: `[UNK]` is used, `<unk>` is only marked as special.
    tokenizer = toy_tokenizer.word_piece(words=("[UNK]",), unk_token="[UNK]")
    tokenizer.backend_tokenizer.add_special_tokens(["<unk>"])
    vocabulary = vocabulary_of(tokenizer)
    assert tokenizer.convert_ids_to_tokens(vocabulary.unk_id) == "[UNK]"
    assert vocabulary.is_special_V[tokenizer.convert_tokens_to_ids("<unk>")]


def test_word_starts_of_word_piece():
    found = starters(toy_tokenizer.word_piece())
    assert found == {"tall", "tale", "mask", *toy_tokenizer.LETTERS}


def test_word_starts_of_byte_level_bpe():
    assert starters(toy_tokenizer.byte_level()) == {"Ġ", "Ġu", "Ġun"}


def test_word_starts_of_sentence_piece():
    assert starters(toy_tokenizer.sentence_piece()) == {"▁", "▁un"}


@pytest.mark.parametrize("kind", ["WordPiece", "byte-level BPE", "SentencePiece"])
def test_word_starts_of_a_learned_tokenizer_are_where_words_start(kind):
    tokenizer = toy_tokenizer.learned(kind)
    text = " ".join(toy_tokenizer.TEXT.replace("(", "").split())
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    starts_word_V = vocabulary_of(tokenizer).starts_word_V
    found = {
        start
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
        if starts_word_V[token]
    }
    # A piece may carry the space before its word.
    found = {start + (text[start] == " ") for start in found}
    after_space = {i + 1 for i, letter in enumerate(text) if letter == " "}
    if kind == "WordPiece":
        marks = {i for i, letter in enumerate(text) if letter in ".,!)'"}
        after_marks = {i + 1 for i in marks if text[i + 1 : i + 2].isalnum()}
        assert found == {0} | after_space | marks | after_marks
    else:
        # The very first word has no space before it; SentencePiece puts one there, BPE does not.
        assert found - {0} == after_space


# fault 29
def test_every_token_is_a_word_where_nothing_marks_them():
    assert starters(toy_tokenizer.word_level()) == {"un", "bel", "▁"}


# fault 29
def test_size_covers_added_tokens_and_gaps_and_random_ids_only_what_exists(directory):
    file = directory / "tokenizer.json"
    description = json.loads(file.read_text(encoding="utf-8"))
    description["model"]["vocab"]["far"] = 500
    file.write_text(json.dumps(description), encoding="utf-8")
    tokenizer = load_tokenizer(str(directory))
    tokenizer.add_tokens([AddedToken("##odd")])
    vocabulary = vocabulary_of(tokenizer)
    added = tokenizer.convert_tokens_to_ids("##odd")
    assert vocabulary.size == max(500, added) + 1
    assert len(vocabulary.is_special_V) == len(vocabulary.starts_word_V) == vocabulary.size
    assert set(vocabulary.random_ids) == {
        each for each in tokenizer.get_vocab().values() if not vocabulary.is_special_V[each]
    }
    assert vocabulary.starts_word_V[added]


# Row 28 of the fault matrix.


@pytest.mark.parametrize(
    ("without", "named"),
    [
        (["mask_token"], "mask"),
        (["pad_token"], "pad"),
        (["cls_token"], r"cls \(or bos\)"),
        (["sep_token"], r"sep \(or eos\)"),
        (["unk_token"], "unk"),
        (["mask_token", "pad_token", "sep_token"], r"mask, pad, sep \(or eos\)"),
    ],
)
def test_missing_special_tokens_are_all_listed(without, named):
    tokenizer = toy_tokenizer.word_piece(**dict.fromkeys(without))
    with pytest.raises(ConfigError, match=f"no special token for: {named};"):
        vocabulary_of(tokenizer)


def test_padding_that_hugging_face_cannot_represent_is_explained():
    assert check_for_export(vocabulary_of(toy_tokenizer.word_piece())) is None
    swapped = {"cls_token": "<pad>", "pad_token": "<s>"}
    reason = check_for_export(vocabulary_of(toy_tokenizer.word_piece(**swapped)))
    assert reason is not None
    assert "padding has the id 0" in reason
    assert "--no-export-hf" in reason


def test_mask_that_is_the_padding_is_refused():
    with pytest.raises(ConfigError, match="mask and pad are the same token, '<pad>'"):
        vocabulary_of(toy_tokenizer.word_piece(mask_token="<pad>"))


def test_loading_switches_truncation_and_padding_off(directory):
    stored = toy_tokenizer.word_piece()
    stored.backend_tokenizer.enable_truncation(4)
    stored.backend_tokenizer.enable_padding(length=4)
    stored.save_pretrained(directory)
    backend = load_tokenizer(str(directory)).backend_tokenizer
    assert backend.truncation is None
    assert backend.padding is None
    assert len(backend.encode("tall tale tall tale tall tale").ids) == 6


def test_incomplete_tokenizer_is_refused_when_it_is_loaded(directory):
    toy_tokenizer.word_piece(mask_token=None).save_pretrained(directory)
    with pytest.raises(ConfigError, match="no special token for: mask"):
        load_tokenizer(str(directory))


def test_directory_without_a_vocabulary_is_refused(tmp_path):
    # transformers makes a tokenizer of nothing but special tokens of it, and says nothing.
    (tmp_path / "config.json").write_text('{"model_type": "mpnet"}')
    with pytest.raises(ConfigError, match="all of them are special"):
        vocabulary_of(load_tokenizer(str(tmp_path)))


@pytest.mark.parametrize("content", ["", "{", '{"model": 3}', "\x00\x01"])
def test_damaged_tokenizer_is_one_clear_line(directory, content):
    (directory / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match="holds no tokenizer that loads") as caught:
        load_tokenizer(str(directory))
    assert "\n" not in str(caught.value)


def test_missing_directory_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere', which is not a directory"):
        load_tokenizer(str(tmp_path / "nowhere"))


def test_unreachable_hub_name_leads_to_a_directory(monkeypatch):
    def no_network(*_: object, **__: object) -> None:
        raise ConnectionError

    monkeypatch.setattr(HfApi, "model_info", no_network)
    with pytest.raises(ConfigError, match=r"the Hub has none.*expected a directory"):
        load_tokenizer("nobody/nothing-of-that-name")


# fault 31
def test_code_that_comes_with_a_tokenizer_is_never_run(directory):
    canary = directory / "canary"
    (directory / "evil.py").write_text(f"open({str(canary)!r}, 'w').close()\nclass Tokenizer: ...")
    configuration = {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}
    (directory / "tokenizer_config.json").write_text(json.dumps(configuration))
    with pytest.raises(ConfigError):
        load_tokenizer(str(directory))
    assert not canary.exists()


def test_hash_survives_saving_and_loading_and_ignores_truncation_and_padding(directory):
    before = tokenizer_hash(load_tokenizer(str(directory)))
    stored = load_tokenizer(str(directory))
    stored.backend_tokenizer.enable_truncation(4)
    stored.backend_tokenizer.enable_padding(length=4)
    assert tokenizer_hash(stored) == before
    stored.save_pretrained(directory / "again")
    assert tokenizer_hash(load_tokenizer(str(directory / "again"))) == before


# fault 30
def test_hash_notices_two_swapped_ids_and_another_normalizer():
    hashes = {
        tokenizer_hash(toy_tokenizer.word_piece(words=("tall", "tale"))),
        tokenizer_hash(toy_tokenizer.word_piece(words=("tale", "tall"))),
    }
    other = toy_tokenizer.word_piece(words=("tall", "tale"))
    other.backend_tokenizer.normalizer = None
    hashes.add(tokenizer_hash(other))
    assert len(hashes) == 3


# fault 29
def test_slow_tokenizer_is_refused_by_its_class(tmp_path):
    # One of the few that transformers 5 has no fast version of.
    CanineTokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="CanineTokenizer, which is not a fast tokenizer"):
        load_tokenizer(str(tmp_path))
