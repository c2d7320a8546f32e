import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from annotated_mpnet.errors import DataError
from annotated_mpnet.text.sources import Counts, read_documents

DOCUMENTS = ["one", 'two\nlines, "quoted"', "three\u2028still three", "vier ä"]


def as_json_lines(values: list[object], field: str = "text") -> bytes:
    return "".join(json.dumps({"id": 1, field: value}) + "\n" for value in values).encode()


def write(path: Path, values: list[object], field: str = "text") -> Path:
    """Write a column of values in the format that the path's ending names."""
    if path.suffix == ".parquet":
        table = pa.table({"id": [1] * len(values), field: values})
        pa.parquet.write_table(table, path, row_group_size=2)
    elif path.suffix.lower() == ".csv":
        quoted = ['"' + str(value).replace('"', '""') + '"' for value in values]
        path.write_text(f"id,{field}\n" + "".join(f"1,{q}\n" for q in quoted), newline="")
    else:
        content = as_json_lines(values, field)
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


COLUMNS = pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.csv", "A.CSV"])


@COLUMNS
def test_every_format_with_columns_yields_the_same_documents(tmp_path, name):
    counts = Counts()
    assert list(read_documents(write(tmp_path / name, [*DOCUMENTS, " "]), counts)) == DOCUMENTS
    assert counts == Counts(documents=4, files=1, blank_lines=1)


@COLUMNS
def test_column_has_the_name_that_is_asked_for(tmp_path, name):
    file = write(tmp_path / name, DOCUMENTS, field="body")
    assert list(read_documents(file, text_field="body")) == DOCUMENTS
    with pytest.raises(DataError, match=r"has no column 'text'; it has 'id, body'.*--text-field"):
        list(read_documents(file))


def test_compressed_text_is_text(tmp_path):
    file = tmp_path / "a.txt.gz"
    # Two members, as `cat a.gz b.gz` makes them.
    file.write_bytes(gzip.compress(b"\xef\xbb\xbfone\r\n\n") + gzip.compress(b"two\n"))
    counts = Counts()
    assert list(read_documents(file, counts)) == ["one", "two"]
    assert counts == Counts(documents=2, files=1, blank_lines=1)


def test_a_column_may_hold_a_book(tmp_path):
    book = "a book. " * 100_000
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        assert list(read_documents(write(tmp_path / name, [book]))) == [book]


def test_rows_without_text_are_skipped_and_counted(tmp_path):
    values = ["one", None, 3, ["list"], {"a": 1}, True, "two"]
    counts = Counts()
    assert list(read_documents(write(tmp_path / "a.jsonl", values), counts)) == ["one", "two"]
    assert counts.not_text == 5
    # A later row may lack the column altogether; half a surrogate pair is no text either.
    file = tmp_path / "b.jsonl"
    file.write_text('{"text": "one"}\n{}\n{"text": "\\ud800"}\n')
    assert list(read_documents(file)) == ["one"]
    file = tmp_path / "c.csv"
    file.write_text("id,text\n1,one\n2\n\n3,two,three\n4,four\n")
    counts = Counts()
    assert list(read_documents(file, counts)) == ["one", "four"]
    assert (counts.not_text, counts.blank_lines) == (2, 1)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_column_that_holds_hardly_any_text_is_refused(tmp_path, name):
    nothing = write(tmp_path / name, [None] * 1500)
    with pytest.raises(DataError, match=r"1,001 of the first 1,001 rows of .* column 'text'"):
        list(read_documents(nothing))
    # One in nine, from the beginning.
    sparse = write(tmp_path / name, [None if i % 9 == 0 else "text" for i in range(12_000)])
    with pytest.raises(DataError, match="hold no text"):
        list(read_documents(sparse))
    rare = write(tmp_path / name, [None if i % 11 == 0 else "text" for i in range(12_000)])
    assert len(list(read_documents(rare))) == 12_000 - 1091


@pytest.mark.parametrize(
    ("content", "where"),
    [
        (b'{"text": "one"}\n{"text": tw\n', "line 2, which begins at byte 16, is not JSON"),
        (b'{"text": "one"}\n["two"]\n', "line 2, which begins at byte 16, is not a JSON object"),
        (b"plain text\n", "line 1, which begins at byte 0, is not JSON"),
        (b"[" * 100_000, "line 1, which begins at byte 0, is not JSON"),
        (b'{"text": ' + b"1" * 5000 + b"}", "line 1, which begins at byte 0, is not JSON"),
        (b'{"text": "one"}\n{"text": "\xff"}', "not UTF-8: line 2, byte 26 of the file is 0xff"),
        (b'{"text": "one\0"}', "line 1, byte 13 of the file is NUL"),
    ],
)
def test_damaged_json_lines_name_line_and_byte(tmp_path, content, where):
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match=where) as caught:
        list(read_documents(file))
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "content", ['id,text\n1,"never closed\n', 'id,text\n1,"a"b\n', "id,text\n1,a\rb\n"]
)
def test_damaged_csv_names_the_line(tmp_path, content):
    file = tmp_path / "a.csv"
    file.write_text(content, newline="")
    with pytest.raises(DataError, match=r"a.csv' is not CSV: .* at line 2"):
        list(read_documents(file))


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz"])
def test_compressed_file_that_is_cut_off_or_damaged_is_refused(tmp_path, name):
    file = tmp_path / name
    whole = gzip.compress(as_json_lines([f"document {i * i}" for i in range(2000)]))
    damaged = bytearray(whole)
    damaged[-6] ^= 0xFF
    broken = [whole[: len(whole) // 2], whole[:-1], whole[:5], bytes(damaged), b"no gzip at all"]
    for content in [*broken, whole + b"garbage behind it"]:
        file.write_bytes(content)
        with pytest.raises(DataError, match="is damaged or cut off"):
            list(read_documents(file))


def test_parquet_that_is_cut_off_or_damaged_is_refused(tmp_path):
    file = write(tmp_path / "a.parquet", [f"document {i}" for i in range(200)])
    whole = file.read_bytes()
    for content in [b"", whole[:100], whole[:-1], b"PAR1" + bytes(50) + b"PAR1"]:
        file.write_bytes(content)
        with pytest.raises(DataError, match="damaged or not a Parquet file"):
            list(read_documents(file))


def test_foreign_text_cannot_break_the_message(tmp_path):
    # Row 81 of the fault matrix.
    file = tmp_path / "a.jsonl"
    file.write_text("\x1b[31mred\r" + "x" * 500 + "\n")
    with pytest.raises(DataError) as caught:
        list(read_documents(file))
    assert "\x1b" not in str(caught.value)
    assert "\r" not in str(caught.value)
    assert "x" * 81 not in str(caught.value)


def test_an_empty_string_is_blank_and_not_missing(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": ""}\n{"text": "words"}\n')
    counts = Counts()
    assert list(read_documents(file, counts)) == ["words"]
    assert (counts.not_text, counts.blank_lines) == (0, 1)
