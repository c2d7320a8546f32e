"""Which tokens are special or begin a word, and which tokenizers are refused."""

import json
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
import toy_tokenizer
from huggingface_hub import HfApi
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import CanineTokenizer, PreTrainedTokenizerFast

from annotated_mpnet.errors import ConfigError
from annotated_mpnet.mpnet.masking import find_words
from annotated_mpnet.text.tokenization import Tokenise
from annotated_mpnet.text.tokenizer import (
    BYTES,
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


def test_a_special_token_without_a_purpose_is_still_special():
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
    # A piece may include the space before its word.
    found = {start + (text[start] == " ") for start in found}
    after_space = {i + 1 for i, letter in enumerate(text) if letter == " "}
    if kind == "WordPiece":
        marks = {i for i, letter in enumerate(text) if letter in ".,!)'"}
        after_marks = {i + 1 for i in marks if text[i + 1 : i + 2].isalnum()}
        assert found == {0} | after_space | marks | after_marks
    else:
        # The first word has no space before it; SentencePiece adds one, BPE does not.
        assert found - {0} == after_space


def test_every_token_is_a_word_where_nothing_marks_them():
    assert starters(toy_tokenizer.word_level()) == {"un", "bel", "▁"}


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


@pytest.mark.parametrize("number", [200_000, 2 * 10**8, 2**32 - 1])
def test_a_huge_id_is_refused_by_name_before_memory_is_taken(directory, number):
    file = directory / "tokenizer.json"
    description = json.loads(file.read_text(encoding="utf-8"))
    description["model"]["vocab"]["far"] = number
    file.write_text(json.dumps(description), encoding="utf-8")
    # tokenizers 0.22 finds no word in a file with the last one.
    wanted = f"token 'far' has the id {number}, and there are|all of them are special"
    with pytest.raises(ConfigError, match=wanted):
        load_tokenizer(str(directory))


def test_many_ids_without_tokens_are_refused(directory):
    file = directory / "tokenizer.json"
    description = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = description["model"]["vocab"]
    vocabulary |= {f"t{number}": 10 * number for number in range(100, 20_000)}
    file.write_text(json.dumps(description), encoding="utf-8")
    with pytest.raises(ConfigError, match="'t19999' has the id 199990"):
        load_tokenizer(str(directory))


def test_special_tokens_that_belong_to_text_are_tokens_like_others(directory):
    tokenizer = toy_tokenizer.word_piece()
    before = vocabulary_of(tokenizer).random_ids
    plain_hash = tokenizer_hash(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<url>", "<user>"]})
    tokenizer.save_pretrained(directory)
    loaded = load_tokenizer(str(directory))
    vocabulary = vocabulary_of(loaded)
    url, user = loaded.convert_tokens_to_ids(["<url>", "<user>"])
    assert not vocabulary.is_special_V[[url, user]].any()
    assert vocabulary.starts_word_V[url]
    assert vocabulary.ends_word_V[url]
    assert np.array_equal(vocabulary.random_ids, before)
    assert tokenizer_hash(loaded) != plain_hash
    table = pa.table({"text": ["tall <url> <mask>"], "document": [0]})
    ids = Tokenise(loaded)(table).to_pydict()["input_ids"][0]
    assert loaded.convert_ids_to_tokens(ids)[:2] == ["tall", "<url>"]
    assert vocabulary.mask_id not in ids
    assert loaded("tall <url>", add_special_tokens=False).input_ids == ids[:2]


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
    # transformers silently makes a tokenizer that has only special tokens.
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


@pytest.mark.parametrize(
    "name", ["~nouser", "~nouser/tokenizer", "/" + "x" * 300, "./" + "x/" * 3000]
)
def test_a_path_that_cannot_be_looked_at_is_one_line(name):
    with pytest.raises(ConfigError, match="which is not a directory") as caught:
        load_tokenizer(name)
    assert len(str(caught.value)) < 250


def test_unreachable_hub_name_leads_to_a_directory(monkeypatch):
    def no_network(*_: object, **__: object) -> None:
        raise ConnectionError

    monkeypatch.setattr(HfApi, "model_info", no_network)
    with pytest.raises(ConfigError, match=r"the Hub has none.*expected a directory"):
        load_tokenizer("nobody/nothing-of-that-name")


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


def test_hash_notices_two_swapped_ids_and_another_normalizer():
    hashes = {
        tokenizer_hash(toy_tokenizer.word_piece(words=("tall", "tale"))),
        tokenizer_hash(toy_tokenizer.word_piece(words=("tale", "tall"))),
    }
    other = toy_tokenizer.word_piece(words=("tall", "tale"))
    other.backend_tokenizer.normalizer = None
    hashes.add(tokenizer_hash(other))
    assert len(hashes) == 3


def test_slow_tokenizer_is_refused_by_its_class(tmp_path):
    # One of the few without a fast version in transformers 5.
    CanineTokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="CanineTokenizer, which is not a fast tokenizer"):
        load_tokenizer(str(tmp_path))


def words_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[str]:
    """Return the words of a text as masking finds them."""
    vocabulary = vocabulary_of(tokenizer)
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    ids = np.array([encoding.ids])
    starts = vocabulary.starts_word_V[ids]
    starts[:, 1:] |= vocabulary.ends_word_V[ids[:, :-1]]
    word_BL = find_words(starts, ~vocabulary.is_special_V[ids])
    limits = [encoding.offsets[start][0] for start in np.unique(word_BL)] + [len(text)]
    return [text[start:end] for start, end in pairwise(limits)]


def letters_in_bytes(text: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE that knows all bytes, the letters of a text, and ĠĊ."""
    pieces = [*toy_tokenizer.SPECIALS.values(), *BYTES, "ĠĊ"]
    merges = [("Ġ", "Ċ")]
    written = {byte: letter for letter, byte in BYTES.items()}
    for character in sorted(set(text)):
        known, *rest = [written[bytes([byte])] for byte in character.encode()]
        for letter in rest:
            merges.append((known, letter))
            known += letter
            pieces.append(known)
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    backend = Tokenizer(models.BPE(vocabulary, list(dict.fromkeys(merges))))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **toy_tokenizer.SPECIALS)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("one two", ["one", " two"]),
        ("one\ntwo\n\nthree", ["one", "\n", "two", "\n", "\n", "three"]),
        ("a\tb\r\nc", ["a", "\t", "b", "\r", "\n", "c"]),
        ("a \nb", ["a", " \n", "b"]),
        ("don’t", ["don’t"]),
        ("日本GPU語", ["日", "本", "GPU", "語"]),
        ("かタﾀ。x", ["か", "タ", "ﾀ", "。", "x"]),
        ("ไทย ลาว", ["ไ", "ท", "ย", " ", "ล", "า", "ว"]),
        ("កម្មမြ", ["ក", "ម", "្", "ម", "မ", "ြ"]),
        ("हिन्दी Việt ქარ", ["हिन्दी", " Việt", " ქარ"]),
        ("𠀀𠀁", ["𠀀", "𠀁"]),
    ],
)
def test_words_of_byte_level_bpe_end_where_words_of_the_text_end(text, words):
    assert words_of(letters_in_bytes(text), text) == words


@pytest.mark.parametrize(
    ("piece", "begins"),
    [
        (b"\xe6", True),  # one of many Chinese characters
        (b"\xe6\x97", True),
        (b"\x97\xa5", False),  # the end of a character
        (b"\xe0\xb8", True),  # Thai
        (b"\xe0\xa4", False),  # Devanagari
        (b"\xe0", False),  # may become either
        (b"\xe2\x80", False),  # a curly quote, or a space
        (b"\xe1\xbb", False),  # a Vietnamese letter
        (b"\xe1", False),
    ],
)
def test_a_piece_of_a_character_begins_a_word_if_the_character_does(piece, begins):
    written = {byte: letter for letter, byte in BYTES.items()}
    name = "".join(written[bytes([byte])] for byte in piece)
    tokenizer = toy_tokenizer.byte_level()
    model = models.BPE({**tokenizer.get_vocab(), name: 99}, [], unk_token="<unk>")
    tokenizer.backend_tokenizer.model = model
    vocabulary = vocabulary_of(tokenizer)
    assert vocabulary.starts_word_V[99] == begins
    assert not vocabulary.ends_word_V[99]


def test_byte_level_letters_match_those_of_the_library():
    assert set(BYTES) == set(pre_tokenizers.ByteLevel.alphabet())
    for letter, byte in BYTES.items():
        if byte < b"\x80":
            (written, _), *_ = pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(
                byte.decode()
            )
            assert written == letter


def test_words_of_sentence_piece_without_spaces():
    pieces = ["▁", "▁the", "日本", "語", "G", "PU", "ไทย", "<0x0A>", "<0xE3>", "<0x81>"]
    vocabulary = [*toy_tokenizer.SPECIALS.values(), *pieces]
    model = models.Unigram([(each, -1.0) for each in vocabulary], unk_id=3, byte_fallback=True)
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **toy_tokenizer.SPECIALS)
    words = words_of(tokenizer, "the日本語GPUไทย")
    assert words == ["the", "日本", "語", "GPU", "ไทย"]
    vocabulary = vocabulary_of(tokenizer)
    number = tokenizer.convert_tokens_to_ids("<0x0A>")
    assert vocabulary.starts_word_V[number]
    assert vocabulary.ends_word_V[number]
    # The space belongs to the next word.
    assert not vocabulary.ends_word_V[tokenizer.convert_tokens_to_ids("▁")]


def test_words_of_sentence_piece_that_writes_the_space_last():
    pieces = [*toy_tokenizer.SPECIALS.values(), "sh", "ip▁", "came▁", "▁"]
    model = models.Unigram([(each, -1.0) for each in pieces], unk_id=3)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Replace(" ", "▁")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **toy_tokenizer.SPECIALS)
    assert words_of(tokenizer, "ship came ship ") == ["ship ", "came ", "ship "]


def test_words_of_word_piece_without_spaces():
    pieces = [*toy_tokenizer.SPECIALS.values(), "ก", "##ข", "##ab", "##c", "a"]
    backend = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **toy_tokenizer.SPECIALS)
    assert words_of(tokenizer, "กขabc ac") == ["ก", "ข", "abc ", "ac"]


def test_words_of_bpe_that_marks_their_end():
    pieces = [*toy_tokenizer.SPECIALS.values(), "u", "n", "b</w>", "n</w>", "un"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    model = models.BPE(vocabulary, [("u", "n")], unk_token="<unk>", end_of_word_suffix="</w>")
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **toy_tokenizer.SPECIALS)
    assert words_of(tokenizer, "unb unun b") == ["unb ", "unun ", "b"]
