"""Text files: where they are found, and where their documents end."""

import os

import pytest

from annotated_mpnet.errors import DataError
from annotated_mpnet.text.sources import Counts, find_text_files, fingerprint_files, read_documents


def documents_of(tmp_path, content: bytes) -> list[str]:
    file = tmp_path / "some.txt"
    file.write_bytes(content)
    return list(read_documents(file))


@pytest.mark.parametrize(
    ("content", "documents"),
    [
        (b"one\ntwo\n", ["one", "two"]),
        (b"one\ntwo", ["one", "two"]),
        (b"\xef\xbb\xbfone\n\xef\xbb\xbftwo\n", ["one", "\ufefftwo"]),
        (b"one\r\ntwo\r\n", ["one", "two"]),
        (b"one\rstill one\n", ["one\rstill one"]),
        (
            "one\u2028\u2029\x0b\x0c\x1c\x85still one\n".encode(),
            ["one\u2028\u2029\x0b\x0c\x1c\x85still one"],
        ),
        (b"\n \t\n\r\none\n\n", ["one"]),
        (b"", []),
        (b"\xef\xbb\xbf", []),
    ],
)
def test_document_ends_at_a_newline_and_nowhere_else(tmp_path, content, documents):
    assert documents_of(tmp_path, content) == documents


def test_blank_lines_and_documents_are_counted_over_files(tmp_path):
    counts = Counts()
    for name, content in {"a": "one\n\n  \ntwo", "b": "\r\nthree\n"}.items():
        (tmp_path / name).write_text(content, newline="")
        list(read_documents(tmp_path / name, counts))
    assert counts == Counts(documents=3, files=2, blank_lines=3)


def test_not_utf8_names_file_line_and_byte(tmp_path):
    content = b"\xef\xbb\xbffirst\r\n\xc3\xa4\nab\xffcd\n"
    with pytest.raises(DataError, match=r"some.txt' is not UTF-8: line 3, byte 15 of") as caught:
        documents_of(tmp_path, content)
    assert content[15] == 0xFF
    assert "0xff" in str(caught.value)


def test_nul_byte_names_file_line_and_byte(tmp_path):
    content = b"first\nse\0cond\n"
    with pytest.raises(DataError, match=r"line 2, byte 8 of the file is NUL"):
        documents_of(tmp_path, content)
    assert content[8] == 0


def test_documents_before_the_damage_are_still_delivered_in_order(tmp_path):
    file = tmp_path / "some.txt"
    file.write_bytes(b"one\n\xff\n")
    documents = read_documents(file)
    assert next(documents) == "one"
    with pytest.raises(DataError):
        next(documents)


def test_directory_is_searched_recursively_in_order_of_paths(tmp_path):
    names = [
        "b.txt",
        "a/z.txt.gz",
        "a/deep/er/x.TXT",
        "c.jsonl",
        "c.parquet",
        "c.csv",
        "d.jsonl.gz",
    ]
    passed_over = ["c.md", "d.json", ".hidden.txt", ".git/y.txt", "txt"]
    for name in names + passed_over:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("text\n")
    (tmp_path / "folder.txt").mkdir()
    # Fault 15: a circular link is not followed, but counted.
    (tmp_path / "loop").symlink_to(tmp_path)
    counts = Counts()
    found = find_text_files(tmp_path, "--train-dir", counts)
    assert [str(file.relative_to(tmp_path)) for file in found] == sorted(names)
    assert counts.skipped_files == len(passed_over) + 1


def test_single_file_may_have_any_name(tmp_path):
    file = tmp_path / "validation.text"
    file.write_text("text\n")
    assert find_text_files(file, "--valid-file") == [file]


def test_directory_without_text_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / ".hidden.txt").write_text("text\n")
    with pytest.raises(DataError, match=r"no text files in .* \(--train-dir\)"):
        find_text_files(tmp_path, "--train-dir")


def test_missing_path_is_refused_by_its_flag(tmp_path):
    with pytest.raises(DataError, match=r"--valid-file .*nowhere' does not exist"):
        find_text_files(tmp_path / "nowhere", "--valid-file")


def test_pipe_is_refused_without_opening_it(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="neither a regular file nor a directory"):
        find_text_files(tmp_path / "pipe", "--valid-file")


def test_file_that_disappears_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        list(read_documents(tmp_path / "gone.txt"))
    with pytest.raises(DataError, match="cannot be read"):
        fingerprint_files([tmp_path / "gone.txt"])


def test_name_of_a_file_cannot_break_the_message(tmp_path):
    file = tmp_path / "two\nlines\x1b[31m.txt"
    file.write_bytes(b"\xff")
    with pytest.raises(DataError) as caught:
        list(read_documents(file))
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_fingerprint_is_of_contents_in_order_whatever_their_names(tmp_path):
    def files(**contents: str):
        for name, content in contents.items():
            (tmp_path / name).write_text(content)
        return fingerprint_files([tmp_path / name for name in contents])

    first = files(a="one", b="two")
    assert files(c="one", d="two") == first
    others = [files(a="two", b="one"), files(a="onet", b="wo"), files(a="onetwo"), files(a="One")]
    assert len({first, *others}) == 5
