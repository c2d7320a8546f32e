"""Datasets from the Hugging Face Hub or a folder of data files, downloaded or streamed.

The library `datasets` finds files, configurations and splits, and reads jsonl, Parquet, CSV and
more. This module adds what a run needs to know:

- *Which text was it?* `main` moves. The Hub says which commit a revision is, that commit is read,
  and its name is part of the `fingerprint` that a resumed run compares. For a folder, a hash of its
  files takes the place of the commit: `HuggingFaceFW/fineweb-edu@COMMIT, config sample-10BT, split
  train, column text`.
- *Can we reach it?* `datasets` retries for minutes. We ask the Hub once, with a limit of ten
  seconds, and say what works without a network.
- *Does it have the column?* Checked before anything is built.

A streamed dataset is read while it downloads and never stored, so reading on is the only cheap
operation. What an exact resume can start from is this:

    dataset    [ shard 0 ] [ shard 1 ] [ shard 2 ] ...      files
    shard      [ part 0 | part 1 | part 2 ]                 row groups of a Parquet file
    part       row 0, row 1, row 2, ...

Any part can be opened without the ones before it; within a part, reading begins at its first row.
Starting in the middle of a Parquet file costs at most one row group. Other formats have one part
for each file, and all rows before the start must be parsed. Seven rows in groups of three:

>>> import tempfile
>>> with tempfile.TemporaryDirectory() as folder:
...     rows = pa.table({"text": list("abcdefg")})
...     pa.parquet.write_table(rows, f"{folder}/train.parquet", row_group_size=3)
...     stream = open_stream(DataConfig(dataset_name=folder))
...     print([list(stream.read(0, part, first_row=0)) for part in range(stream.num_parts(0))])
...     print(list(stream.read(0, part=1, first_row=2)))
[[['a', 'b', 'c']], [['d', 'e', 'f']], [['g']]]
[['f']]

`IterableDataset.state_dict` would resume too, but it reads a Parquet file from its beginning and
loses its shuffle buffer.
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

from annotated_mpnet.errors import DataError, shown
from annotated_mpnet.settings.config import DataConfig
from annotated_mpnet.text.counts import Counts, only_text
from annotated_mpnet.text.file_formats import encodable
from annotated_mpnet.text.sources import fingerprint_files
from annotated_mpnet.text.tokenizer import commit_of

DEFAULT_DATASET = "HuggingFaceFW/fineweb-edu"
"""Streamed when no source of text is given."""

ROWS_AT_ONCE = 256
"""Rows read and tokenized together: enough to keep the tokenizer's threads busy."""

WITHOUT_THE_HUB = "train without it: --preset demo brings its own text, --train-dir DIR takes yours"
"""The end of each message about an unreachable Hub."""


class DatasetStream:
    """A dataset read while it downloads. It keeps no position: `shards.ShardReader` does."""

    def __init__(
        self, dataset: datasets.IterableDataset, text_field: str, fingerprint: str
    ) -> None:
        self.fingerprint = fingerprint
        self.num_shards: int = dataset.num_shards
        # Of a Parquet file, the other columns are not even downloaded.
        self._dataset = dataset.select_columns([text_field])
        self._text_field = text_field
        self._open: tuple[int, datasets.IterableDataset] | None = None

    def num_parts(self, shard: int) -> int:
        """Return how many parts of a shard can be opened on their own."""
        return int(self._parts(shard).num_shards)

    def read(self, shard: int, part: int, first_row: int) -> Iterator[list[object]]:
        """Yield the text column of a part from `first_row` on, some rows at a time.

        Raises:
            Exception: the network, or whatever a damaged file makes its reader raise.
        """
        parts = self._parts(shard)
        # Arrow tables, not Python dictionaries: skipping rows is then almost free.
        tables = parts.shard(parts.num_shards, part).with_format("arrow").iter(ROWS_AT_ONCE)
        row = 0
        # Left to the garbage collector, its connection and thread would outlive the run.
        with closing(tables):
            for table in tables:
                wanted = table.slice(max(0, first_row - row))
                row += len(table)
                if len(wanted):
                    yield _values(wanted.column(self._text_field))

    def _parts(self, shard: int) -> datasets.IterableDataset:
        """Return a shard as a dataset whose shards are the parts; a request to the Hub."""
        if self._open is None or self._open[0] != shard:
            self._open = shard, self._dataset.shard(self.num_shards, shard).reshard()
        return self._open[1]


class DownloadedDataset:
    """A dataset on disk, as a source of documents."""

    skipped_files = 0  # not of a search

    def __init__(
        self, dataset: datasets.Dataset, text_field: str, fingerprint: str, min_text_length: int
    ) -> None:
        self.fingerprint = f"{fingerprint}, at least {min_text_length} characters"
        self._dataset = dataset.select_columns([text_field]).with_format("arrow")
        self._text_field = text_field
        self._min_text_length = min_text_length

    def documents(self, counts: Counts) -> Iterator[str]:
        """Yield the documents; count them and what is skipped.

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
                # `only_text` has counted it as a document.
                counts.documents -= 1
                counts.too_short += 1


def open_stream(data: DataConfig) -> DatasetStream:
    """Open a dataset for streaming; no text is read yet.

    >>> open_stream(DataConfig(dataset_name="./corpus"))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    annotated_mpnet.errors.DataError: --dataset-name is 'corpus', which is not a directory; ...

    Raises:
        DataError: it does not exist, cannot be reached or read, or has no such column.
    """
    dataset, fingerprint = _load(data, streaming=True)
    return DatasetStream(dataset, data.text_field, fingerprint)


def open_downloaded(data: DataConfig) -> DownloadedDataset:
    """Download a dataset, or find it in the cache of `datasets`.

    Raises:
        DataError: it does not exist, cannot be reached or read, or has no such column.
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
    # A Hub name is `owner/name` or `name`. Anything else that looks like a path is a mistyped one.
    if not local and (folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise DataError(
            f"--dataset-name is {shown(folder)}, which is not a directory; expected a folder of "
            "data files or a Hub name; files of text are given by --train-dir"
        )
    commit = None if local else _resolve(name, data.dataset_revision, must_answer=streaming)
    choice = f"configuration {data.dataset_config} and split {data.dataset_split}"
    try:
        # Load the commit, not the revision: `main` may move between the two requests.
        dataset = datasets.load_dataset(
            str(folder) if local else name,
            name=data.dataset_config,
            split=data.dataset_split,
            revision=commit,
            streaming=streaming,
        )
        # A stream of jsonl knows its columns only after its first row.
        columns = dataset.column_names or list(next(iter(dataset), {}))
    except ConnectionError as error:
        raise _unreachable(name, error) from error
    except FileNotFoundError as error:
        raise DataError(
            f"the dataset {shown(name)} has no data files for {choice}; expected .jsonl, "
            ".parquet, .csv or other files that `datasets` reads"
        ) from error
    # A bad file or description may raise almost anything; the message lists what is available.
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        advice = f"; for text files in it: --train-dir {shown(name)}" if local else ""
        raise DataError(
            f"the dataset {shown(name)} cannot be opened with {choice}: "
            f"{shown(str(cause))}; see --dataset-config, --dataset-split{advice}"
        ) from error
    if data.text_field not in columns:
        raise DataError(
            f"--text-field is {shown(data.text_field)}, which the dataset {shown(name)} "
            f"does not have; its columns are {shown(', '.join(map(str, columns)))}"
        )
    # A folder is named without its path: moved or copied, it is the same text.
    if local:
        which = f"{folder.resolve().name}@{_fingerprint_folder(folder)}"
    else:
        which = f"{name}@{commit or _cached_commit(dataset, name, data.dataset_revision)}"
    of_it = f"config {data.dataset_config}, split {data.dataset_split}, column {data.text_field}"
    return dataset, f"{which}, {of_it}"


def _resolve(name: str, revision: str | None, must_answer: bool) -> str | None:
    """Return the commit; None if the Hub does not answer and need not, as the cache may do."""
    try:
        return commit_of(name, "dataset", revision)
    # First, because it is a subclass of RepositoryNotFoundError.
    except GatedRepoError as error:
        raise DataError(
            f"the dataset {shown(name)} is gated; accept its terms on its page of the Hub, "
            "then `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise DataError(
            f"the dataset {shown(name)} has no revision {shown(str(revision))}; expected "
            "a commit, tag or branch (--dataset-revision)"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise DataError(
            f"there is no dataset {shown(name)} on the Hub (or it is private: `hf auth "
            "login`), and no folder of that name here (--dataset-name)"
        ) from error
    # No network, a server that is down, offline mode.
    except Exception as error:
        if must_answer:
            raise _unreachable(name, error) from error
        return None


def _cached_commit(dataset: datasets.Dataset, name: str, revision: str | None) -> str:
    """Return the commit of a dataset from the cache: the name of its directory there.

    Without a network, `datasets` takes the newest commit in its cache and ignores the revision.
    """
    commit = Path(dataset.cache_files[0]["filename"]).parent.name
    if revision not in (None, commit):
        raise DataError(
            f"the Hub cannot be reached, and the cache has the dataset {shown(name)} at "
            f"commit {commit}, not at --dataset-revision {shown(str(revision))}"
        )
    return commit


def _fingerprint_folder(folder: Path) -> str:
    """Return a hash, as long as a commit, of the names and contents of all visible files.

    Names matter: `datasets` reads splits and order from them. So do files without text: a README
    may say which files belong to which configuration.
    """
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

    If a jsonl file mixes types in a column, `datasets` keeps JSON, quotation marks and all. Text
    that cannot be encoded (half of a surrogate pair) becomes None.

    >>> mixed = pa.array(['"a"', "3", None], pa.json_())
    >>> _values(pa.chunked_array([mixed])), _values(pa.chunked_array([["a", None]]))
    (['a', 3, None], ['a', None])
    """
    values: list[object] = column.to_pylist()
    if not isinstance(column.type, pa.JsonType):
        return values
    return [None if value is None else encodable(json.loads(str(value))) for value in values]


def _unreachable(name: str, error: Exception) -> DataError:
    return DataError(
        f"the Hub cannot be reached for the dataset {shown(name)} "
        f"({shown(str(error))}); {WITHOUT_THE_HUB}"
    )
