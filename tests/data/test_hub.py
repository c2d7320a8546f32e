"""Datasets of the Hub: as a stream, downloaded, and in a local folder."""

import gc
import json
import os
import shutil
import time
from collections.abc import Generator
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow as pa
import pytest
from fake_shards import text_of, write_shards

from annotated_mpnet.errors import DataError
from annotated_mpnet.settings.config import DataConfig
from annotated_mpnet.streams import hub
from annotated_mpnet.streams.hub import open_downloaded, open_stream
from annotated_mpnet.text import tokenizer
from annotated_mpnet.text.counts import Counts

COMMIT = "0123456789" * 4


def config(folder: Path | str, **options: object) -> DataConfig:
    return DataConfig(dataset_name=str(folder), min_text_length=0, **options)


def write(path: Path, *rows: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def all_of(stream: hub.DatasetStream) -> list[object]:
    return [
        value
        for shard in range(stream.num_shards)
        for part in range(stream.num_parts(shard))
        for values in stream.read(shard, part, 0)
        for value in values
    ]


def refused(data: DataConfig, *, streaming: bool = True) -> str:
    """Return the message with which a dataset is refused."""
    with pytest.raises(DataError) as caught:
        (open_stream if streaming else open_downloaded)(data)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_stream_and_download_of_a_folder_have_the_same_documents(tmp_path, kind):
    texts = write_shards(tmp_path / "d", [5, 20, 3], kind)
    data = config(tmp_path / "d")
    stream = open_stream(data)
    assert stream.num_shards == 3
    assert stream.num_parts(1) == (3 if kind == "parquet" else 1)
    assert all_of(stream) == texts
    counts = Counts()
    assert list(open_downloaded(data).documents(counts)) == texts
    assert counts == Counts(documents=28)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_reading_begins_at_any_row_of_any_part(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(hub, "ROWS_AT_ONCE", 4)
    texts = write_shards(tmp_path / "d", [20], kind)
    stream = open_stream(config(tmp_path / "d"))
    part = texts[7:14] if kind == "parquet" else texts
    number = 1 if kind == "parquet" else 0
    for row in range(len(part) + 1):
        read = [value for values in stream.read(0, number, row) for value in values]
        assert read == part[row:]


@pytest.fixture
def csv() -> Generator[None]:
    """Close the files that the CSV reader of `datasets` leaves open."""
    yield
    gc.collect()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.usefixtures("csv")
def test_csv_and_other_columns_are_read_too(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.csv").write_text('body,n\nplain,1\n"two\nlines",2\n')
    stream = open_stream(config(tmp_path / "d", text_field="body"))
    assert all_of(stream) == ["plain", "two\nlines"]


def test_rows_of_all_types_are_returned_unchanged(tmp_path):
    values = ["a", 3, ["b"], None, {"c": 1}, "d"]
    write(tmp_path / "d" / "train.jsonl", *({"text": value} for value in values), {"other": 1})
    assert all_of(open_stream(config(tmp_path / "d"))) == [*values, None]
    counts = Counts()
    downloaded = open_downloaded(config(tmp_path / "d"))
    assert list(downloaded.documents(counts)) == ["a", "d"]
    assert counts.not_text == 5


def test_half_of_a_surrogate_pair_is_not_text():
    column = pa.array(['"\\ud800"', '"\\ud83d\\ude00"'], pa.json_())
    assert hub._values(pa.chunked_array([column])) == [None, "\U0001f600"]


def test_short_and_blank_texts_of_a_download_are_counted(tmp_path):
    texts = ["long enough", "short", " " * 20, None]
    write(tmp_path / "d" / "train.jsonl", *({"text": text} for text in texts))
    downloaded = open_downloaded(
        DataConfig(dataset_name=str(tmp_path / "d"), min_text_length=len("long enough"))
    )
    counts = Counts()
    assert list(downloaded.documents(counts)) == ["long enough"]
    assert counts == Counts(documents=1, too_short=1, blank_lines=1, not_text=1)
    assert downloaded.fingerprint.endswith("at least 11 characters")


def test_fingerprint_names_content_and_choice_but_not_the_place(tmp_path):
    write_shards(tmp_path / "a" / "d", [5, 3], "jsonl")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "d" / ".hidden").write_text("x")
    first = open_stream(config(tmp_path / "a" / "d")).fingerprint
    assert open_stream(config(tmp_path / "b" / "d")).fingerprint == first
    assert first.startswith("d@")
    assert first.endswith(", config None, split train, column text")

    edited = tmp_path / "b" / "d" / "train-001.jsonl"
    before = edited.read_text()
    edited.write_text(before.replace("k", "j", 1))
    os.utime(edited, (0, 0))
    fingerprints = {first, open_stream(config(tmp_path / "b" / "d")).fingerprint}
    edited.rename(edited.with_name("train-00.jsonl"))
    fingerprints.add(open_stream(config(tmp_path / "b" / "d")).fingerprint)
    write(tmp_path / "b" / "d" / "train-100.jsonl", {"text": "more"})
    fingerprints.add(open_stream(config(tmp_path / "b" / "d")).fingerprint)
    assert len(fingerprints) == 4


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.usefixtures("csv")
def test_missing_column_lists_those_that_are_there(tmp_path):
    write(tmp_path / "d" / "train.jsonl", {"body": "a", "url": "b"})
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "train.csv").write_text("title,body\nx,y\n")
    for streaming in (True, False):
        message = refused(config(tmp_path / "d"), streaming=streaming)
        assert "--text-field is 'text'" in message
        assert "its columns are 'body, url'" in message
        assert "'title, body'" in refused(config(tmp_path / "c"), streaming=streaming)


def test_unknown_configuration_and_split_are_named(tmp_path):
    write_shards(tmp_path / "d", [5], "jsonl")
    assert "split nosuch: " in refused(config(tmp_path / "d", dataset_split="nosuch"))
    assert "Available splits" in refused(config(tmp_path / "d", dataset_split="nosuch"))
    message = refused(config(tmp_path / "d", dataset_config="nosuch"))
    assert "configuration nosuch" in message
    assert "--dataset-config" in message


def test_empty_folder_and_what_is_not_a_folder_are_refused(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "file").write_text("text")
    assert "has no data files" in refused(config(tmp_path / "d"))
    assert "is not a directory" in refused(config(tmp_path / "nosuch"))
    assert "--train-dir" in refused(config(tmp_path / "file"))


def test_loading_script_is_refused_and_not_run(tmp_path):
    (tmp_path / "script").mkdir()
    ran = tmp_path / "ran"
    for name in ("script.py", "setup.py"):
        (tmp_path / "script" / name).write_text(f"open({str(ran)!r}, 'w')\n")
    write(tmp_path / "script" / "train.jsonl", {"text": "a"})
    assert "scripts are no longer supported" in refused(config(tmp_path / "script"))
    assert not ran.exists()


def test_hub_that_cannot_be_reached_says_what_works_without_it_at_once(monkeypatch, no_network):
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it pauses"))
    message = refused(DataConfig())
    assert "the Hub cannot be reached for the dataset 'HuggingFaceFW/fineweb-edu'" in message
    assert "--preset demo" in message
    assert "--train-dir DIR" in message
    assert "--preset demo" in refused(DataConfig(dataset_name="a/b"), streaming=False)


def answer(monkeypatch, outcome: object) -> list[tuple[object, ...]]:
    """Fake the Hub's response; return the requests."""
    asked: list[tuple[object, ...]] = []

    def repo_info(self, name, *, repo_type, revision, timeout):
        asked.append((name, repo_type, revision, timeout))
        if isinstance(outcome, Exception):
            raise outcome
        return huggingface_hub.hf_api.DatasetInfo(id=name, sha=outcome)

    monkeypatch.setattr(tokenizer.HfApi, "repo_info", repo_info)
    return asked


def test_commit_of_a_revision_is_read_and_recorded(tmp_path, monkeypatch):
    write_shards(tmp_path / "d", [5], "jsonl")
    folder = datasets.load_dataset(str(tmp_path / "d"), split="train", streaming=True)
    asked = answer(monkeypatch, COMMIT)
    loaded = []

    def load_dataset(path, **options):
        loaded.append((path, options))
        return folder

    monkeypatch.setattr(hub.datasets, "load_dataset", load_dataset)
    stream = open_stream(
        DataConfig(dataset_name="some/data", dataset_revision="main", dataset_config="en")
    )
    assert asked == [("some/data", "dataset", "main", tokenizer.SECONDS_TO_ANSWER)]
    options = {"name": "en", "split": "train", "revision": COMMIT, "streaming": True}
    assert loaded == [("some/data", options)]
    assert stream.fingerprint == f"some/data@{COMMIT}, config en, split train, column text"


def refusal(kind: type[Exception]) -> Exception:
    """Return an error response of the Hub, without its request."""
    error = kind.__new__(kind)
    Exception.__init__(error, "no\nentry")
    return error


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (huggingface_hub.errors.RepositoryNotFoundError, "no dataset 'some/data' on the Hub"),
        (huggingface_hub.errors.GatedRepoError, "gated; accept its terms"),
        (huggingface_hub.errors.RevisionNotFoundError, "no revision 'v9'; .*--dataset-revision"),
        (huggingface_hub.errors.HFValidationError, "no dataset 'some/data'"),
        (TimeoutError, "cannot be reached .*--preset demo"),
    ],
)
def test_answers_of_the_hub_are_told_apart(monkeypatch, kind, expected):
    answer(monkeypatch, refusal(kind))
    with pytest.raises(DataError, match=expected):
        open_stream(DataConfig(dataset_name="some/data", dataset_revision="v9"))


def test_downloaded_dataset_is_found_in_the_cache_when_the_hub_is_silent(tmp_path, monkeypatch):
    write_shards(tmp_path / "d", [5], "jsonl")
    downloaded = datasets.load_dataset(str(tmp_path / "d"), split="train")
    # As after a download from the Hub: `datasets` names the directory by the commit.
    made = Path(downloaded.cache_files[0]["filename"])
    cached = tmp_path / "cache" / "some___data" / "default" / "0.0.0" / COMMIT
    shutil.copytree(made.parent, cached)
    (cached / made.name).rename(cached / "data-train.arrow")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    source = open_downloaded(config("some/data"))
    assert list(source.documents(Counts())) == [text_of(i) for i in range(5)]
    assert source.fingerprint.startswith(f"some/data@{COMMIT}, ")
    same = open_downloaded(config("some/data", dataset_revision=COMMIT))
    assert same.fingerprint == source.fingerprint
    message = refused(config("some/data", dataset_revision="main"), streaming=False)
    assert f"at commit {COMMIT}" in message
