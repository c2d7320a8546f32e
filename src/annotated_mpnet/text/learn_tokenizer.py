r"""Learn a tokenizer from text, with MPNet's layout of special tokens.

    0     1       2      3       4 ...                                  V - 1
    <s>   <pad>   </s>   <unk>   letters or bytes, then learned pieces  <mask>

A domain or language with other words than BERT's English needs fewer tokens with pieces learned
from its own text. The layout stays because Hugging Face's MPNet has the padding id 1 hard-coded.
There are three ways to learn pieces, and to read text:

    --model     learned by                 reads text                   a rare letter, a new one
    wordpiece   merging letters            as BERT (uncased)            its word is <unk>
    bpe         merging bytes              byte for byte, as RoBERTa    its bytes
    unigram     pruning frequent strings   as it is, as XLM-R           its bytes

>>> import tempfile
>>> def learn(model, size):
...     with tempfile.NamedTemporaryFile(mode="w", suffix=".txt") as file:
...         _ = file.write("The cat sat on the mat. Other cats sat there too, like Zoe.\n" * 9)
...         file.flush()
...         return train_tokenizer([Path(file.name)], size, model=model)
>>> tokenizer = learn("wordpiece", 64)
>>> tokenizer.tokenize("The cats sat, Zoé."), tokenizer.tokenize("catlike combat")
(['the', 'cats', 'sat', ',', 'zoe', '.'], ['cat', '##l', '##ik', '##e', '<unk>'])
>>> len(tokenizer), tokenizer.mask_token_id  # there was no more to learn
(57, 56)
>>> tokenizer = learn("bpe", 300)
>>> tokenizer.tokenize("The cats sat, Zoé.")
['The', 'Ġcats', 'Ġsat', ',', 'ĠZo', 'Ã', '©', '.']
>>> tokenizer.decode(tokenizer("The cats sat, Zoé.\t🐈").input_ids, skip_special_tokens=True)
'The cats sat, Zoé.\t🐈'

**WordPiece** reads lower case, removes accents, and splits at white space and punctuation. `##` is
before a piece that continues a word. Two things differ from BERT, for the sake of other languages.
BERT removes *all* combining marks, which are accents in French, but vowels in Hindi and Thai, the
difference between ka and ga in Japanese, and half of the letter й in Russian. Here an accent is a
mark on a Latin or Greek letter, with every `--model`:

>>> normalizer_for("wordpiece", lowercase=True, strip_accents=True).normalize_str("Élan हिन्दी が й")
'elan हिन्दी が й'

And to BERT a word of more than 100 letters is unknown, as a sentence without spaces then is; here
it is cut into parts of 100.

**BPE and unigram** change nothing unless they are told to. BPE gives back any text exactly; unigram
loses a space at the beginning, and writes ▁ (U+2581), its sign for a space, as a space. They split
text with one pattern, `WORDS`: GPT-2's, in which a combining mark would end a word.

>>> [part for part, _ in pre_tokenizer_for("unigram").pre_tokenize_str("it's हिन्दी, 12 CATS!")]
['▁it', "'s", '▁हिन्दी', ',', '▁12', '▁CATS', '!']
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from datasets.utils import tqdm
from tokenizers import (
    AddedToken,
    Tokenizer,
    models,
    normalizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from annotated_mpnet.errors import ConfigError, DataError, shown
from annotated_mpnet.files.output import TOKENIZER, output_directory
from annotated_mpnet.settings.commands import TokenizerModel
from annotated_mpnet.text.sources import Counts, find_text_files, read_documents
from annotated_mpnet.text.tokenizer import write_tokenizer
from annotated_mpnet.text.tokenizer_learners import (
    LEADING,
    MASK,
    learn_bpe,
    learn_unigram,
    learn_wordpiece,
    normalizer_for,
    pre_tokenizer_for,
)
from annotated_mpnet.text.tokenizer_report import measure

SMALLEST = {"wordpiece": 64, "bpe": 300, "unigram": 400}
"""Tokens. 256 of them are bytes, except with WordPiece; with fewer, no word would have a piece."""

LARGEST = 10_000_000
"""Tokens; more are a slip."""


def train_tokenizer(
    files: Sequence[Path],
    vocab_size: int,
    *,
    model: TokenizerModel = "wordpiece",
    lowercase: bool | None = None,
    strip_accents: bool | None = None,
    text_field: str = "text",
    counts: Counts | None = None,
) -> PreTrainedTokenizerFast:
    """Learn a vocabulary from text files, in the formats of `text/file_formats.py`.

    The same text gives the same vocabulary on any machine.

    Args:
        files: the text, read twice: for its letters, then for its pieces.
        vocab_size: V tokens, the five special ones included; small text may yield fewer.
        model: the kind of pieces.
        lowercase: None means yes with WordPiece, no with the others.
        strip_accents: None means the same as `lowercase`.
        text_field: the column that holds the text, in files with columns.
        counts: updated.

    Raises:
        ConfigError: the size makes no sense.
        DataError: a file cannot be read, or there is no text.
    """
    check_vocab_size(vocab_size, model)
    counts = Counts() if counts is None else counts
    lowercase = model == "wordpiece" if lowercase is None else lowercase
    strip_accents = lowercase if strip_accents is None else strip_accents
    normalizer = normalizer_for(model, lowercase, strip_accents)
    reader = Tokenizer(models.BPE())
    reader.pre_tokenizer = pre_tokenizer_for(model)
    if normalizer is not None:
        reader.normalizer = normalizer
    letters = _count_letters(files, text_field, counts, normalizer)
    if not letters:
        others = f" and {len(files) - 1} more files" if len(files) > 1 else ""
        raise DataError(
            f"no text in {shown(files[0])}{others}: {counts}; expected a document on each line, or "
            "in each row"
        )
    documents = _documents(files, text_field)
    if model == "wordpiece":
        backend = learn_wordpiece(reader, documents, vocab_size, letters)
    elif model == "bpe":
        backend = learn_bpe(reader, documents, vocab_size)
    else:
        backend = learn_unigram(reader, documents, vocab_size, letters)
    # The mask is new and gets the next id, V - 1. Where a piece begins with its space, the mask
    # takes the space too, as the word did that it replaces.
    mask = AddedToken(MASK, lstrip=model != "wordpiece", special=True)
    backend.add_special_tokens([*LEADING, mask])
    # Two sentences are joined as in RoBERTa, with two `</s>` between.
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    # transformers 4 would otherwise remove the space before a full stop when it decodes.
    exact = {} if model == "wordpiece" else {"clean_up_tokenization_spaces": False}
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        bos_token="<s>",
        cls_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        sep_token="</s>",
        unk_token="<unk>",
        mask_token=MASK if model == "wordpiece" else mask,
        # MPNet has no token types, and its classes refuse them.
        model_input_names=["input_ids", "attention_mask"],
        **exact,
    )


def check_vocab_size(vocab_size: int, model: TokenizerModel) -> None:
    """Raise a `ConfigError` if a vocabulary of this size makes no sense."""
    if not SMALLEST[model] <= vocab_size <= LARGEST:
        why = "" if model == "wordpiece" else f" with --model {model}, where 256 of them are bytes"
        raise ConfigError(
            f"--vocab-size is {str(vocab_size)[:80]}; expected {SMALLEST[model]} to {LARGEST}{why}"
        )


def train_tokenizer_files(
    text: Sequence[Path],
    vocab_size: int,
    output: Path,
    *,
    model: TokenizerModel = "wordpiece",
    lowercase: bool | None = None,
    strip_accents: bool | None = None,
    overwrite: bool = False,
    text_field: str = "text",
) -> str:
    """Learn a vocabulary and write the tokenizer to a directory, complete or not at all.

    Args:
        text: files and directories, read three times: for letters, for pieces, and to measure the
            result.
        vocab_size: tokens, the five special ones included.
        output: the directory; absent or empty, unless `overwrite`.
        model: the kind of pieces; it and the next two are those of `train_tokenizer`.
        lowercase: read text in lower case.
        strip_accents: read text without accents.
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
        tokenizer = train_tokenizer(
            files,
            vocab_size,
            model=model,
            lowercase=lowercase,
            strip_accents=strip_accents,
            text_field=text_field,
            counts=counts,
        )
        result = measure(tokenizer, _documents(files, text_field), counts.documents)
        write_tokenizer(tokenizer, staging)
    fewer = "" if len(tokenizer) == vocab_size else ": there was no more to learn"
    report = [
        str(counts),
        f"{output}: {model}, {len(tokenizer):,} tokens{fewer}",
        f"on this text: {result}",
        *(f"warning: {each}" for each in result.warnings(vocab_size)),
        f"to use it: pretrain-mpnet --tokenizer-name {output}",
    ]
    return "\n".join(report)


def _documents(
    files: Sequence[Path], text_field: str, counts: Counts | None = None
) -> Iterator[str]:
    return (document for path in files for document in read_documents(path, counts, text_field))


def _count_letters(
    files: Sequence[Path],
    text_field: str,
    counts: Counts,
    normalizer: normalizers.Normalizer | None,
) -> Counter[str]:
    """Count the letters of the text, white space left out, the most frequent first."""
    found: Counter[str] = Counter()
    with tqdm(_documents(files, text_field, counts), desc="Reading", unit=" documents") as bar:
        for document in bar:
            found.update(document if normalizer is None else normalizer.normalize_str(document))
    letters = [letter for letter in found if not letter.isspace()]
    # Of equally frequent ones, the order must not be that of a hash table.
    order = sorted(letters, key=lambda letter: (-found[letter], letter))
    return Counter({letter: found[letter] for letter in order})
