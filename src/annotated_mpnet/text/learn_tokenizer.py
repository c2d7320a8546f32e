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

A letter that the text does not have, here the b, makes its whole word unknown, as in BERT.
"""

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
from annotated_mpnet.files.atomic import replacing
from annotated_mpnet.text.sources import read_documents

LEADING = ("<s>", "<pad>", "</s>", "<unk>")
"""The first ids, in the order of fairseq's dictionary."""

MASK = "<mask>"
"""The last id: fairseq appends the mask after the words of its dictionary."""


def train_wordpiece(files: Sequence[Path], vocab_size: int) -> PreTrainedTokenizerFast:
    """Learn a vocabulary from text files, one document per line.

    The same text gives the same vocabulary on any machine (`_alphabet`).

    Args:
        files: the text, read twice: for its letters, then for its pieces.
        vocab_size: V tokens, the five special ones included; small text may yield fewer.

    Raises:
        ConfigError: the vocabulary is too small.
        DataError: a file cannot be read.
    """
    # Below that, nearly all text would be unknown.
    if vocab_size < 64:
        raise ConfigError(f"--vocab-size is {vocab_size}; expected at least 64")
    # Each letter takes two places, `a` and `##a`, so half of the vocabulary is left for words, even
    # in Chinese; rarer letters become unknown.
    alphabet = _alphabet(files, vocab_size // 4)
    learner = _bert_like(models.WordPiece(unk_token="<unk>"))
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size - 1,  # one is left for the mask
        special_tokens=[*LEADING, *(f"##{letter}" for letter in alphabet)],
        initial_alphabet=alphabet,
        # `##a` is called a special token because those keep their order.
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    learner.train_from_iterator(_documents(files), trainer)
    # Only the learner's vocabulary is of use: it took the letters for special tokens.
    vocabulary = learner.get_vocab(with_added_tokens=True)
    model = models.WordPiece(vocabulary, unk_token="<unk>", max_input_chars_per_word=100)
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
    files: Sequence[Path], vocab_size: int, output: Path, *, overwrite: bool = False
) -> PreTrainedTokenizerFast:
    """Learn a vocabulary and write the tokenizer to a directory, complete or not at all.

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
    if output.exists() and not (output.is_dir() and not any(output.iterdir())) and not overwrite:
        raise ConfigError(
            f"--output {output} exists and is not empty; choose another directory, or replace what "
            "is there with --overwrite"
        )
    tokenizer = train_wordpiece(files, vocab_size)
    try:
        with replacing(output) as staging:
            tokenizer.save_pretrained(staging)
    except OSError as error:
        raise WriteError(
            f"cannot write --output {output}: {error.strerror}; free some space, or choose another "
            "directory"
        ) from error
    return tokenizer


def _bert_like(model: models.WordPiece) -> Tokenizer:
    """Return a tokenizer that reads text as BERT (uncased) does."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def _documents(files: Sequence[Path]) -> Iterator[str]:
    return (document for path in files for document in read_documents(path))


def _alphabet(files: Sequence[Path], most: int) -> list[str]:
    """Return the most frequent letters of the text, as BERT reads it, in order.

    Left alone, the trainer numbers `##a`, `##b`, ... in the order of a hash table, and the same
    text gives another vocabulary in each run.
    """
    normalizer = normalizers.BertNormalizer()
    counts: Counter[str] = Counter()
    for document in _documents(files):
        counts.update(normalizer.normalize_str(document))
    letters = [letter for letter in counts if not letter.isspace()]
    return sorted(sorted(letters, key=lambda letter: (-counts[letter], letter))[:most])
