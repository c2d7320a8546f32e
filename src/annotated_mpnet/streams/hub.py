"""Datasets: from the Hugging Face Hub, or a folder of data files, downloaded or as a stream.

A dataset is a name. Behind it are files, a table with columns, splits (`train`, `test`) and
sometimes configurations (a language, a sample); the library `datasets` finds its way through all of
that, and reads jsonl, Parquet, CSV and more. What this module adds is what a run needs to know:

*Which text was it?* `main` is another text tomorrow. The Hub is asked for the commit that a
revision stands for, that commit is read, and its name is part of the data's `fingerprint`, which is
compared when a run is resumed. A folder is a dataset's name too, as in `datasets`; the place of a
commit is then taken by a hash of its files. It reads

    HuggingFaceFW/fineweb-edu@COMMIT, config sample-10BT, split train, column text

so that a run which refuses to go on can show what is another now, and not only that something is.

*Is it there?* When the Hub does not answer, `datasets` tries again for minutes. It is asked once
beforehand, with a limit of ten seconds, and if that fails the run stops and says what works without
a network. A dataset that was downloaded before is then found in the cache.

*Is the text there?* The column is looked for before anything is built. Whether it holds text shows
only row by row; what else is in it is passed over and counted, up to a limit (`text/counts.py`).

**Two ways to read.** Downloaded (`--no-streaming`), a dataset is stored on disk, and packed like
local files: any row at any time. As a stream it is read while it comes, and never stored. Then only
one thing is cheap: to go on reading. Where to begin is the question on which an exact resume
depends, so look at what the pieces are:

    dataset    [ shard 0 ] [ shard 1 ] [ shard 2 ] ...      files
    shard      [ part 0 | part 1 | part 2 ]                 row groups of a Parquet file
    part       row 0, row 1, row 2, ...

Any part can be opened without what is before it; within a part, reading begins at its first row. A
Parquet file tells where its row groups are (some thousand rows each), so that to begin in the
middle costs a thousand rows at most. Other formats are one part a file: to begin at row 100,000 is
to parse 100,000 rows, although nobody looks at them. The order of parts is up to us, and
`streams/shards.py` is where it is chosen.

Seven rows in groups of three, on disk; part 1 from its row 2 on is one row, `f`:

>>> import tempfile
>>> with tempfile.TemporaryDirectory() as folder:
...     rows = pa.table({"text": list("abcdefg")})
...     pa.parquet.write_table(rows, f"{folder}/train.parquet", row_group_size=3)
...     stream = open_stream(DataConfig(dataset_name=folder))
...     print([list(stream.read(0, part, first_row=0)) for part in range(stream.num_parts(0))])
...     print(list(stream.read(0, part=1, first_row=2)))
[[['a', 'b', 'c']], [['d', 'e', 'f']], [['g']]]
[['f']]

Measured with jsonl and Parquet files on a disk (`docs/log.md`): 610 thousand rows a second, and 55
milliseconds to begin at row 100,000. The tokenizer behind it is what takes time.

HF: an `IterableDataset` has a `state_dict` too, with which it goes on where it was. Why it is not
used is said in `streams/shards.py`. `datasets` is asked for two things only: which parts there are
(`reshard`, one shard for each row group), and what is in one of them.

Code that comes with a dataset is not run: `datasets` refuses loading scripts since version 4.

Next: `streams/shards.py`, which decides what is read when.
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
"""What is streamed when no source of text is given."""

ROWS_AT_ONCE = 256
"""Rows of a dataset that are handed on, and tokenised, together. Enough to keep the threads of the
tokenizer busy; few enough that a position is never far behind what is trained on."""

WITHOUT_THE_HUB = "train without it: --preset demo brings its own text, --train-dir DIR takes yours"
"""What a message about a silent Hub ends with: both work on a machine that was never online."""


class DatasetStream:
    """A dataset that is read as it comes: shards, their parts, and rows from any of them on.

    It keeps no place: what is read is an argument of `read`, so that the same three numbers give
    the same rows in any process. Who keeps the place is `shards.ShardReader`.

    Attributes:
        fingerprint: names the dataset: commit, configuration, split, column.
        num_shards: files, at least one.
    """

    def __init__(
        self, dataset: datasets.IterableDataset, text_field: str, fingerprint: str
    ) -> None:
        self.fingerprint = fingerprint
        self.num_shards: int = dataset.num_shards
        # Addresses, dates, scores: of a Parquet file the other columns are not even downloaded.
        self._dataset = dataset.select_columns([text_field])
        self._text_field = text_field
        # The shard that was looked at last, with its parts: reading goes through a shard in order.
        self._open: tuple[int, datasets.IterableDataset] | None = None

    def num_parts(self, shard: int) -> int:
        """Return how many parts of a shard can be opened by themselves; of most formats, 1."""
        return int(self._parts(shard).num_shards)

    def read(self, shard: int, part: int, first_row: int) -> Iterator[list[object]]:
        """Yield what stands in the text column of a part, some rows at a time, from a row on.

        Args:
            shard: number of the file, from 0.
            part: number of the part in it, from 0.
            first_row: rows of the part to pass over.

        Raises:
            Exception: the network, or whatever a damaged file makes its reader raise; `streams/shards.py`
                tells them apart.
        """
        parts = self._parts(shard)
        # Arrow tables instead of Python dictionaries: rows that are only passed over cost nothing.
        tables = parts.shard(parts.num_shards, part).with_format("arrow").iter(ROWS_AT_ONCE)
        row = 0
        # Closed by name and not when the garbage collector finds it: behind the generator there are
        # a connection and a thread, which would outlive an interrupted run.
        with closing(tables):
            for table in tables:
                # Where the last table to pass over ends in the middle, its rest is handed on: the
                # portions differ from those of an uninterrupted run, their rows do not.
                wanted = table.slice(max(0, first_row - row))
                row += len(table)
                if len(wanted):
                    yield _values(wanted.column(self._text_field))

    def _parts(self, shard: int) -> datasets.IterableDataset:
        """Return a shard as a dataset of its own, whose shards are its parts."""
        # Finding the parts of a file is a request to the Hub: done once a shard, not once a part.
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
        # Rows are packed under a name that this is part of: with another shortest text they would
        # be others.
        self.fingerprint = f"{fingerprint}, at least {min_text_length} characters"
        self._dataset = dataset.select_columns([text_field]).with_format("arrow")
        self._text_field = text_field
        self._min_text_length = min_text_length

    def documents(self, counts: Counts) -> Iterator[str]:
        """Yield the documents, and count them and what is left out.

        Args:
            counts: is added to.

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
            # `only_text` has counted it as a document.
            else:
                counts.documents -= 1
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
    """Download the dataset of a configuration, or find it in the cache.

    The first time, this takes as long as the network needs; a bar shows how far it is. What is
    stored is the dataset itself, in the cache of `datasets`; the packed rows come on top.

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
    # A name on the Hub is `owner/name` or `name`. Whatever else looks like a path is one, with a
    # typing error in it: asked for on the Hub, it would be a puzzling "no such repository".
    if not local and (folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise DataError(
            f"--dataset-name is {shown(folder)}, which is not a directory; expected a folder of "
            "data files or a Hub name; files of text are given by --train-dir"
        )
    # The commit is found first, and then *it* is read, not the revision: between two questions
    # `main` may move.
    commit = None if local else _resolve(name, data.dataset_revision, must_answer=streaming)
    try:
        dataset = datasets.load_dataset(
            str(folder) if local else name,
            name=data.dataset_config,
            split=data.dataset_split,
            revision=commit,
            streaming=streaming,
        )
        # A stream of jsonl has no column names before its first row was read.
        columns = dataset.column_names or list(next(iter(dataset), {}))
    # What a dataset's files and its description can do wrong comes as nearly any exception, and all
    # of it is the dataset's fault or the flags', none of it a bug of ours.
    except Exception as error:
        raise DataError(_why_not_opened(name, data, error)) from error
    if data.text_field not in columns:
        raise DataError(
            f"--text-field is {shown_text(data.text_field)}, which the dataset {shown_text(name)} "
            f"does not have; its columns are {shown_text(', '.join(map(str, columns)))}"
        )
    # A folder is named without the path to it: moved or copied, it is the same text.
    if local:
        which = f"{folder.resolve().name}@{_fingerprint_folder(folder)}"
    else:
        which = f"{name}@{commit or _cached_commit(dataset, name, data.dataset_revision)}"
    of_it = f"config {data.dataset_config}, split {data.dataset_split}, column {data.text_field}"
    return dataset, f"{which}, {of_it}"


def _resolve(name: str, revision: str | None, must_answer: bool) -> str | None:
    """Return the commit; None where the Hub is silent and the cache may still do.

    Args:
        name: of the dataset.
        revision: commit, tag or branch; None for the newest.
        must_answer: there is no other way, since what is streamed is in no cache.

    Raises:
        DataError: the Hub has no such dataset or revision, or not for us; or it does not answer,
            but must.
    """
    try:
        return commit_of(name, "dataset", revision)
    # Before the next but one, of which it is a subclass: to someone who may not see it, a dataset
    # is as good as not there; but that there is a page with terms to accept is better to know.
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
    # Anything else: no network, a server that is down, offline mode. For a download it is no error
    # yet, since the dataset may be here from an earlier one.
    except Exception as error:
        if must_answer:
            raise DataError(_unreachable(name, error)) from error
        return None


def _cached_commit(dataset: datasets.Dataset, name: str, revision: str | None) -> str:
    """Return the commit of a dataset that came from the cache: the name of its directory there.

    HF: without a network, `datasets` takes from its cache what was written there last of a dataset,
    and a revision that was asked for makes no difference. Here it does.

    Raises:
        DataError: another revision was asked for.
    """
    commit = Path(dataset.cache_files[0]["filename"]).parent.name
    if revision not in (None, commit):
        raise DataError(
            f"the Hub cannot be reached, and the cache has the dataset {shown_text(name)} at "
            f"commit {commit}; asked for was --dataset-revision {shown_text(str(revision))}"
        )
    return commit


def _fingerprint_folder(folder: Path) -> str:
    """Return a hash of names and contents of all that `datasets` may look at, forty digits.

    Names, because `datasets` reads them: `train-00.jsonl` and `test.jsonl` are two splits, and the
    files of a split are read in the order of their names. All files, not only those of text: a
    README may say which files belong to which configuration. Forty digits, as a commit has.
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
    """Return a column's values; where rows of different types share it, it holds JSON.

    A column of an Arrow table has one type. What `datasets` does with a jsonl file in which "text"
    is a string here and a number there is to keep both as JSON, quotation marks and all. Taken for
    text, every document of such a file would begin and end with one.

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
    """Return the one line that tells what to do about an error of `datasets`.

    Three kinds are worth telling apart, by what mends them: a network that is gone, a folder
    without data, and choices that the dataset does not offer. In the last case `datasets` lists
    those that it does, and that list is shown.
    """
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
    """Return the one line for a Hub that does not answer: what works without it comes last."""
    return (
        f"the Hub cannot be reached for the dataset {shown_text(name)} "
        f"({shown_text(str(error))}); {WITHOUT_THE_HUB}"
    )
