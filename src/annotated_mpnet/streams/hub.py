"""Datasets from the Hugging Face Hub, or a folder of data files, downloaded or streamed.

`datasets` finds the files and reads jsonl, Parquet, CSV and more. This module adds what a run
needs:

- *Which text was it?* The Hub is asked which commit a revision is; that commit is read, and is part
  of the `fingerprint` that a resume compares. For a folder, a hash of its files takes its place:

      HuggingFaceFW/fineweb-edu@COMMIT, config sample-10BT, split train, column text

- *Is it there?* `datasets` retries for minutes when the Hub does not answer. It is asked once
  beforehand, with a limit of ten seconds.
- *Is the text there?* The column is checked before anything is built.

**Two ways to read.** Downloaded (`--no-streaming`), a dataset is packed like local files. As a
stream it is read as it comes. An exact resume depends on where reading can begin:

    dataset    [ shard 0 ] [ shard 1 ] [ shard 2 ] ...      files
    shard      [ part 0 | part 1 | part 2 ]                 row groups of a Parquet file
    part       row 0, row 1, row 2, ...

Any part can be opened without what comes before it; within a part, reading begins at its first row.
Formats other than Parquet have one part per file. Seven rows in groups of three; part 1 from row 2:

>>> import tempfile
>>> with tempfile.TemporaryDirectory() as folder:
...     rows = pa.table({"text": list("abcdefg")})
...     pa.parquet.write_table(rows, f"{folder}/train.parquet", row_group_size=3)
...     stream = open_stream(DataConfig(dataset_name=folder))
...     print([list(stream.read(0, part, first_row=0)) for part in range(stream.num_parts(0))])
...     print(list(stream.read(0, part=1, first_row=2)))
[[['a', 'b', 'c']], [['d', 'e', 'f']], [['g']]]
[['f']]

It reads 610 thousand rows a second from a disk, and begins at row 100,000 in 55 ms (`docs/log.md`).
Code that comes with a dataset is not run.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from annotated_mpnet.errors import DataError
from annotated_mpnet.settings.config import DataConfig
from annotated_mpnet.text.counts import Counts, only_text
from annotated_mpnet.text.file_formats import encodable
from annotated_mpnet.text.sources import fingerprint_files, shown, shown_text
from annotated_mpnet.text.tokenizer import commit_of

DEFAULT_DATASET = "HuggingFaceFW/fineweb-edu"
"""Streamed when no source of text is given."""

ROWS_AT_ONCE = 256
"""Rows that are passed on and tokenised together: enough to keep the tokenizer's threads busy."""

WITHOUT_THE_HUB = "train without it: --preset demo brings its own text, --train-dir DIR takes yours"
"""How a message about an unreachable Hub ends."""


class DatasetStream:
    """A dataset that is read as it comes: shards, their parts, and rows from any of them.

    It keeps no position; `shards.ShardReader` does.

    Attributes:
        fingerprint: names the dataset: commit, configuration, split, column.
        num_shards: files, at least one.
    """

    def __init__(
        self, dataset: datasets.IterableDataset, text_field: str, fingerprint: str
    ) -> None:
        self.fingerprint = fingerprint
        self.num_shards: int = dataset.num_shards
        # Other columns of a Parquet file are not even downloaded.
        self._dataset = dataset.select_columns([text_field])
        self._text_field = text_field
        self._open: tuple[int, datasets.IterableDataset] | None = None

    def num_parts(self, shard: int) -> int:
        """Return how many parts of a shard can be opened by themselves; of most formats, 1."""
        return int(self._parts(shard).num_shards)

    def read(self, shard: int, part: int, first_row: int) -> Iterator[list[object]]:
        """Yield the text column of a part, some rows at a time, starting at `first_row`.

        Raises:
            Exception: the network, or whatever a damaged file makes its reader raise;
                `streams/shards.py` tells them apart.
        """
        parts = self._parts(shard)
        # Arrow tables, because rows that are only skipped then cost nothing.
        tables = parts.shard(parts.num_shards, part).with_format("arrow").iter(ROWS_AT_ONCE)
        row = 0
        # Closed here, because a connection and a thread would outlive an interrupted run.
        with closing(tables):
            for table in tables:
                wanted = table.slice(max(0, first_row - row))
                row += len(table)
                if len(wanted):
                    yield _values(wanted.column(self._text_field))

    def _parts(self, shard: int) -> datasets.IterableDataset:
        """Return a shard as a dataset of its own, whose shards are its parts."""
        # Finding the parts of a file is a request to the Hub: once per shard.
        if self._open is None or self._open[0] != shard:
            self._open = shard, self._dataset.shard(self.num_shards, shard).reshard()
        return self._open[1]


class DownloadedDataset:
    """A dataset on this machine's disk, as a source of documents.

    >>> table = datasets.Dataset.from_dict({"text": ["long enough", "short", " ", None]})
    >>> source = DownloadedDataset(table, "text", "four rows", min_text_length=11)
    >>> counts = Counts()
    >>> list(source.documents(counts)), counts.too_short, counts.blank_lines, counts.not_text
    (['long enough'], 1, 1, 1)
    >>> source.fingerprint
    'four rows, at least 11 characters'

    Attributes:
        fingerprint: names the documents: commit, configuration, split, column, shortest text.
    """

    def __init__(
        self, dataset: datasets.Dataset, text_field: str, fingerprint: str, min_text_length: int
    ) -> None:
        self.fingerprint = f"{fingerprint}, at least {min_text_length} characters"
        self._dataset = dataset.select_columns([text_field]).with_format("arrow")
        self._text_field = text_field
        self._min_text_length = min_text_length

    def documents(self, counts: Counts) -> Iterator[str]:
        """Yield the documents, and count them and what is skipped.

        Raises:
            DataError: the column does not hold text: see `counts.only_text`.
        """
        values = (
            value
            for table in self._dataset.iter(ROWS_AT_ONCE)
            for value in _values(table.column(self._text_field))
        )
        for text in only_text(values, counts, source=self.fingerprint, text_field=self._text_field):
            if len(text) >= self._min_text_length:
                yield text
            else:
                counts.documents -= 1  # `only_text` has counted it
                counts.too_short += 1


def open_stream(data: DataConfig) -> DatasetStream:
    """Open the dataset of a configuration for reading as it comes; no text is read yet.

    >>> open_stream(DataConfig(dataset_name="./corpus"))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    annotated_mpnet.errors.DataError: --dataset-name is 'corpus', which is not a directory; ...

    Raises:
        DataError: it is not there, cannot be reached or read, or has no such column.
    """
    dataset, fingerprint = _load(data, streaming=True)
    return DatasetStream(dataset, data.text_field, fingerprint)


def open_downloaded(data: DataConfig) -> DownloadedDataset:
    """Download the dataset of a configuration, or find it in the cache of `datasets`.

    Raises:
        DataError: it is not there, cannot be reached or read, or has no such column.
    """
    dataset, fingerprint = _load(data, streaming=False)
    return DownloadedDataset(dataset, data.text_field, fingerprint, data.min_text_length)


def _load(
    data: DataConfig, streaming: bool
) -> tuple[datasets.Dataset | datasets.IterableDataset, str]:
    """Return a dataset that has the column, and its fingerprint."""
    name = data.dataset_name or DEFAULT_DATASET
    folder = Path(name).expanduser()
    local = folder.is_dir()
    # What looks like a path is a path with a typo, not a name on the Hub.
    if not local and (folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise DataError(
            f"--dataset-name is {shown(folder)}, which is not a directory; expected a folder of "
            "data files or a Hub name; give text files with --train-dir"
        )
    # The commit is read, not the revision: `main` may move in between.
    commit = None if local else _resolve(name, data.dataset_revision, must_answer=streaming)
    try:
        dataset = datasets.load_dataset(
            str(folder) if local else name,
            name=data.dataset_config,
            split=data.dataset_split,
            revision=commit,
            streaming=streaming,
        )
        # A stream of jsonl has no column names before its first row is read.
        columns = dataset.column_names or list(next(iter(dataset), {}))
    except Exception as error:
        raise DataError(_why_not_opened(name, data, error)) from error
    if data.text_field not in columns:
        raise DataError(
            f"--text-field is {shown_text(data.text_field)}, which the dataset {shown_text(name)} "
            f"does not have; its columns are {shown_text(', '.join(map(str, columns)))}"
        )
    # Without the path: a folder that was moved or copied is the same text.
    if local:
        which = f"{folder.resolve().name}@{_fingerprint_folder(folder)}"
    else:
        which = f"{name}@{commit or _cached_commit(dataset, name, data.dataset_revision)}"
    of_it = f"config {data.dataset_config}, split {data.dataset_split}, column {data.text_field}"
    return dataset, f"{which}, {of_it}"


def _resolve(name: str, revision: str | None, must_answer: bool) -> str | None:
    """Return the commit; None where the Hub does not answer and the cache may still do.

    Raises:
        DataError: the Hub has no such dataset or revision, or not for this user; or it does not
            answer and `must_answer` (what is streamed is in no cache).
    """
    try:
        return commit_of(name, "dataset", revision)
    # A subclass of RepositoryNotFoundError.
    except GatedRepoError as error:
        raise DataError(
            f"the dataset {shown_text(name)} is gated; accept its terms on its page of the Hub, "
            "then `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise DataError(
            f"the dataset {shown_text(name)} has no revision {shown_text(str(revision))}; expected "
            "a commit, tag or branch (--dataset-revision)"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise DataError(
            f"there is no dataset {shown_text(name)} on the Hub (or it is private: `hf auth "
            "login`), and no folder of that name here (--dataset-name)"
        ) from error
    # No network, a server that is down, offline mode.
    except Exception as error:
        if must_answer:
            raise DataError(_unreachable(name, error)) from error
        return None


def _cached_commit(dataset: datasets.Dataset, name: str, revision: str | None) -> str:
    """Return the commit of a dataset that came from the cache: the name of its directory there.

    HF: without a network, `datasets` takes the last version in its cache, whatever the revision.

    Raises:
        DataError: another revision was asked for.
    """
    commit = Path(dataset.cache_files[0]["filename"]).parent.name
    if revision not in (None, commit):
        raise DataError(
            f"the Hub cannot be reached, and the cache has the dataset {shown_text(name)} at "
            f"commit {commit}, not at --dataset-revision {shown_text(str(revision))}"
        )
    return commit


def _fingerprint_folder(folder: Path) -> str:
    """Return a hash of the files of a folder and of their names, of forty digits, like a commit."""
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    )
    names = [path.relative_to(folder).as_posix() for path in files]
    named = json.dumps([names, fingerprint_files(files)])
    return hashlib.sha256(named.encode()).hexdigest()[:40]


def _values(column: pa.ChunkedArray) -> list[object]:
    """Return a column's values.

    Where a jsonl column holds strings and numbers, `datasets` keeps both as JSON, quotation marks
    and all:

    >>> mixed = pa.array(['"a"', "3", None], pa.json_())
    >>> _values(pa.chunked_array([mixed])), _values(pa.chunked_array([["a", None]]))
    (['a', 3, None], ['a', None])
    """
    values: list[object] = column.to_pylist()
    if not isinstance(column.type, pa.JsonType):
        return values
    return [None if value is None else _from_json(str(value)) for value in values]


def _from_json(text: str) -> object:
    """Return a value, or None for text that cannot be encoded: see `file_formats.encodable`."""
    return encodable(json.loads(text))


def _why_not_opened(name: str, data: DataConfig, error: Exception) -> str:
    """Return the line that says what to do about an error of `datasets`."""
    if isinstance(error, ConnectionError):
        return _unreachable(name, error)
    if isinstance(error, FileNotFoundError):
        return (
            f"the dataset {shown_text(name)} has no data files for configuration "
            f"{data.dataset_config} and split {data.dataset_split}; expected .jsonl, .parquet, "
            ".csv or other files that `datasets` reads"
        )
    return (
        f"the dataset {shown_text(name)} cannot be opened with configuration {data.dataset_config} "
        f"and split {data.dataset_split}: {shown_text(str(error))}; see --dataset-config, "
        "--dataset-split"
    )


def _unreachable(name: str, error: Exception) -> str:
    return (
        f"the Hub cannot be reached for the dataset {shown_text(name)} "
        f"({shown_text(str(error))}); {WITHOUT_THE_HUB}"
    )
