"""Tokenizers of one's own: MPNet's layout, the same each time, written whole."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from annotated_mpnet.errors import ConfigError
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
    tokenizer = train_tokenizer_files([text], 100, tmp_path / "out")
    loaded = load_tokenizer(str(tmp_path / "out"))
    assert tokenizer_hash(loaded) == tokenizer_hash(tokenizer)
    encoded = AutoTokenizer.from_pretrained(tmp_path / "out")("sea <mask>")
    assert set(encoded) == {"input_ids", "attention_mask"}
    assert encoded["input_ids"][-2] == tokenizer.mask_token_id


def test_a_directory_in_use_is_refused_unless_told_to_overwrite(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    with pytest.raises(ConfigError, match="--overwrite"):
        train_tokenizer_files([text], 100, out)
    assert (out / "precious.txt").exists()
    train_tokenizer_files([text], 100, out, overwrite=True)
    assert (out / "tokenizer.json").exists()
    assert not (tmp_path / ".tmp-out").exists()


def test_a_vocabulary_without_room_for_letters_is_refused(text: Path) -> None:
    with pytest.raises(ConfigError, match="--vocab-size is 10"):
        train_wordpiece([text], 10)
