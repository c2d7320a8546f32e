"""All the text of a run: for training, validation and test.

One promise holds for all of them: **no document that is evaluated on is trained on, nor a copy.**

    training text             validation                   test
    local files               --valid-file                 --test-file
                              or --valid-fraction of them
    downloaded dataset        the same                     --test-file
    streamed dataset          --valid-file                 --test-file
                              or --eval-samples of it      or --eval-samples of it

What training skips because of it is counted. Validation chooses the best checkpoint, so a third
text is looked at once, at the end. Documents of the given files are removed first, then a fraction
of the rest is held out; here "He laughed." is in --test-file too:

>>> from annotated_mpnet.text.counts import Counts
>>> from annotated_mpnet.streams.eval_samples import Samples
>>> everything = Samples(("It rained.", "It snowed.", "She wept.", "He laughed.", "It snowed."))
>>> test, counts = Samples(("He laughed.",)), Counts()
>>> train, valid = split_by_hash(WithoutTexts(everything, hashes_of(test)), 0.5)
>>> for part in (train, valid, test):
...     print(*part.documents(counts))
It rained. It snowed. It snowed.
She wept.
He laughed.

The other way about, a test document might have been in the validation text and have chosen the best
model. **In a stream** the samples are chosen first, from its beginning, and training drops what has
one of their hashes, or one of the files'. A given file replaces one half of the samples.

annotated-mpnet evaluates on the first documents of a stream, and trains on their copies.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from transformers import PreTrainedTokenizerFast

from annotated_mpnet.mpnet.collator import Vocabulary
from annotated_mpnet.settings.config import DataConfig
from annotated_mpnet.streams.eval_samples import choose_eval_samples
from annotated_mpnet.streams.hub import open_downloaded, open_stream
from annotated_mpnet.streams.shards import ShardReader
from annotated_mpnet.streams.streams import SequenceStream
from annotated_mpnet.text.frequencies import token_counts
from annotated_mpnet.text.hold_out import WithoutTexts, hashes_of, split_by_hash
from annotated_mpnet.text.packing import pack_sequences
from annotated_mpnet.text.sequences import PackedSequences
from annotated_mpnet.text.sources import DocumentSource, LocalFiles
from annotated_mpnet.text.tokenizer import load_tokenizer, vocabulary_of


@dataclass(frozen=True)
class Text:
    """The text of a run, as packed sequences, and the tokenizer that made them.

    Attributes:
        tokenizer: from `load_tokenizer`.
        vocabulary: its tables.
        train: sequences on the disk (for `loader.BatchLoader`) or a stream
        (`streams.StreamLoader`). valid: for validation during the run; None without. test: for the
        test at the end; None without.
    """

    tokenizer: PreTrainedTokenizerFast
    vocabulary: Vocabulary
    train: PackedSequences | SequenceStream
    valid: PackedSequences | None
    test: PackedSequences | None

    @cached_property
    def training_counts(self) -> np.ndarray | None:
        """How often each token (V) occurs in training; None if unknown.

        Of a stream, the test text is a sample. The validation text is the second choice, because
        the plateau is measured on it.
        """
        rows = self.train if isinstance(self.train, PackedSequences) else self.test or self.valid
        return None if rows is None else token_counts(rows, self.vocabulary.is_special_V)


def read_text(data: DataConfig, seed: int, rank: int = 0, world_size: int = 1) -> Text:
    """Load the tokenizer, find all text and pack it; a stream is opened, not read.

    Args:
        data: the sources.
        seed: decides the order of a stream.
        rank: this process, from 0.
        world_size: processes, which share a stream. Text on the disk is packed by one of them.

    Raises:
        ConfigError: of the tokenizer.
        DataError: of the text.
        WriteError: the cache cannot be written.
    """
    # All sources are found before the first one is read: a typo in a path shows at once.
    held_out: dict[str, DocumentSource] = {
        name: LocalFiles.find(path, flag, data.text_field)
        for name, path, flag in (
            ("valid", data.valid_file, "--valid-file"),
            ("test", data.test_file, "--test-file"),
        )
        if path is not None
    }
    if data.train_dir is None and data.streaming:
        return _open_stream(data, held_out, ShardReader(open_stream(data), seed, rank, world_size))
    source: DocumentSource
    if data.train_dir is not None:
        source = LocalFiles.find(data.train_dir, "--train-dir", data.text_field)
    else:
        source = open_downloaded(data)
    # Sources around sources: nothing is read yet. In this order, for the reason above.
    if held_out:
        source = WithoutTexts(source, _hashes(held_out))
    if data.valid_fraction > 0:
        source, held_out["valid"] = split_by_hash(source, data.valid_fraction)
    tokenizer = load_tokenizer(data.tokenizer_name)
    return _text(data, tokenizer, _pack(source, tokenizer, data), held_out)


def _open_stream(
    data: DataConfig, held_out: dict[str, DocumentSource], reader: ShardReader
) -> Text:
    """Choose the samples of a stream, unless files replace them, and describe the rest of it."""
    tokenizer = load_tokenizer(data.tokenizer_name)
    if data.eval_samples > 0 and len(held_out) < 2:
        samples = choose_eval_samples(reader, data.eval_samples, data.min_text_length)
        held_out = {"valid": samples.valid, "test": samples.test} | held_out
    stream = SequenceStream(reader, tokenizer, data, _hashes(held_out))
    return _text(data, tokenizer, stream, held_out)


def _text(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    train: PackedSequences | SequenceStream,
    held_out: dict[str, DocumentSource],
) -> Text:
    """Pack what is held out, with the packing and length of training, so losses can be compared."""
    packed = {name: _pack(source, tokenizer, data) for name, source in held_out.items()}
    return Text(tokenizer, vocabulary_of(tokenizer), train, packed.get("valid"), packed.get("test"))


def _pack(
    source: DocumentSource, tokenizer: PreTrainedTokenizerFast, data: DataConfig
) -> PackedSequences:
    return pack_sequences(
        source, tokenizer, data.max_tokens, packing=data.packing, num_workers=data.num_workers
    )


def _hashes(sources: dict[str, DocumentSource]) -> frozenset[int]:
    """Return the hash of each held-out document.

    >>> from annotated_mpnet.streams.eval_samples import Samples
    >>> len(_hashes({"valid": Samples(("a", "b")), "test": Samples(("b", "c", "c"))}))
    3
    """
    return frozenset().union(*(hashes_of(source) for source in sources.values()))
