"""All the text of a run: training, validation, test.

**No document that is evaluated on is trained on, nor a copy of it.**

    training text             validation                   test
    local files, or a         --valid-file                 --test-file
    mixture of them           or --valid-fraction of them
    downloaded dataset        the same                     --test-file
    streamed dataset          --valid-file                 --test-file
                              or --eval-samples of it      or --eval-samples of it

Validation chooses `best_checkpoint` among all checkpoints, partly by luck. So the test text is used
only once, at the end, and nothing is chosen by it.

**The order matters.** First remove documents that are in a given file, then split off a fraction of
the rest. Here the test file has one of the documents, and half of the others go to validation:

>>> from annotated_mpnet.text.counts import Counts
>>> from annotated_mpnet.streams.eval_samples import Samples
>>> everything = Samples(("It rained.", "It snowed.", "She wept.", "He laughed.", "It snowed."))
>>> test, counts = Samples(("He laughed.",)), Counts()
>>> train, valid = split_by_hash(without_texts(everything, hashes_of(test)), 0.5)
>>> for part in (train, valid, test):
...     print(*part.documents(counts))
It rained. It snowed. It snowed.
She wept.
He laughed.

Both copies are on one side, and the test document on neither. In the other order it could be in the
validation text, and would help to choose the model that is tested on it.

Of a stream, samples are chosen first, from its beginning. A given file replaces one half of the
samples, which are then trained on; with both files, nothing is sampled. Overlap between the two
given files is not checked, and a copy with another space in it counts as another text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from annotated_mpnet.errors import DataError, shown
from annotated_mpnet.mpnet.collator import Vocabulary
from annotated_mpnet.settings.config import DEFAULT_TOKENIZER, DataConfig
from annotated_mpnet.streams.eval_samples import choose_eval_samples
from annotated_mpnet.streams.hub import open_downloaded, open_stream
from annotated_mpnet.streams.shards import ShardReader
from annotated_mpnet.streams.streams import SequenceStream
from annotated_mpnet.text.frequencies import token_counts
from annotated_mpnet.text.hold_out import hashes_of, split_by_hash, without_texts
from annotated_mpnet.text.mixture import Mixture
from annotated_mpnet.text.packing import pack_sequences
from annotated_mpnet.text.sequences import PackedSequences
from annotated_mpnet.text.sources import DocumentSource, LocalFiles
from annotated_mpnet.text.tokenizer import load_tokenizer, vocabulary_of


@dataclass(frozen=True)
class Text:
    """The text of a run as sequences of tokens, with the tokenizer that gives the ids a meaning.

    Attributes:
        train: on disk (fed by `loader.BatchLoader`) or streamed (`streams.StreamLoader`).
        valid: None without validation.
        test: None without a test.
    """

    tokenizer: PreTrainedTokenizerFast
    vocabulary: Vocabulary
    train: PackedSequences | SequenceStream
    valid: PackedSequences | None
    test: PackedSequences | None

    @cached_property
    def training_counts(self) -> np.ndarray | None:
        """How often each token (V) occurs in training; None if unknown.

        A stream is not read twice to count it. Text held out of it is a good sample, preferably the
        test text: the plateau is measured on the validation text, whose own frequencies would fit
        it too well.
        """
        train = self.train
        counted = train if isinstance(train, PackedSequences) else self.test or self.valid
        return None if counted is None else token_counts(counted, self.vocabulary.is_special_V)


def read_text(data: DataConfig, seed: int, rank: int = 0, world_size: int = 1) -> Text:
    """Load the tokenizer and pack all text into sequences; a stream is only opened.

    Text on disk is the same for all ranks: one packs it, the others wait for the cache.

    Raises:
        ConfigError: the tokenizer cannot be used.
        DataError: the text cannot be used.
        WriteError: the cache of packed text cannot be written.
    """
    # Find all sources first: report a mistyped path now, not after an hour of packing.
    held_out: dict[str, DocumentSource] = {
        name: LocalFiles.find(path, flag, data.text_field)
        for name, path, flag in (
            ("valid", data.valid_file, "--valid-file"),
            ("test", data.test_file, "--test-file"),
        )
        if path is not None
    }
    # `streaming` is on by default and means nothing for --train-dir.
    if data.train_dir is None and data.streaming:
        reader = ShardReader(open_stream(data), seed, rank, world_size)
        tokenizer = load_tokenizer(data.tokenizer_name or DEFAULT_TOKENIZER)
        if data.eval_samples > 0 and len(held_out) < 2:
            samples = choose_eval_samples(reader, data.eval_samples, data.min_text_length)
            held_out = {"valid": samples.valid, "test": samples.test} | held_out
        train: PackedSequences | SequenceStream = SequenceStream(
            reader, tokenizer, data, _hashes(held_out)
        )
    else:
        each = [LocalFiles.find(path, "--train-dir", data.text_field) for path in data.train_dirs]
        source = _joined(each, data.text_field) if each else open_downloaded(data)
        # In a mixture, each path is a text of its own.
        sources = [source] if data.train_weights is None else list[DocumentSource](each)
        if held_out:
            hashes = _hashes(held_out)
            source = without_texts(source, hashes)
            sources = [without_texts(each, hashes) for each in sources]
        if data.valid_fraction > 0:
            # By hashes, so all parts of a mixture hold out the same documents.
            _, held_out["valid"] = split_by_hash(source, data.valid_fraction)
            sources = [split_by_hash(each, data.valid_fraction)[0] for each in sources]
        tokenizer = load_tokenizer(data.tokenizer_name or DEFAULT_TOKENIZER)
        parts = [_pack(each, tokenizer, data) for each in sources]
        weights = data.train_weights
        train = parts[0] if weights is None else Mixture(parts, weights)
    # Packed like the training text: a token is easier to predict in a longer sequence.
    packed = {name: _pack(source, tokenizer, data) for name, source in held_out.items()}
    return Text(tokenizer, vocabulary_of(tokenizer), train, packed.get("valid"), packed.get("test"))


def _joined(each: Sequence[LocalFiles], text_field: str) -> DocumentSource:
    """Return the files of all paths of --train-dir.

    Raises:
        DataError: a file is named twice, for example by its directory and by itself.
    """
    paths = [path for files in each for path in files.paths]
    seen: set[Path] = set()
    for path in paths if len(each) > 1 else ():
        if path.resolve() in seen:
            raise DataError(
                f"{shown(path)} is in two paths of --train-dir; name each directory or file once"
            )
        seen.add(path.resolve())
    return LocalFiles(paths, text_field, sum(files.skipped_files for files in each), each)


def _pack(
    source: DocumentSource, tokenizer: PreTrainedTokenizerFast, data: DataConfig
) -> PackedSequences:
    return pack_sequences(
        source, tokenizer, data.max_tokens, packing=data.packing, num_workers=data.num_workers
    )


def _hashes(sources: dict[str, DocumentSource]) -> frozenset[int]:
    """Return the hash of each document that must not be trained on.

    >>> from annotated_mpnet.streams.eval_samples import Samples
    >>> len(_hashes({"valid": Samples(("a", "b")), "test": Samples(("b", "c", "c"))}))
    3
    """
    return frozenset().union(*(hashes_of(source) for source in sources.values()))
