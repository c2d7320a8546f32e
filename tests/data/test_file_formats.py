"""Documents from JSON, CSV, Parquet and compressed files."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from annotated_mpnet.errors import DataError
from annotated_mpnet.text.sources import Counts, LocalFiles, read_documents

DOCUMENTS = ["one", 'two\nlines, "quoted"', "three\u2028still three", "vier ä"]


def as_json_lines(values: list[object], field: str = "text") -> bytes:
    return "".join(json.dumps({"id": 1, field: value}) + "\n" for value in values).encode()


def write(path: Path, values: list[object], field: str = "text") -> Path:
    """Write a column of values in the format of the path's extension."""
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
def test_the_column_is_selected_by_name(tmp_path, name):
    file = write(tmp_path / name, DOCUMENTS, field="body")
    assert list(read_documents(file, text_field="body")) == DOCUMENTS
    with pytest.raises(DataError, match=r"has no column 'text'; it has 'id, body'.*--text-field"):
        list(read_documents(file))


def test_compressed_text_is_text(tmp_path):
    file = tmp_path / "a.txt.gz"
    # Two members, as from `cat a.gz b.gz`.
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
    # A later row may lack the column; half a surrogate pair is no text either.
    file = tmp_path / "b.jsonl"
    file.write_text('{"text": "one"}\n{}\n{"text": "\\ud800"}\n')
    assert list(read_documents(file)) == ["one"]
    file = tmp_path / "c.csv"
    file.write_text("id,text\n1,one\n\n2,\n4,four\n")
    counts = Counts()
    assert list(read_documents(file, counts)) == ["one", "four"]
    assert (counts.not_text, counts.blank_lines) == (0, 2)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "text\nOn Monday.\nOn Friday, all, went.\n", "line 3 has 3 fields, and .* 1"),
        ("a.csv", "id,text\n1,one\n2\n", "line 3 has 1 fields, and the first line names 2: '2'"),
        ("a.tsv", "id\ttext\n1\tone\tmore\n", "line 2 has 3 fields"),
        ("a.csv.gz", "text\na,b\n", "line 2 has 2 fields"),
    ],
)
def test_a_row_of_another_width_is_refused_with_line_and_fields(tmp_path, name, content, said):
    data = content.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with pytest.raises(DataError, match=said + ".*put quotes around"):
        list(read_documents(tmp_path / name))


TWO = ["one, two", "three"]
INNER = {
    ".txt": "one, two\nthree\n",
    ".jsonl": '{"text": "one, two"}\n{"text": "three"}\n',
    ".csv": 'id,text\n1,"one, two"\n2,three\n',
    ".tsv": "id\ttext\n1\tone, two\n2\tthree\n",
    ".json": '[{"text": "one, two"},\n {"id": 2, "text": "three"}]',
}


def compress(kind: str, data: bytes) -> bytes:
    if kind == ".zst":
        return pa.compress(data, codec="zstd", asbytes=True)
    return {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[kind](data)


@pytest.mark.parametrize("compression", ["", ".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("ending", INNER)
def test_every_format_is_read_compressed_or_not_whatever_the_name_says(
    tmp_path, ending, compression
):
    data = compress(compression, INNER[ending].encode())
    # Formats are recognised by their first bytes, so the second extension may be missing.
    for name in (f"a{ending}{compression}", f"b{ending}"):
        (tmp_path / name).write_bytes(data)
        assert list(read_documents(tmp_path / name)) == TWO
    if compression:
        long = compress(compression, "".join(f"document {i * i}\n" for i in range(3000)).encode())
        for cut in (long[: len(long) // 2], long[:-1], long[:9], b"no archive at all"):
            (tmp_path / f"c.txt{compression}").write_bytes(cut)
            with pytest.raises(DataError, match="is damaged or cut off"):
                list(read_documents(tmp_path / f"c.txt{compression}"))


@pytest.mark.parametrize(
    ("content", "documents"),
    [
        ('[{"text": "one, two"}, {"text": "three"}]', TWO),
        (json.dumps([{"text": each} for each in TWO], indent=1), TWO),
        ('{"text": "one, two"}\n{"text": "three"}\n', TWO),
        ('["one, two", "three"]', TWO),
        ('{\n "text": "one, two"\n}', ["one, two"]),
        ('\n\n[{"text": "one, two"}, {"text": null}, {"text": "three"}]\n', TWO),
        ("", []),
    ],
)
def test_json_is_an_array_or_lines(tmp_path, content, documents):
    (tmp_path / "a.json").write_text(content)
    assert list(read_documents(tmp_path / "a.json")) == documents


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('[{"title": "x"}]', "no column 'text'; it has 'title'"),
        ('{"data": [{"text": "x"}]}', "no column 'text'; it has 'data'"),
        ('[{"text": "x"},', "is not JSON"),
        ("[" * 9999, "is not JSON"),
        ("3", "expected an array of objects"),
        ("plain text", "is not JSON"),
        ('[{"text": "a\\u0000b"}]', "row 1 .* holds a NUL character"),
    ],
)
def test_other_json_is_refused(tmp_path, content, said):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=said):
        list(read_documents(tmp_path / "a.json"))


def test_a_nul_character_is_refused_in_every_format(tmp_path):
    for name in ("a.jsonl", "a.parquet"):
        with pytest.raises(DataError, match=r"row 2 .* holds a NUL character"):
            list(read_documents(write(tmp_path / name, ["one", "t\0wo"])))


@pytest.mark.parametrize("name", ["a.html", "a.PDF", "a.docx", "a.tar.gz", "a.zip", "a.ipynb"])
def test_a_file_that_is_not_plain_text_by_its_name_is_refused(tmp_path, name):
    (tmp_path / name).write_text("<p>One.</p>\n")
    with pytest.raises(DataError, match="is not plain text by its name"):
        list(read_documents(tmp_path / name))


def test_a_saved_dataset_is_read_and_one_of_several_splits_has_to_be_named(tmp_path):
    saved = datasets.Dataset.from_dict({"id": [1, 2], "text": TWO})
    saved.save_to_disk(tmp_path / "one", num_shards=2)
    assert list(LocalFiles.find(tmp_path / "one", "--train-dir").documents(Counts())) == TWO
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(tmp_path / "several")
    with pytest.raises(DataError, match="several splits; name one of them: 'test, train'"):
        LocalFiles.find(tmp_path / "several", "--train-dir")
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(DataError, match=r"state.json is damaged"):
        LocalFiles.find(tmp_path / "one", "--train-dir")


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_column_that_holds_hardly_any_text_is_refused(tmp_path, name):
    nothing = write(tmp_path / name, [None] * 1500)
    with pytest.raises(DataError, match=r"1,001 of the first 1,001 rows of .* column 'text'"):
        list(read_documents(nothing))
    # One in nine, from the start.
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
    for content in [*broken, whole + b"garbage after it"]:
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
