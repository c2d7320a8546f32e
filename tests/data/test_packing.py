"""Packing keeps the text, and its cache is used only if it is whole and of the same text."""

import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import toy_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from annotated_mpnet.errors import WriteError
from annotated_mpnet.text import packing
from annotated_mpnet.text import tokenization as tokenising
from annotated_mpnet.text.hold_out import without_texts
from annotated_mpnet.text.packing import pack_sequences
from annotated_mpnet.text.sequences import PackedSequences
from annotated_mpnet.text.sources import Counts, LocalFiles
from annotated_mpnet.text.tokenizer import vocabulary_of

TOKENIZER = toy_tokenizer.word_piece()
CLS, SEP, UNK = (TOKENIZER.convert_tokens_to_ids(each) for each in ("<s>", "</s>", "<unk>"))


def pack(directory: Path, *texts: str, max_tokens: int = 8, **options: object) -> PackedSequences:
    """Pack texts, one file each; the directory is also the cache."""
    paths = [directory / f"{i}.txt" for i in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text, encoding="utf-8", newline="")
    tokenizer = options.pop("tokenizer", TOKENIZER)
    return pack_sequences(paths, tokenizer, max_tokens, cache_dir=directory / "cache", **options)


def sequences_of(packed: PackedSequences) -> list[list[int]]:
    return [sequence.tolist() for sequence in packed.take(np.arange(len(packed)))]


def text_of(packed: PackedSequences) -> list[str]:
    """Undo the packing: return the documents, in tokens joined by spaces."""
    stream = [token for sequence in sequences_of(packed) for token in sequence[1:-1]]
    tokens = TOKENIZER.convert_ids_to_tokens(stream)
    return [document.strip() for document in " ".join(tokens).split("</s>")]


WORDS = st.lists(st.sampled_from(["tall", "tale", "a", "b", "mask"]), min_size=1, max_size=30)
DOCUMENTS = st.lists(WORDS.map(" ".join), min_size=1, max_size=12)


@settings(max_examples=25)
@given(DOCUMENTS, st.integers(4, 16), st.sampled_from([1, 40, 2**20]))
def test_packing_loses_and_repeats_nothing(documents, max_tokens, packed_at_once):
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        # Small parts, to test the boundaries between them.
        patch.setattr(packing, "PACKED_AT_ONCE", packed_at_once)
        patch.setattr(tokenising, "TOKENISED_AT_ONCE", 3)
        packed = pack(Path(directory), "\n".join(documents), max_tokens=max_tokens)
        assert text_of(packed) == documents
        sequences = sequences_of(packed)
        assert all(sequence[0] == CLS and sequence[-1] == SEP for sequence in sequences)
        assert all(len(sequence) == max_tokens for sequence in sequences[:-1])
        assert 3 <= len(sequences[-1]) <= max_tokens
        assert packed.report.tokens == sum(len(document.split()) for document in documents)
        assert packed.report.fill == sum(map(len, sequences)) / (len(sequences) * max_tokens)


def test_sequences_end_as_in_the_documentation(tmp_path):
    packed = pack(tmp_path, "a b\nc d e f g\nh\n", max_tokens=6)
    sequences = [
        " ".join(TOKENIZER.convert_ids_to_tokens(sequence)) for sequence in sequences_of(packed)
    ]
    assert sequences == ["<s> a b </s> c </s>", "<s> d e f g </s>", "<s> </s> h </s>"]


def test_files_follow_one_another_and_empty_ones_are_counted(tmp_path):
    packed = pack(tmp_path, "a\n\n", "", " \n\r\n", "\ufeffb\r\nc")
    assert text_of(packed) == ["a", "b", "c"]
    report = packed.report
    assert report.counts == Counts(documents=3, files=4, empty_files=2, blank_lines=3)
    assert report.dropped_documents == 0
    assert str(report).startswith("3 documents in 4 files: 3 tokens in 1 sequences, ")
    assert "2 empty files; 3 blank lines skipped" in str(report)


@pytest.mark.parametrize(
    "tokenizer",
    [toy_tokenizer.word_piece(), toy_tokenizer.sentence_piece(), toy_tokenizer.word_level()],
    ids=["WordPiece", "SentencePiece", "WordLevel"],
)
def test_special_tokens_in_the_text_are_only_text(tmp_path, tokenizer):
    packed = pack(tmp_path, "un <mask> <pad> </s> <s> un bel\n", max_tokens=64, tokenizer=tokenizer)
    (sequence,) = sequences_of(packed)
    special = {tokenizer.convert_tokens_to_ids(each) for each in ("<mask>", "<pad>", "</s>", "<s>")}
    assert not special & set(sequence[1:-1])


def test_special_tokens_in_the_text_are_spelled_where_the_vocabulary_can(tmp_path):
    packed = pack(tmp_path, "a <mask> </s>\n", max_tokens=64)
    # BERT's rule: punctuation marks are separate words.
    assert text_of(packed) == ["a < mask > < / s >"]


def test_packing_leaves_the_tokenizer_as_it_was(tmp_path):
    pack(tmp_path, "a <mask>\n")
    assert TOKENIZER.mask_token_id in TOKENIZER("a <mask>", add_special_tokens=False)["input_ids"]
    assert not TOKENIZER.backend_tokenizer.encode_special_tokens


def test_second_start_uses_the_cache(tmp_path, monkeypatch):
    first = pack(tmp_path, "tall tale\n")

    def never(*_: object) -> None:
        raise AssertionError("packed again")

    monkeypatch.setattr(packing, "_pack", never)
    second = pack(tmp_path, "tall tale\n")
    assert sequences_of(second) == sequences_of(first)
    assert (second.fingerprint, second.report) == (first.fingerprint, first.report)


def test_cache_is_not_shared_between_texts_lengths_and_tokenizers(tmp_path):
    different = [
        pack(tmp_path, "tall tale\n"),
        pack(tmp_path, "tall mask\n"),
        pack(tmp_path, "tall", "tale\n"),
        pack(tmp_path, "tall tale\n", max_tokens=9),
        pack(tmp_path, "tall tale\n", tokenizer=toy_tokenizer.word_piece(("tale", "tall"))),
    ]
    assert len({packed.fingerprint for packed in different}) == 5


def test_interrupted_packing_is_never_used(tmp_path, monkeypatch):
    def interrupted(*arguments: object) -> None:
        write(*arguments)
        raise KeyboardInterrupt

    write = packing._write_sequences
    with monkeypatch.context() as patch:
        patch.setattr(packing, "_write_sequences", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pack(tmp_path, "tall tale\n")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    assert text_of(pack(tmp_path, "tall tale\n")) == ["tall tale"]


def test_leftovers_of_a_killed_packing_are_deleted(tmp_path):
    packed = pack(tmp_path, "tall tale\n")
    (cached,) = (tmp_path / "cache").glob("*.arrow")
    cached.rename(cached.with_suffix(".kept"))
    scratch = cached.with_suffix(".partial")
    scratch.mkdir()
    (scratch / "tokens.arrow").write_bytes(b"half of something")
    again = pack(tmp_path, "tall tale\n")
    assert not scratch.exists()
    assert sequences_of(again) == sequences_of(packed)


@pytest.fixture
def cached(tmp_path) -> tuple[Path, list[list[int]]]:
    """Return a cache and its sequences."""
    sequences = sequences_of(pack(tmp_path, "tall tale\n" * 20))
    (path,) = (tmp_path / "cache").glob("*.arrow")
    return path, sequences


def test_every_flipped_bit_of_the_cache_is_found(cached):
    path, _ = cached
    good = path.read_bytes()
    PackedSequences(path)
    generator = np.random.default_rng(0)
    for place in generator.choice(8 * len(good), 300, replace=False):
        bad = bytearray(good)
        bad[place // 8] ^= 1 << place % 8
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="its checksum is wrong"):
            PackedSequences(path)


DAMAGES = {
    "empty": lambda good: b"",
    "one byte": lambda good: good[:1],
    "half": lambda good: good[: len(good) // 2],
    "a byte less": lambda good: good[:-1],
    "a byte more": lambda good: good + b"\0",
    "written before there were checksums": lambda good: good[:-16],
    "zeroed": lambda good: bytes(len(good)),
    "zeroed block": lambda good: good[:512] + bytes(64) + good[576:],
    "zeroed end": lambda good: good[:-100] + bytes(100),
    "one id": lambda good: good.replace(np.int32(TALL).tobytes(), np.int32(TALL + 1).tobytes(), 1),
}
TALL = TOKENIZER.convert_tokens_to_ids("tall")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_packed_again_and_the_user_is_told(tmp_path, cached, damage, caplog):
    path, sequences = cached
    good = path.read_bytes()
    path.write_bytes(DAMAGES[damage](good))
    assert path.read_bytes() != good
    again = pack(tmp_path, "tall tale\n" * 20)
    assert sequences_of(again) == sequences
    assert path.read_bytes() == good
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"packing the text again, since '{path}' cannot be used: ")
    assert said.endswith("version wrote it" if "before" in damage else "checksum is wrong")


def test_a_cache_under_the_name_of_another_text_is_not_used(tmp_path, cached):
    path, sequences = cached
    other = pack(tmp_path, "tale\n")
    path.with_stem(other.fingerprint).write_bytes(path.read_bytes())
    assert text_of(pack(tmp_path, "tale\n")) == ["tale"]
    assert sequences_of(pack(tmp_path, "tall tale\n" * 20)) == sequences


def test_skipped_files_are_those_of_this_start(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("tall tale\n" * 20)

    def skipped() -> list[int]:
        source = LocalFiles.find(tmp_path / "text", "--train-dir")
        return [
            pack_sequences(
                each, TOKENIZER, 8, cache_dir=tmp_path / "cache"
            ).report.counts.skipped_files
            for each in (source, without_texts(source, frozenset({1})))
        ]

    assert skipped() == [0, 0]
    (tmp_path / "text" / "notes.md").write_text("tall")
    assert skipped() == [1, 1]
    (tmp_path / "text" / "notes.md").unlink()
    assert skipped() == [0, 0]


def test_unknown_tokens_are_counted_also_in_documents_that_are_dropped(tmp_path):
    # Three of eight tokens are unknown, one of them in a dropped document.
    first = pack(tmp_path, "tall ç é\nb c\nç\na b\n")
    for packed in (first, pack(tmp_path, "tall ç é\nb c\nç\na b\n")):
        assert packed.report.unknown == 3 / 8
        assert ", 37.5% unknown; 1 documents without" in str(packed.report)
        (warning,) = packed.report.warnings(whole_word_mask=False)
        assert warning.startswith("warning: 38% of the tokens are unknown")
    assert pack(tmp_path, "a b c d\n").report.unknown == 0
    report = pack(tmp_path, "a\n" * 5000 + "a ç\n").report
    assert "<0.1% unknown" in str(report)
    assert list(report.warnings(whole_word_mask=False)) == []


def test_few_words_in_a_sequence_are_warned_about_where_whole_words_are_predicted(tmp_path):
    packed = pack(tmp_path, ("un" + "bel" * 30 + "\n") * 5, max_tokens=32)
    starts = vocabulary_of(TOKENIZER).starts_word_V
    sequences = sequences_of(packed)
    # A word also begins after a special token, even if the sequence starts in the middle of a word.
    words = sum(
        sum(
            bool(starts[b]) or a in (CLS, SEP) for a, b in pairwise(sequence) if b not in (CLS, SEP)
        )
        for sequence in sequences
    )
    assert packed.report.words == words
    (warning,) = packed.report.warnings(whole_word_mask=True)
    assert "--no-whole-word-mask" in warning
    assert list(packed.report.warnings(whole_word_mask=False)) == []


def test_sequences_do_not_depend_on_the_number_of_processes(tmp_path, monkeypatch):
    # More processes than documents. Two and three: test_faults.py, 25 and 26.
    monkeypatch.setattr(tokenising, "TOKENISED_AT_ONCE", 4)
    text = "\n".join(f"{'tall ' * (i % 7)}tale <mask> {i % 3 * 'a '}" for i in range(50))
    alone = pack(tmp_path, text, num_workers=1)
    (cached,) = (tmp_path / "cache").glob("*.arrow")
    cached.unlink()
    shared = pack(tmp_path, text, num_workers=100)
    assert sequences_of(shared) == sequences_of(alone)
    assert shared.fingerprint == alone.fingerprint


def test_small_text_is_tokenised_in_one_process_unless_asked_for(monkeypatch):
    processes = tokenising._processes
    monkeypatch.setattr(tokenising.os, "cpu_count", lambda: 8)
    assert processes(0, text_bytes=100, items=100) == 1
    assert processes(4, text_bytes=100, items=100) == 4
    assert processes(4, text_bytes=100, items=3) == 3
    assert processes(4, text_bytes=100, items=1) == 1
    assert processes(4, text_bytes=100, items=0) == 1
    assert processes(0, text_bytes=10**9, items=100) == 8
    assert processes(1024, text_bytes=100, items=10**6) == tokenising.MOST_PROCESSES


def test_cache_that_cannot_be_written_is_a_write_error(tmp_path):
    (tmp_path / "cache").write_text("a file where a directory should be")
    with pytest.raises(WriteError, match="HF_DATASETS_CACHE"):
        pack(tmp_path, "tall tale\n")


def test_take_returns_sequences_in_any_order_across_the_parts_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "PACKED_AT_ONCE", 10)
    monkeypatch.setattr(tokenising, "TOKENISED_AT_ONCE", 2)
    packed = pack(tmp_path, "\n".join("abcdefghij" * 5), max_tokens=5)
    sequences = sequences_of(packed)
    order = np.random.default_rng(0).permutation(len(packed))
    assert [sequence.tolist() for sequence in packed.take(order)] == [sequences[i] for i in order]
    assert packed.take(np.array([], dtype=np.int64)) == []
    for outside in (-1, len(packed)):
        with pytest.raises(IndexError):
            packed.take(np.array([outside]))
