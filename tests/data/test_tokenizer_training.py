"""Training tokenizers: MPNet's layout, reproducible, written completely or not at all."""

import json
import random
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from annotated_mpnet.errors import ConfigError, DataError, WriteError
from annotated_mpnet.settings.commands import TokenizerModel
from annotated_mpnet.text import learn_tokenizer
from annotated_mpnet.text.learn_tokenizer import (
    train_tokenizer,
    train_tokenizer_files,
)
from annotated_mpnet.text.tokenizer import (
    load_tokenizer,
    reader_of_text,
    tokenizer_hash,
    vocabulary_of,
)
from annotated_mpnet.text.tokenizer_learners import normalizer_for, pre_tokenizer_for

LINES = ["She sells sea shells.", "The shells she sells are sea shells, surely.", "Überall Café."]

MODELS: tuple[TokenizerModel, ...] = ("wordpiece", "bpe", "unigram")
every_model = pytest.mark.parametrize("model", MODELS)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{line} Nr. {n}\n" for line in LINES for n in range(50)))
    return path


@every_model
def test_special_tokens_have_the_ids_that_mpnet_needs(text: Path, model: TokenizerModel) -> None:
    tokenizer = train_tokenizer([text], 420, model=model)
    names = ["<s>", "<pad>", "</s>", "<unk>"]
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3]) == names
    assert tokenizer.mask_token_id == len(tokenizer) - 1
    vocabulary = vocabulary_of(tokenizer)
    assert (vocabulary.pad_id, vocabulary.cls_id, vocabulary.sep_id) == (1, 0, 2)
    assert tokenizer("sea", "shell").input_ids[:1] == [0]
    assert [each for each in tokenizer("sea", "shell").input_ids if each <= 3] == [0, 2, 2, 2]


def test_text_is_read_as_bert_reads_it(text: Path) -> None:
    tokenizer = train_tokenizer([text], 120)
    assert tokenizer("SÉA shells")["input_ids"] == tokenizer("sea Shells")["input_ids"]
    ids = tokenizer("sea shells.")["input_ids"]
    assert (ids[0], ids[-1]) == (0, 2)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "sea shells."


@every_model
def test_the_same_text_gives_the_same_vocabulary(text: Path, model: TokenizerModel) -> None:
    # Hash tables would number the letters differently each time, and threads would sum in another
    # order.
    hashes = {tokenizer_hash(train_tokenizer([text], 420, model=model)) for _ in range(4)}
    assert len(hashes) == 1


@every_model
def test_a_saved_tokenizer_loads_unchanged(
    text: Path, tmp_path: Path, model: TokenizerModel
) -> None:
    tokenizer = train_tokenizer([text], 420, model=model)
    train_tokenizer_files([text], 420, tmp_path / "out", model=model)
    loaded = load_tokenizer(str(tmp_path / "out"))
    assert tokenizer_hash(loaded) == tokenizer_hash(tokenizer)
    opened = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert set(opened("sea <mask>")) == {"input_ids", "attention_mask"}
    # The mask replaces a word with its space.
    masked = opened("sea <mask> shells").input_ids
    assert masked == [*opened("sea").input_ids[:-1], opened.mask_token_id, *shells(opened)]
    # transformers 4 does not have the class that 5 would write.
    configuration = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert configuration["tokenizer_class"] == "PreTrainedTokenizerFast"


def shells(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens of " shells" and the end."""
    both = tokenizer("sea shells").input_ids
    return both[len(tokenizer("sea").input_ids) - 1 :]


EXACT = [
    "She sells sea shells.",
    "  two  spaces,\ttabs\n\nand lines \n",
    "हिन्दी ภาษาไทย が か\u3099 日本語 🐈\u200d⬛ é e\u0301",
    "don't <0x0A> [UNK] ##s \x07 \u200b",
]


@pytest.mark.parametrize("sentence", EXACT)
def test_bpe_and_unigram_give_text_back_exactly(text: Path, sentence: str) -> None:
    for model in ("bpe", "unigram"):
        tokenizer = train_tokenizer([text], 420, model=model)
        ids = tokenizer(sentence).input_ids
        assert tokenizer.unk_token_id not in ids
        expected = sentence.removeprefix(" ") if model == "unigram" else sentence
        assert tokenizer.decode(ids, skip_special_tokens=True) == expected


def test_a_special_token_in_text_is_spelled_in_letters(text: Path) -> None:
    # Packing switches special tokens off; without their letters they would be unknown.
    for model in ("bpe", "unigram"):
        tokenizer = train_tokenizer([text], 420, model=model)
        backend = reader_of_text(tokenizer)
        backend.encode_special_tokens = True
        ids = backend.encode("a <s> </s> <mask>", add_special_tokens=False).ids
        assert not vocabulary_of(tokenizer).is_special_V[ids].any()
        assert tokenizer.decode(ids) == "a <s> </s> <mask>"


@every_model
@pytest.mark.parametrize(
    ("flags", "read"),
    [
        ({"lowercase": True}, "ecole elan"),
        ({"lowercase": True, "strip_accents": False}, "école élan"),
        ({"lowercase": False}, "École élan"),
        ({"lowercase": False, "strip_accents": True}, "Ecole elan"),
        ({}, None),
    ],
)
def test_case_and_accents_are_a_choice(
    text: Path, model: TokenizerModel, flags: dict[str, bool], read: str | None
) -> None:
    usual = "ecole elan" if model == "wordpiece" else "École élan"
    normalizer = train_tokenizer([text], 420, model=model, **flags).backend_tokenizer.normalizer
    found = "École élan" if normalizer is None else normalizer.normalize_str("École élan")
    assert found == (read or usual)


@every_model
@pytest.mark.parametrize("lowercase", [False, True])
def test_marks_that_spell_a_word_are_kept_whatever_the_flags(
    model: TokenizerModel, lowercase: bool
) -> None:
    normalizer = normalizer_for(model, lowercase, strip_accents=True)
    assert normalizer is not None
    for word in ("हिन्दी", "ภาษาไทยก็", "がぎぐパ", "ｶﾞ", "தமிழ்", "বাংলা", "한국어", "шёй", "עִבְרִית"):
        assert normalizer.normalize_str(word) == word
    assert normalizer.normalize_str("Éǘ VIỆT ΆΝ").lower() == "eu viet αν"


def test_a_mark_or_joiner_does_not_end_a_word() -> None:
    for model in ("bpe", "unigram"):
        for word in ("हिन्दी", "ภาษาไทย", "می\u200cخواهم", "e\u0301t", "தமிழ்"):
            assert len(pre_tokenizer_for(model).pre_tokenize_str(word)) == 1


def test_pieces_of_a_unigram_model_stay_within_words(tmp_path: Path) -> None:
    words = ["sea", "shells", "surely", "sells", "seashore", "she", "shore"]
    draw = random.Random(0)
    lines = [", ".join(draw.choices(words, k=8)) + "." for _ in range(200)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    tokenizer = train_tokenizer([tmp_path / "text.txt"], 420, model="unigram")
    pieces = tokenizer.get_vocab()
    assert "▁seashore" in pieces
    assert not [each for each in pieces if re.search(r"\w\W|.\W\w", each) and each[0] != "<"]


def test_overwrite_replaces_a_tokenizer_and_nothing_else(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train_tokenizer_files([text], 100, out)
    before = (out / "tokenizer.json").read_bytes()
    with pytest.raises(ConfigError, match="--overwrite"):
        train_tokenizer_files([text], 80, out)
    train_tokenizer_files([text], 80, out, overwrite=True)
    assert (out / "tokenizer.json").read_bytes() != before
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"something other than a tokenizer.*'thesis\.txt'"):
        train_tokenizer_files([text], 100, out, overwrite=True)
    assert (out / "thesis.txt").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "text.txt"}


@pytest.mark.parametrize(
    ("model", "size", "least"),
    [("wordpiece", size, 64) for size in (-1, 10, 63, 10_000_001, 10**400)]
    + [("bpe", 299, 300), ("unigram", 399, 400)],
)
def test_a_vocabulary_size_that_makes_no_sense_is_refused(
    text: Path, model: TokenizerModel, size: int, least: int
) -> None:
    with pytest.raises(ConfigError, match=rf"--vocab-size is .*; expected {least} to") as caught:
        train_tokenizer([text], size, model=model)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(("model", "size"), [("bpe", 300), ("unigram", 400)])
def test_the_smallest_vocabulary_works(text: Path, model: TokenizerModel, size: int) -> None:
    tokenizer = train_tokenizer([text], size, model=model)
    assert len(tokenizer) <= size
    assert tokenizer.decode(tokenizer("Überall 日").input_ids[1:-1]) == "Überall 日"


def test_a_huge_vocabulary_size_allocates_no_memory(text: Path) -> None:
    assert len(train_tokenizer([text], 10_000_000)) < 200


@pytest.mark.parametrize("content", ["", "\n \n\t\n", "\u00a0\u3000\n"])
def test_text_without_a_letter_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "text.txt").write_text(content)
    with pytest.raises(DataError, match="no text in"):
        train_tokenizer_files([tmp_path / "text.txt"], 100, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt"}


def test_text_comes_from_the_column_that_is_named(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"content": "sea shells"}) + "\n" + json.dumps({"content": 3}))
    report = train_tokenizer_files([path], 100, tmp_path / "out", text_field="content")
    assert "1 documents in 1 file; 1 rows without text skipped" in report
    with pytest.raises(DataError, match="--text-field"):
        train_tokenizer([path], 100)


def test_text_without_spaces_is_known(tmp_path: Path) -> None:
    letters = [chr(code) for code in range(0x0E01, 0x0E2D)]
    draw = random.Random(0)
    lines = ["".join(draw.choices(letters, k=draw.randint(140, 700))) for _ in range(50)]
    (tmp_path / "thai.txt").write_text("\n".join(lines))
    report = train_tokenizer_files([tmp_path / "thai.txt"], 400, tmp_path / "out")
    assert "0.00% unknown" in report
    assert "per word" not in report
    assert "warning" not in report
    tokenizer = load_tokenizer(str(tmp_path / "out"))
    assert all(tokenizer.unk_token_id not in tokenizer(line)["input_ids"] for line in lines)


def test_much_unknown_text_is_a_warning_with_its_reason(tmp_path: Path) -> None:
    lines = ["".join(chr(0x4E00 + (31 * n + k) % 900) for k in range(30)) for n in range(90)]
    (tmp_path / "chinese.txt").write_text("\n".join(lines))
    report = train_tokenizer_files([tmp_path / "chinese.txt"], 200, tmp_path / "out")
    assert re.search(r"warning: 9\d\.\d% of the text becomes <unk>.*raise --vocab-size", report)
    report = train_tokenizer_files(
        [tmp_path / "chinese.txt"], 420, tmp_path / "bytes", model="unigram"
    )
    assert ", 0.00% unknown" in report
    assert re.search(r"warning: [89]\d\.\d% of the tokens spell a letter in bytes", report)


def test_the_report_counts_words_as_white_space_separates_them(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("sea-shells, sea\n" * 9)
    for model in MODELS:
        report = train_tokenizer_files([tmp_path / "text.txt"], 420, tmp_path / model, model=model)
        tokens = load_tokenizer(str(tmp_path / model)).tokenize("sea-shells, sea")
        assert f"on this text: {len(tokens) / 2:.2f} tokens per word" in report
        assert f"{14 / len(tokens):.1f} characters per token" in report
        assert ", there was no more to learn" in report.replace(":", ",")


def test_words_in_small_pieces_are_a_warning(tmp_path: Path) -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrst", k=9)) for _ in range(400)]
    (tmp_path / "text.txt").write_text("\n".join(" ".join(words[n : n + 8]) for n in range(300)))
    report = train_tokenizer_files([tmp_path / "text.txt"], 100, tmp_path / "out")
    assert re.search(r"warning: [5-9]\.\d tokens per word: .*raise --vocab-size 100", report)


@pytest.mark.parametrize("error", [OSError(28, "No space left"), Exception("full (os error 28)")])
def test_a_full_disk_leaves_nothing(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(learn_tokenizer, "write_tokenizer", fail)
    with pytest.raises(WriteError, match="could not be written"):
        train_tokenizer_files([text], 100, tmp_path / "new" / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt"}
