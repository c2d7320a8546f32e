"""All the text of a run: what is trained on, what is validated on, what is tested on.

A run needs up to three texts, which may come from two kinds of places. What they have in common is
a promise: **no document that is evaluated on is trained on, nor a copy of it.**

    training text             validation                   test
    local files               --valid-file                 --test-file
                              or --valid-fraction of them
    downloaded dataset        the same                     --test-file
    streamed dataset          --valid-file                 --test-file
                              or --eval-samples of it      or --eval-samples of it

What training leaves out for the sake of the others is counted, and said in the plan. Held-out text
is small and always becomes rows in a table; only training text may be a stream.

Next: `preparation.py`.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from transformers import PreTrainedTokenizerFast

from annotated_mpnet.config import DataConfig
from annotated_mpnet.data.eval_samples import choose_eval_samples
from annotated_mpnet.data.hold_out import WithoutTexts, hashes_of, split_by_hash
from annotated_mpnet.data.hub import open_downloaded, open_stream
from annotated_mpnet.data.packing import pack_rows
from annotated_mpnet.data.rows import PackedRows
from annotated_mpnet.data.shards import ShardReader
from annotated_mpnet.data.sources import DocumentSource, LocalFiles
from annotated_mpnet.data.statistics import token_counts
from annotated_mpnet.data.streams import RowStream
from annotated_mpnet.data.tokenizer import Vocabulary, load_tokenizer


@dataclass(frozen=True)
class Text:
    """The text of a run, as rows of tokens, and the tokenizer that made them.

    Attributes:
        tokenizer: from `load_tokenizer`.
        vocabulary: what it says in plain numbers.
        train: rows on the disk, or rows as they come.
        valid: validation, during the run; None without.
        test: the test at its end; None without.
    """

    tokenizer: PreTrainedTokenizerFast
    vocabulary: Vocabulary
    train: PackedRows | RowStream
    valid: PackedRows | None
    test: PackedRows | None

    @cached_property
    def training_counts(self) -> np.ndarray | None:
        """How often each token (V) occurs in training; None if that cannot be known.

        A stream is not read twice for it: the text that was held out of it for the test, and else
        for the validation, is as good a sample of its frequencies.
        """
        rows = self.train if isinstance(self.train, PackedRows) else self.test or self.valid
        return None if rows is None else token_counts(rows, self.vocabulary.is_special_V)


def read_text(data: DataConfig, seed: int) -> Text:
    """Load the tokenizer, find all text and make it rows; a stream is opened, not read.

    Args:
        data: the sources.
        seed: decides the order of a stream.

    Raises:
        ConfigError: the tokenizer will not do, or the packing not for a stream.
        DataError: the text will not.
    """
    # All sources are looked for before the first one is read, and before the tokenizer.
    held_out: dict[str, DocumentSource] = {
        name: LocalFiles.find(path, flag, data.text_field)
        for name, path, flag in (
            ("valid", data.valid_file, "--valid-file"),
            ("test", data.test_file, "--test-file"),
        )
        if path is not None
    }
    if data.train_dir is None and data.streaming:
        return _open_stream(data, seed, held_out)
    source: DocumentSource
    if data.train_dir is not None:
        source = LocalFiles.find(data.train_dir, "--train-dir", data.text_field)
    else:
        source = open_downloaded(data)
    if held_out:
        source = WithoutTexts(source, _hashes(held_out))
    if data.valid_fraction > 0:
        source, held_out["valid"] = split_by_hash(source, data.valid_fraction)
    tokenizer = load_tokenizer(data.tokenizer_name)
    return _text(data, tokenizer, _pack(source, tokenizer, data), held_out)


def _open_stream(data: DataConfig, seed: int, held_out: dict[str, DocumentSource]) -> Text:
    reader = ShardReader(open_stream(data), seed)
    tokenizer = load_tokenizer(data.tokenizer_name)
    if data.eval_samples > 0 and len(held_out) < 2:
        samples = choose_eval_samples(reader, data.eval_samples, data.min_text_length)
        held_out = {"valid": samples.valid, "test": samples.test} | held_out
    stream = RowStream(reader, tokenizer, data, _hashes(held_out))
    return _text(data, tokenizer, stream, held_out)


def _text(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    train: PackedRows | RowStream,
    held_out: dict[str, DocumentSource],
) -> Text:
    packed = {name: _pack(source, tokenizer, data) for name, source in held_out.items()}
    return Text(tokenizer, Vocabulary.of(tokenizer), train, packed.get("valid"), packed.get("test"))


def _pack(
    source: DocumentSource, tokenizer: PreTrainedTokenizerFast, data: DataConfig
) -> PackedRows:
    return pack_rows(
        source, tokenizer, data.max_tokens, packing=data.packing, num_workers=data.num_workers
    )


def _hashes(sources: dict[str, DocumentSource]) -> frozenset[int]:
    return frozenset().union(*(hashes_of(source) for source in sources.values()))
