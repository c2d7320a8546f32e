"""Tokenizers of one's own: MPNet's layout, the same each time, written whole."""

import json
import random
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from annotated_mpnet.errors import ConfigError, DataError, WriteError
from annotated_mpnet.text import learn_tokenizer
from annotated_mpnet.text.learn_tokenizer import train_tokenizer_files, train_wordpiece
from annotated_mpnet.text.tokenizer import load_tokenizer, tokenizer_hash, vocabulary_of

LINES = ["She sells sea shells.", "The shells she sells are sea shells, surely.", "Überall Café."]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{line} Nr. {n}\n" for line in LINES for n in range(50)))
    return path


def test_special_tokens_stand_where_mpnet_has_them(text: Path) -> None:
    tokenizer = train_wordpiece([text], 80)
    names = ["<s>", "<pad>", "</s>", "<unk>"]
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3]) == names
    assert tokenizer.mask_token_id == len(tokenizer) - 1
    vocabulary = vocabulary_of(tokenizer)
    assert (vocabulary.pad_id, vocabulary.cls_id, vocabulary.sep_id) == (1, 0, 2)


def test_text_is_read_as_bert_reads_it(text: Path) -> None:
    tokenizer = train_wordpiece([text], 120)
    assert tokenizer("SÉA shells")["input_ids"] == tokenizer("sea Shells")["input_ids"]
    ids = tokenizer("sea shells.")["input_ids"]
    assert (ids[0], ids[-1]) == (0, 2)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "sea shells."


def test_the_same_text_gives_the_same_vocabulary(text: Path) -> None:
    # Hash tables would number the letters differently each time, if they were asked.
    hashes = {tokenizer_hash(train_wordpiece([text], 100)) for _ in range(5)}
    assert len(hashes) == 1


def test_what_is_written_loads_as_what_was_learned(text: Path, tmp_path: Path) -> None:
    tokenizer = train_wordpiece([text], 100)
    train_tokenizer_files([text], 100, tmp_path / "out")
    loaded = load_tokenizer(str(tmp_path / "out"))
    assert tokenizer_hash(loaded) == tokenizer_hash(tokenizer)
    encoded = AutoTokenizer.from_pretrained(tmp_path / "out")("sea <mask>")
    assert set(encoded) == {"input_ids", "attention_mask"}
    assert encoded["input_ids"][-2] == tokenizer.mask_token_id


def test_transformers_4_finds_a_class_that_it_knows(text: Path, tmp_path: Path) -> None:
    train_tokenizer_files([text], 100, tmp_path / "out")
    configuration = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert configuration["tokenizer_class"] == "PreTrainedTokenizerFast"


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


@pytest.mark.parametrize("size", [-1, 10, 63, 10_000_001, 10**400])
def test_a_vocabulary_size_that_makes_no_sense_is_refused(text: Path, size: int) -> None:
    with pytest.raises(ConfigError, match=r"--vocab-size is .*; expected 64 to") as caught:
        train_wordpiece([text], size)
    assert len(str(caught.value)) < 200


def test_a_huge_vocabulary_asked_for_is_no_memory_taken(text: Path) -> None:
    assert len(train_wordpiece([text], 10_000_000)) < 200


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
        train_wordpiece([path], 100)


def test_marks_that_spell_a_word_are_kept_and_accents_are_not(text: Path) -> None:
    normalizer = train_wordpiece([text], 80).backend_tokenizer.normalizer
    for word in ("हिन्दी", "ภาษาไทยก็", "がぎぐ", "தமிழ்", "বাংলা", "한국어"):
        assert normalizer.normalize_str(word) == word
    assert normalizer.normalize_str("Éǘ İVIỆT") == "eu iviet"


def test_text_without_spaces_is_known(tmp_path: Path) -> None:
    letters = [chr(code) for code in range(0x0E01, 0x0E2D)]
    draw = random.Random(0)
    lines = ["".join(draw.choices(letters, k=draw.randint(140, 700))) for _ in range(50)]
    (tmp_path / "thai.txt").write_text("\n".join(lines))
    report = train_tokenizer_files([tmp_path / "thai.txt"], 400, tmp_path / "out")
    assert "0.00% of it is unknown" in report
    assert "warning" not in report
    tokenizer = load_tokenizer(str(tmp_path / "out"))
    assert all(tokenizer.unk_token_id not in tokenizer(line)["input_ids"] for line in lines)


def test_much_unknown_text_is_a_warning_with_its_reason(tmp_path: Path) -> None:
    lines = ["".join(chr(0x4E00 + (31 * n + k) % 900) for k in range(30)) for n in range(90)]
    (tmp_path / "chinese.txt").write_text("\n".join(lines))
    report = train_tokenizer_files([tmp_path / "chinese.txt"], 200, tmp_path / "out")
    assert re.search(
        r"warning: 9\d\.\d% of the text becomes <unk>.*than the 50 .*--vocab-size", report
    )


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
