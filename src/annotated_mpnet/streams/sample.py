"""The first documents of a dataset, as a file: what `train-mpnet-tokenizer` learns from.

A tokenizer is learned in three passes, and a stream should be downloaded once.
"""

import json
from collections.abc import Generator
from contextlib import closing
from itertools import islice
from pathlib import Path

from datasets.utils import tqdm

from annotated_mpnet.settings.config import DataConfig
from annotated_mpnet.streams.hub import DatasetStream, open_stream
from annotated_mpnet.streams.shards import Position, ShardReader
from annotated_mpnet.text.counts import Counts, only_text


def write_sample(data: DataConfig, most: int, target: Path) -> str:
    """Write the first documents of a dataset to a .jsonl file, in the column of the dataset.

    The shards are read in the order in which a run with the seed 0 reads them.

    Returns:
        What was read, for the user.

    Raises:
        DataError: it does not exist, cannot be reached or read, or has no such column.
    """
    stream = open_stream(data)
    counts = Counts()
    bar = tqdm(total=most, desc="Downloading", unit=" documents")
    with target.open("w", encoding="utf-8") as file, bar, closing(_epoch(stream)) as values:
        found = only_text(values, counts, source=stream.fingerprint, text_field=data.text_field)
        for text in islice(found, most):
            file.write(json.dumps({data.text_field: text}) + "\n")
            bar.update()
    return f"{stream.fingerprint}: {counts}"


def _epoch(stream: DatasetStream) -> Generator[object]:
    with closing(ShardReader(stream, seed=0).read(Position())) as steps:
        for values, position in steps:
            if position.epoch > 0:
                return
            yield from values
