r"""Learn a WordPiece tokenizer from text, with MPNet's layout of special tokens.

    0     1       2      3       4 ...                                               V - 1
    <s>   <pad>   </s>   <unk>   ##a ##b ... a b ..., then pieces as they are found  <mask>

A domain or language with other words than BERT's English needs fewer tokens with pieces learned
from its own text. The layout stays because Hugging Face's MPNet has the padding id 1 hard-coded.
Text is read as BERT reads it: lower case, no accents, split at white space and punctuation, the
longest known piece first, `##` before a piece that continues a word.

>>> backend = _bert_like(models.WordPiece(unk_token="<unk>"))
>>> text = backend.normalizer.normalize_str("Élan, 12 CATS!")
>>> text, [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
('elan, 12 cats!', ['elan', ',', '12', 'cats', '!'])

Two things are read in another way, for the sake of other languages. BERT removes *all* combining
marks, which are accents in French, but vowels in Hindi and Thai and the difference between ka and
ga in Japanese; here only U+0300 to U+036F are removed. And to BERT a word of more than 100 letters
is unknown, as a sentence without spaces then is; here it is cut into parts of 100.

>>> backend.normalizer.normalize_str("élan हिन्दी が")
'elan हिन्दी が'
>>> [len(piece) for piece, _ in backend.pre_tokenizer.pre_tokenize_str("ก" * 240)]
[100, 100, 40]

The trainer starts with letters, `c ##a ##t`, merges the neighbours that occur together most often,
and repeats until the vocabulary is full:

>>> import tempfile
>>> with tempfile.NamedTemporaryFile(mode="w", suffix=".txt") as file:
...     _ = file.write("The cat sat on the mat. Other cats sat there too, like Zoe.\n" * 9)
...     file.flush()
...     tokenizer = train_wordpiece([Path(file.name)], vocab_size=64)
>>> tokenizer.tokenize("The cats sat, Zoé.")
['the', 'cats', 'sat', ',', 'zoe', '.']
>>> tokenizer.tokenize("catlike combat")
['cat', '##l', '##ik', '##e', '<unk>']
>>> len(tokenizer), tokenizer.mask_token_id  # there was no more to learn
(57, 56)

A letter that the text does not have, here the b, makes its whole word unknown, as in BERT. So does
a rare letter that a small vocabulary has no room for: how much of the text is unknown is measured
at the end.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from annotated_mpnet.errors import ConfigError, DataError
from annotated_mpnet.files.output import TOKENIZER, output_directory
from annotated_mpnet.text.sources import Counts, find_text_files, read_documents, shown
from annotated_mpnet.text.tokenizer import write_tokenizer

LEADING = ("<s>", "<pad>", "</s>", "<unk>")
"""The first ids, in the order of fairseq's dictionary."""

MASK = "<mask>"
"""The last id: fairseq appends the mask after the words of its dictionary."""

LONGEST_WORD = 100
"""Letters. The search for the longest known piece takes quadratic time."""

SMALLEST, LARGEST = 64, 10_000_000
"""Tokens. With fewer, nearly all text would be unknown; more are a slip."""

LETTERS_SHARE = 4
"""A quarter of the vocabulary is for letters. Each takes two places, `a` and `##a`, so half is left
for words, even in Chinese; rarer letters become unknown."""

MEASURED = 1000
"""Documents that are tokenized to measure the result, spread over the text."""

MUCH_UNKNOWN = 0.01
"""From this share of the text on, the user is warned."""


def train_wordpiece(
    files: Sequence[Path],
    vocab_size: int,
    text_field: str = "text",
    counts: Counts | None = None,
) -> PreTrainedTokenizerFast:
    """Learn a vocabulary from text files, in the formats of `text/file_formats.py`.

    The same text gives the same vocabulary on any machine (`_alphabet`).

    Args:
        files: the text, read twice: for its letters, then for its pieces.
        vocab_size: V tokens, the five special ones included; small text may yield fewer.
        text_field: the column that holds the text, in files with columns.
        counts: updated.

    Raises:
        ConfigError: the size makes no sense.
        DataError: a file cannot be read, or there is no text.
    """
    if not SMALLEST <= vocab_size <= LARGEST:
        raise ConfigError(
            f"--vocab-size is {str(vocab_size)[:80]}; expected {SMALLEST} to {LARGEST}"
        )
    counts = Counts() if counts is None else counts
    alphabet = _alphabet(_documents(files, text_field, counts), vocab_size // LETTERS_SHARE)
    if not alphabet:
        others = f" and {len(files) - 1} more files" if len(files) > 1 else ""
        raise DataError(
            f"no text in {shown(files[0])}{others}: {counts}; expected a document on each line, or "
            "in each row"
        )
    learner = _bert_like(models.WordPiece(unk_token="<unk>"))
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size - 1,  # one is left for the mask
        special_tokens=[*LEADING, *(f"##{letter}" for letter in alphabet)],
        initial_alphabet=alphabet,
        # `##a` is called a special token because those keep their order.
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    learner.train_from_iterator(_documents(files, text_field), trainer)
    # Only the learner's vocabulary is of use: it took the letters for special tokens.
    vocabulary = learner.get_vocab(with_added_tokens=True)
    model = models.WordPiece(vocabulary, unk_token="<unk>", max_input_chars_per_word=LONGEST_WORD)
    backend = _bert_like(model)
    # The mask is new and gets the next id, V - 1.
    backend.add_special_tokens([*LEADING, MASK])
    backend.decoder = decoders.WordPiece()
    # Two sentences are joined as in RoBERTa, with two `</s>` between.
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
        # MPNet has no token types, and its classes refuse them.
        model_input_names=["input_ids", "attention_mask"],
    )


def train_tokenizer_files(
    text: Sequence[Path],
    vocab_size: int,
    output: Path,
    *,
    overwrite: bool = False,
    text_field: str = "text",
) -> str:
    """Learn a vocabulary and write the tokenizer to a directory, complete or not at all.

    Args:
        text: files and directories, read three times: for letters, for pieces, and to measure the
            result.
        vocab_size: tokens, the five special ones included.
        output: the directory; absent or empty, unless `overwrite`.
        overwrite: replace the tokenizer there (`files/output.py`).
        text_field: the column that holds the text, in files with columns.

    Returns:
        What was read and how well it is known, for the user.

    Raises:
        ConfigError: the directory may not be replaced, or the size of the vocabulary makes no
            sense.
        DataError: a file cannot be read, or there is no text.
        WriteError: the directory cannot be written.
    """
    counts = Counts()
    files = [file for path in text for file in find_text_files(path, "FILES", counts)]
    # The directory first: that it cannot be written is known before the text is read.
    with output_directory(output, TOKENIZER, overwrite=overwrite, inputs=files) as staging:
        tokenizer = train_wordpiece(files, vocab_size, text_field, counts)
        unknown, words, letters = _measure(tokenizer, files, text_field, counts.documents)
        write_tokenizer(tokenizer, staging)
    report = (
        f"{counts}\n{output}: {len(tokenizer):,} tokens; the text has {1 / words:.2f} of them per "
        f"word, with {letters:.1f} letters each, and {unknown:.2%} of it is unknown; use it with "
        "--tokenizer-name"
    )
    if unknown >= MUCH_UNKNOWN:
        report += (
            f"\nwarning: {unknown:.1%} of the text becomes <unk>: it has more different letters "
            f"than the {vocab_size // LETTERS_SHARE:,} that --vocab-size {vocab_size} has room "
            "for; raise --vocab-size"
        )
    return report


def _bert_like(model: models.WordPiece) -> Tokenizer:
    """Return a tokenizer that reads text as BERT (uncased) does, but for marks and long words."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.BertNormalizer(strip_accents=False),
            normalizers.NFD(),
            normalizers.Replace(Regex("[\u0300-\u036f]+"), ""),
            normalizers.NFC(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.BertPreTokenizer(),
            pre_tokenizers.Split(Regex(f".{{1,{LONGEST_WORD}}}"), behavior="isolated"),
        ]
    )
    return tokenizer


def _documents(
    files: Sequence[Path], text_field: str, counts: Counts | None = None
) -> Iterator[str]:
    return (document for path in files for document in read_documents(path, counts, text_field))


def _alphabet(documents: Iterator[str], most: int) -> list[str]:
    """Return the most frequent letters of the text, as BERT reads it, in order.

    Left alone, the trainer numbers `##a`, `##b`, ... in the order of a hash table, and the same
    text gives another vocabulary in each run.
    """
    normalizer = _bert_like(models.WordPiece(unk_token="<unk>")).normalizer
    counts: Counter[str] = Counter()
    for document in documents:
        counts.update(normalizer.normalize_str(document))
    letters = [letter for letter in counts if not letter.isspace()]
    return sorted(sorted(letters, key=lambda letter: (-counts[letter], letter))[:most])


def _measure(
    tokenizer: PreTrainedTokenizerFast, files: Sequence[Path], text_field: str, documents: int
) -> tuple[float, float, float]:
    """Return the share of letters in unknown words, and the words and letters per token."""
    every = max(1, documents // MEASURED)
    letters = unknown = tokens = words = 0
    for document in islice(_documents(files, text_field), 0, None, every):
        encoding = tokenizer.backend_tokenizer.encode(document[:4000], add_special_tokens=False)
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            letters += end - start
            unknown += end - start if token == tokenizer.unk_token_id else 0
        tokens += len(encoding)
        words += len(set(encoding.word_ids))
    return unknown / letters, words / tokens, letters / tokens
