"""A WordPiece tokenizer of one's own, laid out as MPNet's.

MPNet's vocabulary is BERT's 30,522 pieces between special tokens of fairseq's dictionary: `<s>` 0,
`<pad>` 1, `</s>` 2, `<unk>` 3 in front, `<mask>` at the end. Where a domain or a language has other
words than BERT's English, pieces learned from its own text need fewer tokens for the same sentence.
The layout stays, because Hugging Face's MPNet has the padding id 1 written into its code.

BERT's way of reading text is kept as well: lower case without accents, split at white space and
punctuation, the longest known piece first, `##` before a piece that continues a word.
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

from annotated_mpnet.data.sources import read_documents
from annotated_mpnet.errors import ConfigError, WriteError

LEADING = ("<s>", "<pad>", "</s>", "<unk>")
MASK = "<mask>"


def train_wordpiece(files: Sequence[Path], vocab_size: int) -> PreTrainedTokenizerFast:
    """Learn a vocabulary from text files, one document per line.

    Args:
        files: the text.
        vocab_size: tokens, the five special ones included; small text may yield fewer.

    Raises:
        ConfigError: the vocabulary is too small for letters, let alone words.
        DataError: a file cannot be read.
    """
    if vocab_size < 64:
        raise ConfigError(f"--vocab-size is {vocab_size}; expected at least 64")
    alphabet = _alphabet(files, vocab_size // 4)
    learner = _bert_like(models.WordPiece(unk_token="<unk>"))
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size - 1,  # one is left for the mask
        special_tokens=[*LEADING, *(f"##{letter}" for letter in alphabet)],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    learner.train_from_iterator(_documents(files), trainer)
    # The learner took the letters for special tokens; only its vocabulary is of use.
    vocabulary = learner.get_vocab(with_added_tokens=True)
    model = models.WordPiece(vocabulary, unk_token="<unk>", max_input_chars_per_word=100)
    backend = _bert_like(model)
    backend.add_special_tokens([*LEADING, MASK])
    backend.decoder = decoders.WordPiece()
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
    """Learn a vocabulary and write the tokenizer to a directory, whole or not at all.

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
    # Written beside and renamed: a run never finds half a tokenizer.
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
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def _documents(files: Sequence[Path]) -> Iterator[str]:
    return (document for path in files for document in read_documents(path))


def _alphabet(files: Sequence[Path], most: int) -> list[str]:
    """Return the most frequent letters of the text, as BERT reads it, in order.

    The trainer would find them itself, but would number `##a`, `##b`, ... in the order of a hash
    table, which differs from run to run; ties between equally frequent pieces are then broken
    differently too, and the same text gives another vocabulary each time. Told the letters
    beforehand, it has nothing left to be free in.
    """
    normalizer = normalizers.BertNormalizer()
    counts: Counter[str] = Counter()
    for document in _documents(files):
        counts.update(normalizer.normalize_str(document))
    letters = [letter for letter in counts if not letter.isspace()]
    return sorted(sorted(letters, key=lambda letter: (-counts[letter], letter))[:most])
