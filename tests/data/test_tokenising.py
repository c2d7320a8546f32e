"""Long documents are tokenised in pieces without losing a token."""

from pathlib import Path

import pyarrow as pa
import pytest
import toy_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Encoding, Tokenizer

from annotated_mpnet.text.cutting import Ragged
from annotated_mpnet.text.tokenization import (
    LONGEST_PIECE,
    pieces,
    tokenise,
    windows_of,
    write_text,
)

FAMILIES = pytest.mark.parametrize("kind", ["WordPiece", "byte-level BPE", "SentencePiece"])


@FAMILIES
def test_pieces_have_the_tokens_of_the_whole(kind):
    backend = toy_tokenizer.learned(kind).backend_tokenizer
    text = f"{toy_tokenizer.TEXT}  two  spaces\tand a tab {toy_tokenizer.TEXT}"
    whole = backend.encode(text, add_special_tokens=False).tokens
    for longest in range(24, len(text), 7):
        cut = pieces(text, longest)
        assert len(cut) > 1
        tokens = [backend.encode(piece, add_special_tokens=False).tokens for piece in cut]
        assert [token for piece in tokens for token in piece] == whole


@given(st.text(alphabet="ab \n\t\u3000.", max_size=200), st.integers(1, 30))
def test_pieces_lose_and_repeat_nothing(text, longest):
    cut = pieces(text, longest)
    assert "".join(cut) == text
    assert all(0 < len(piece) <= longest for piece in cut) or text == ""


def tokens_of(directory: Path, documents: list[str], **options: object) -> pa.Table:
    write_text(documents, directory / "text.arrow")
    tokenizer = toy_tokenizer.word_piece()
    return tokenise(directory / "text.arrow", directory / "tokens.arrow", tokenizer, 1)[0]


def spelled(windows: list[Ragged]) -> list[str]:
    tokenizer = toy_tokenizer.word_piece()
    return [
        " ".join(tokenizer.convert_ids_to_tokens(document.tolist()))
        for window in windows
        for document in window
    ]


@pytest.mark.parametrize("at_least", [1, 5, 17, 10**6])
@pytest.mark.parametrize("at_once", [1, 3, 256])
def test_documents_in_pieces_are_joined_again(tmp_path, monkeypatch, at_least, at_once):
    monkeypatch.setattr("annotated_mpnet.text.tokenization.TOKENISED_AT_ONCE", at_once)
    monkeypatch.setattr(pieces, "__defaults__", (10,))
    documents = ["a b c", "tall tale " * 9, "b", "c " * 40, "tall", "tale", "a " * 11]
    windows = list(windows_of(tokens_of(tmp_path, documents), at_least))
    assert spelled(windows) == [document.strip() for document in documents]
    # A window ends with the document that fills it.
    lengths = [window.lengths_N for window in windows]
    assert all(each.sum() >= at_least for each in lengths[:-1])
    assert all(each[:-1].sum() < at_least for each in lengths)


class Recording:
    """A tokenizer that remembers the longest text that it was given."""

    longest = 0

    def __init__(self, backend: Tokenizer) -> None:
        self.__dict__["backend"] = backend

    @classmethod
    def from_str(cls, description: str) -> "Recording":
        return cls(Tokenizer.from_str(description))

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.backend, name, value)

    def encode_batch_fast(self, texts: list[str], **options: bool) -> list[Encoding]:
        Recording.longest = max(Recording.longest, *map(len, texts))
        return self.backend.encode_batch_fast(texts, **options)


# The measurement with 50 MB is in benchmarks/data.py.
@pytest.mark.parametrize(
    ("text", "tokens"), [("tall tale a b ", 4), ("tall.tale.a.b.", 8)], ids=["spaces", "no spaces"]
)
def test_a_line_of_two_megabytes_reaches_the_tokenizer_in_short_pieces(
    tmp_path, monkeypatch, text, tokens
):
    monkeypatch.setattr("annotated_mpnet.text.tokenizer.Tokenizer", Recording)
    monkeypatch.setattr(Recording, "longest", 0)
    document = text * (2 * 10**6 // len(text))
    (window,) = windows_of(tokens_of(tmp_path, [document]), at_least=2**62)
    assert 0 < Recording.longest <= LONGEST_PIECE
    # Without a space to cut at, words are cut, at most one per piece.
    seams = 0 if " " in text else 3 * len(pieces(document))
    expected = tokens * (len(document) // len(text))
    assert expected <= len(window.values) <= expected + seams


def test_a_piece_of_unknown_tokens_is_left_out_and_its_document_continues(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "__defaults__", (10,))
    tokens = tokens_of(tmp_path, ["tall tale çççççççç tall", "ççççççççççççççççç"])
    assert spelled(list(windows_of(tokens, 1))) == ["tall tale tall"]
