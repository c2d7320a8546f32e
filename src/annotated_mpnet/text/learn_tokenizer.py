"""A WordPiece tokenizer of one's own, laid out as MPNet's.

MPNet's vocabulary is BERT's 30,522 pieces between special tokens of fairseq's dictionary: `<s>` 0,
`<pad>` 1, `</s>` 2, `<unk>` 3 in front, `<mask>` at the end. Where a domain or a language has other
words than BERT's English, pieces learned from its own text need fewer tokens for the same sentence.
The layout stays, because Hugging Face's MPNet has the padding id 1 written into its code.

    0     1       2      3       4 ...                                               V - 1
    <s>   <pad>   </s>   <unk>   ##a ##b ... a b ..., then pieces as they are found  <mask>

BERT's way of reading text is kept as well: lower case without accents, split at white space and
punctuation, the longest known piece first, `##` before a piece that continues a word.

>>> backend = _bert_like(models.WordPiece(unk_token="<unk>"))
>>> text = backend.normalizer.normalize_str("Élan, 12 CATS!")
>>> text, [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
('elan, 12 cats!', ['elan', ',', '12', 'cats', '!'])

**Learning pieces.** The trainer begins with single letters, `c ##a ##t`, counts which neighbours
occur together most often, makes one piece of them, and begins again, until the vocabulary is full.
What is frequent becomes a piece of its own; what is rare stays in pieces, down to letters. Learned
from a text that speaks of cats:

>>> import tempfile
>>> with tempfile.NamedTemporaryFile(mode="w", suffix=".txt") as file:
...     _ = file.write("The cat sat on the mat. Other cats sat there too, like Zoe.\\n" * 9)
...     file.flush()
...     tokenizer = train_wordpiece([Path(file.name)], vocab_size=64)
>>> tokenizer.tokenize("The cats sat, Zoé.")
['the', 'cats', 'sat', ',', 'zoe', '.']
>>> tokenizer.tokenize("catlike combat")
['cat', '##l', '##ik', '##e', '<unk>']
>>> len(tokenizer), tokenizer.mask_token_id  # there was no more to learn
(57, 56)

A letter that the text does not have, here the b, makes its whole word unknown, as in BERT. MPNet's
vocabulary has 30 thousand pieces, the demo's 8 thousand. Each costs a row of the embedding table:
of MPNet-base's 110 million parameters 23 million are this table, and the LM head, which is tied to
it, multiplies by it for each predicted token.

>>> 30_527 * 768
23444736

Next: `text/tokenizer.py`, which reads such a tokenizer, or somebody else's.
"""

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from annotated_mpnet.errors import ConfigError, WriteError
from annotated_mpnet.text.sources import read_documents

LEADING = ("<s>", "<pad>", "</s>", "<unk>")
"""What the vocabulary begins with, in the order of fairseq's dictionary."""

MASK = "<mask>"
"""What it ends with. fairseq appends the mask behind the words of its dictionary; so a vocabulary
that grows later moves nothing but it."""


def train_wordpiece(files: Sequence[Path], vocab_size: int) -> PreTrainedTokenizerFast:
    """Learn a vocabulary from text files, one document per line.

    The same text gives the same vocabulary, on any machine; see `_alphabet` for what that takes.

    Args:
        files: the text, read twice: for its letters, then for its pieces.
        vocab_size: V tokens, the five special ones included; small text may yield fewer.

    Returns:
        A tokenizer that adds `<s>` and `</s>`, as Hugging Face's MPNet expects it. Packing, which
        puts them around rows and not around documents, tells it not to.

    Raises:
        ConfigError: the vocabulary is too small for letters, let alone words.
        DataError: a file cannot be read.
    """
    # An alphabet in two forms, digits and a few signs: below that, nearly all text is unknown.
    if vocab_size < 64:
        raise ConfigError(f"--vocab-size is {vocab_size}; expected at least 64")
    # Each letter takes two places, `a` and `##a` (and so does a comma, whose `##,` never occurs:
    # which letters continue words is not looked at). With at most a quarter of the places for
    # letters, half of the vocabulary is left for words, even for a text in Chinese; letters that
    # are rarer than that become unknown.
    alphabet = _alphabet(files, vocab_size // 4)
    learner = _bert_like(models.WordPiece(unk_token="<unk>"))
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size - 1,  # one is left for the mask
        special_tokens=[*LEADING, *(f"##{letter}" for letter in alphabet)],
        initial_alphabet=alphabet,
        # `##a` comes first of all under the name of a special token, because those keep the order
        # in which they are given; nothing else about them is meant.
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    learner.train_from_iterator(_documents(files), trainer)
    # The learner took the letters for special tokens; only its vocabulary is of use. A word of more
    # than a hundred letters is no word, and looking for its pieces would take long: unknown.
    vocabulary = learner.get_vocab(with_added_tokens=True)
    model = models.WordPiece(vocabulary, unk_token="<unk>", max_input_chars_per_word=100)
    backend = _bert_like(model)
    # The first four have their ids already; the mask is new, and gets the next one: V - 1.
    backend.add_special_tokens([*LEADING, MASK])
    backend.decoder = decoders.WordPiece()
    # Two sentences are joined as RoBERTa does it, which MPNet took over: with two `</s>` between.
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        bos_token="<s>",
        cls_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        sep_token="</s>",
        unk_token="<unk>",
        mask_token=MASK,
        # MPNet has no token types, and its classes refuse them: BERT's third input stays away.
        model_input_names=["input_ids", "attention_mask"],
    )


def train_tokenizer_files(
    files: Sequence[Path], vocab_size: int, output: Path, *, overwrite: bool = False
) -> PreTrainedTokenizerFast:
    """Learn a vocabulary and write the tokenizer to a directory, whole or not at all.

    The directory is what `--tokenizer-name` takes, and `AutoTokenizer.from_pretrained`.

    Args:
        files: the text, one document per line.
        vocab_size: tokens, the five special ones included.
        output: the directory; absent or empty, unless `overwrite`.
        overwrite: replace the tokenizer there.

    Raises:
        ConfigError: the directory is not empty, or the vocabulary too small.
        DataError: a file cannot be read.
        WriteError: the directory cannot be written.
    """
    # Before the work and not behind it: a large text takes minutes.
    if output.exists() and not (output.is_dir() and not any(output.iterdir())) and not overwrite:
        raise ConfigError(
            f"--output {output} exists and is not empty; choose another directory, or replace what "
            "is there with --overwrite"
        )
    tokenizer = train_wordpiece(files, vocab_size)
    # Written beside and renamed: a run never finds half a tokenizer, and if the disk is full, what
    # was there before is there still.
    staging = output.with_name(f".tmp-{output.name}")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        tokenizer.save_pretrained(staging)
        if output.is_dir():
            shutil.rmtree(output)
        staging.replace(output)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise WriteError(
            f"--output {output} cannot be written: {error.strerror}; make room, or choose another "
            "directory"
        ) from error
    return tokenizer


def _bert_like(model: models.WordPiece) -> Tokenizer:
    """Return a tokenizer that reads text as BERT (uncased) does.

    The one that learns and the one that is kept must read alike: a vocabulary with capitals, behind
    a normalizer that has none left, would have pieces that never occur.
    """
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def _documents(files: Sequence[Path]) -> Iterator[str]:
    """Yield the documents of all files; not a list, since they need not fit into memory."""
    return (document for path in files for document in read_documents(path))


def _alphabet(files: Sequence[Path], most: int) -> list[str]:
    """Return the most frequent letters of the text, as BERT reads it, in order.

    The trainer would find them itself, but would number `##a`, `##b`, ... in the order of a hash
    table, which differs from run to run; ties between equally frequent pieces are then broken
    differently too, and the same text gives another vocabulary each time. Told the letters
    beforehand, it has nothing left to be free in.
    """
    normalizer = normalizers.BertNormalizer()
    # Of the text as the learner will read it: in lower case, without accents, `é` counted as `e`.
    counts: Counter[str] = Counter()
    for document in _documents(files):
        counts.update(normalizer.normalize_str(document))
    letters = [letter for letter in counts if not letter.isspace()]
    return sorted(sorted(letters, key=lambda letter: (-counts[letter], letter))[:most])
