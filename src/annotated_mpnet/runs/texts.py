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

**Why three.** The loss on the training text says how well the network remembers. Validation says
how well it does on text that it has not read, but it also chooses: of all the checkpoints, the one
that did best becomes `best_checkpoint`, by luck too. So there is a third text, which is looked at
once, at the end, and by which nothing is chosen.

**First the texts in files, then a fraction of the rest.** Here are five documents of training text,
two of them alike. One stands in --test-file too, and half of the others (by their hashes,
`text/hold_out.py`) are to be held out for validation:

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

Both copies are on the same side, and the document of the test is on neither. Split first, and left
out of the training part only, it might have been in the validation text: then the best model would
have been chosen by the very text that it is tested on.

**In a stream** the order is the other way about. Its samples are chosen first, from its beginning,
then training drops whatever has one of their hashes, or one of those of the files. A file that was
given takes the place of one half of the samples, which then are trained on like any other document;
with both files, nothing is sampled.

What stands in both of the files that were given is not looked for: they are nobody's choice but
their owner's. And a copy is one to the letter: the same paragraph with another space in it passes.

annotated-mpnet takes the first documents of a stream for evaluation: copies of them further on are
trained on.

Next: `text/hold_out.py` and `streams/eval_samples.py` for the two ways to hold out; `runs/preparation.py`, which asks
how good a guess by frequency alone would be on these texts.
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
    """The text of a run, as rows of tokens, and the tokenizer that made them.

    They belong together: id 2003 is one word in one vocabulary and another in the next, and nothing
    but the tokenizer beside them says which. It goes into each checkpoint and each export, too.

    Attributes:
        tokenizer: from `load_tokenizer`.
        vocabulary: what it says in plain numbers.
        train: rows on the disk, any of them at once, or rows as they come. Which of the two decides
            what feeds the loop: `loader.BatchLoader`, or `streams.StreamLoader`.
        valid: validation, during the run; None without.
        test: the test at its end; None without.
    """

    tokenizer: PreTrainedTokenizerFast
    vocabulary: Vocabulary
    train: PackedSequences | SequenceStream
    valid: PackedSequences | None
    test: PackedSequences | None

    @cached_property
    def training_counts(self) -> np.ndarray | None:
        """How often each token (V) occurs in training; None if that cannot be known.

        They are what a model that knows only frequencies would know: what its loss would be is the
        plateau that a run must leave (`runs/preparation.py`), and --head-bias frequencies begins there.

        A stream is not read twice for it: the text that was held out of it for the test, and else
        for the validation, is as good a sample of its frequencies. The test's first, because the
        plateau is measured on the validation text: a guess by that text's own frequencies would do
        better on it than any guess could that was made elsewhere.

        Counted once and kept: for a large text on the disk it is a look at every token.
        """
        rows = self.train if isinstance(self.train, PackedSequences) else self.test or self.valid
        return None if rows is None else token_counts(rows, self.vocabulary.is_special_V)


def read_text(data: DataConfig, seed: int, rank: int = 0, world_size: int = 1) -> Text:
    """Load the tokenizer, find all text and make it rows; a stream is opened, not read.

    Args:
        data: the sources.
        seed: decides the order of a stream.
        rank: this process, from 0.
        world_size: processes, which share a stream. Text on the disk is the same for all of them:
            one packs it, while the others wait for the lock of the cache.

    Raises:
        ConfigError: the tokenizer will not do.
        DataError: the text will not.
        WriteError: the cache of packed text cannot be written.
    """
    # All sources are looked for before the first one is read, and before the tokenizer: a path that
    # was mistyped shall be found at once, and not when an hour of training text has been packed.
    held_out: dict[str, DocumentSource] = {
        name: LocalFiles.find(path, flag, data.text_field)
        for name, path, flag in (
            ("valid", data.valid_file, "--valid-file"),
            ("test", data.test_file, "--test-file"),
        )
        if path is not None
    }
    # `--train-dir` excludes a dataset, and `streaming` is a dataset's: on by default, and without
    # any meaning for files.
    if data.train_dir is None and data.streaming:
        return _open_stream(data, held_out, ShardReader(open_stream(data), seed, rank, world_size))
    source: DocumentSource
    if data.train_dir is not None:
        source = LocalFiles.find(data.train_dir, "--train-dir", data.text_field)
    else:
        source = open_downloaded(data)
    # Each step is a source around the source before, and reads nothing yet: documents pass through
    # all of them when they are packed. In this order, for the reason above.
    if held_out:
        source = WithoutTexts(source, _hashes(held_out))
    if data.valid_fraction > 0:
        source, held_out["valid"] = split_by_hash(source, data.valid_fraction)
    # Training text first: it is what a run is about, and what is wrong with it is to be said first.
    tokenizer = load_tokenizer(data.tokenizer_name)
    return _text(data, tokenizer, _pack(source, tokenizer, data), held_out)


def _open_stream(
    data: DataConfig, held_out: dict[str, DocumentSource], reader: ShardReader
) -> Text:
    """Choose the samples of a stream, unless files take their place, and describe the rest of it.

    The samples are the only part of a stream that is read before the run begins. All ranks choose
    the same ones, without a word between them (`streams/eval_samples.py`).

    Args:
        data: the sources.
        held_out: the files among them, under "valid" and "test".
        reader: of this rank's share.
    """
    tokenizer = load_tokenizer(data.tokenizer_name)
    # Of the two sides of `|` the right one wins: a file that was given, not the samples.
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
    """Make rows of what is held out, by the same tokenizer, packing and length as training.

    With other rows the two losses could not be compared: a word is easier to predict in a row of
    512 tokens than in one of 128.
    """
    packed = {name: _pack(source, tokenizer, data) for name, source in held_out.items()}
    return Text(tokenizer, vocabulary_of(tokenizer), train, packed.get("valid"), packed.get("test"))


def _pack(
    source: DocumentSource, tokenizer: PreTrainedTokenizerFast, data: DataConfig
) -> PackedSequences:
    # The number of processes changes how long it takes, never a row (`text/tokenization.py`).
    return pack_sequences(
        source, tokenizer, data.max_tokens, packing=data.packing, num_workers=data.num_workers
    )


def _hashes(sources: dict[str, DocumentSource]) -> frozenset[int]:
    """Return what must not be trained on: the hash of each document of all held-out texts.

    Eight bytes are enough to know a text by; the texts themselves are not kept in memory.

    >>> from annotated_mpnet.streams.eval_samples import Samples
    >>> len(_hashes({"valid": Samples(("a", "b")), "test": Samples(("b", "c", "c"))}))
    3
    """
    return frozenset().union(*(hashes_of(source) for source in sources.values()))
