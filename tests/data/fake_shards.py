"""Fakes of the Hub: shards in a folder, shards in memory, and a failing network."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import toy_tokenizer

from annotated_mpnet.mpnet.batch import Batch
from annotated_mpnet.mpnet.collator import DataCollatorForMaskedPermutedLanguageModeling
from annotated_mpnet.mpnet.config import ObjectiveConfig
from annotated_mpnet.settings.config import DataConfig
from annotated_mpnet.streams.reservoir import StreamState
from annotated_mpnet.streams.shards import ShardReader, Shards
from annotated_mpnet.streams.streams import SequenceStream, StreamLoader
from annotated_mpnet.text.tokenizer import vocabulary_of

TOKENIZER = toy_tokenizer.word_piece()
VOCABULARY = vocabulary_of(TOKENIZER)
SEED = 7


def text_of(number: int) -> str:
    """Return a unique document of 3 to 10 letters for each number."""
    letters = "".join("abcdefghij"[int(digit)] for digit in str(number))
    return " ".join(letters + "k" * (2 + number % 5))


def write_shards(folder: Path, sizes: Sequence[int], kind: str) -> list[str]:
    """Write documents to shards of jsonl or Parquet (7 rows a group); return the documents."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [text_of(number) for number in range(sum(sizes))]
    first = 0
    for shard, size in enumerate(sizes):
        rows = texts[first : first + size]
        first += size
        path = folder / f"train-{shard:03}.{kind}"
        if kind == "parquet":
            table = pa.table({"text": pa.array(rows, pa.string())})
            pa.parquet.write_table(table, path, row_group_size=7)
        else:
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    return texts


@dataclass
class ListShards:
    """Shards in memory: `parts[shard][part]` is a list of values.

    Attributes:
        at_once: values returned together.
        broken: called with (shard, part, row) before each; may raise.
        handed: values returned so far.
    """

    parts: Sequence[Sequence[Sequence[object]]]
    at_once: int = 3
    broken: Callable[[int, int, int], None] = lambda shard, part, row: None
    fingerprint: str = "documents in memory"
    handed: int = field(default=0, init=False)

    @property
    def num_shards(self) -> int:
        return len(self.parts)

    def num_parts(self, shard: int) -> int:
        return len(self.parts[shard])

    def read(self, shard: int, part: int, first_row: int) -> Iterator[list[object]]:
        values = self.parts[shard][part]
        for row in range(first_row, len(values), self.at_once):
            self.broken(shard, part, row)
            handed = list(values[row : row + self.at_once])
            self.handed += len(handed)
            yield handed


def in_memory(sizes: Sequence[int], **options: object) -> ListShards:
    """Return documents 0, 1, 2, ... in shards of these sizes, in parts of at most 7."""
    numbers = iter(range(sum(sizes)))
    shards = [[text_of(next(numbers)) for _ in range(size)] for size in sizes]
    parts = [[shard[i : i + 7] for i in range(0, len(shard), 7)] for shard in shards]
    return ListShards(parts, **options)


def stream_from(
    shards: Shards,
    rank: int = 0,
    world_size: int = 1,
    *,
    sleep: Callable[[float], None] | None = None,
    held_out: frozenset[int] = frozenset(),
    **data: object,
) -> SequenceStream:
    """Return a rank's stream: by default 5 slots and sequences of 12 tokens."""
    config = DataConfig(**{"buffer_size": 5, "max_tokens": 12, "min_text_length": 0, **data})
    options = {} if sleep is None else {"sleep": sleep}
    reader = ShardReader(shards, SEED, rank, world_size, **options)
    return SequenceStream(reader, TOKENIZER, config, held_out)


def loader_from(stream: SequenceStream, batch_size: int = 3) -> StreamLoader:
    collator = DataCollatorForMaskedPermutedLanguageModeling(
        VOCABULARY, ObjectiveConfig(), max_tokens=12, seed=SEED
    )
    return StreamLoader(stream, collator, batch_size)


def hash_of(batches: Sequence[Batch]) -> str:
    """Hash all tensors of an update."""
    digest = hashlib.sha256()
    for batch in batches:
        for tensor in (batch.input_ids, batch.predicted_positions, batch.predicted_ids):
            digest.update(repr(tensor.tolist()).encode())
        mask = batch.attention_mask
        digest.update(repr(None if mask is None else mask.tolist()).encode())
    return digest.hexdigest()


def through_a_checkpoint(state: StreamState) -> StreamState:
    """Save and load a state as a checkpoint does."""
    values, arrays = state.to_parts()
    return StreamState.from_parts(json.loads(json.dumps(values)), dict(arrays))
