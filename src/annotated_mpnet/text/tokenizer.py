"""The tokenizer, and the few numbers of it that masking and packing need.

A tokenizer is a program that someone else wrote and saved: it cuts text into pieces of words and
numbers them. MPNet asks four things of it, and this module is where they are asked.

**Which tokens are special.** A row is `<s> text </s>`, short rows are filled with `<pad>`, hidden
tokens become `<mask>`. They are looked up by what they are *for* (mask, pad, cls or bos, sep or
eos, unk), never by spelling: MPNet's own vocabulary, BERT's with four tokens in front, holds both
`<unk>` (3, which nobody uses) and `[UNK]` (104, which the tokenizer uses). Special tokens are never
predicted, and never stand in for a predicted token.

**How many embedding rows.** The largest id plus one. Neither `len(tokenizer)` nor `vocab_size` is
that number when ids have gaps or tokens were added later.

**Where words begin.** Whole words are hidden together, or `un ##bel ##ie ##va ##bly` with a hole in
its middle would be a spelling exercise. The tokenizer marks it in the pieces themselves:

    family                           a piece that starts a word   one that continues it
    WordPiece (BERT, MPNet)          un                           ##bel
    byte-level BPE (GPT-2, RoBERTa)  Ġun                          bel
    SentencePiece (T5, XLM-R)        ▁un                          bel
    none of these                    every piece                  -

In the second and third family punctuation continues the word before it ("end." is one word), in
WordPiece it is a word of its own; that is the tokenizers' doing, and fairseq has it so as well.
Here is a WordPiece of nine tokens, and what this module makes of it:

>>> from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
>>> pieces = ["<s>", "<pad>", "</s>", "<unk>", "un", "##bel", "##ie", "tall", "<mask>"]
>>> word_piece = models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="<unk>")
>>> backend = Tokenizer(word_piece)
>>> backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
>>> tokenizer = PreTrainedTokenizerFast(
...     tokenizer_object=backend, cls_token="<s>", pad_token="<pad>", sep_token="</s>",
...     unk_token="<unk>", mask_token="<mask>")
>>> vocabulary = vocabulary_of(tokenizer)
>>> vocabulary.size, vocabulary.mask_id, vocabulary.random_ids
(9, 8, array([4, 5, 6, 7]))
>>> [piece for piece, starts in zip(pieces, vocabulary.starts_word_V) if not starts]
['##bel', '##ie']

One that is added later gets the next id, behind the mask. `vocab_size` does not count it, and a
table of that size would have no row for it:

>>> _ = tokenizer.add_tokens(["tallest"])
>>> tokenizer.vocab_size, vocabulary_of(tokenizer).size
(9, 10)

HF: `DataCollatorForLanguageModeling` can mask whole words too; it takes what stands between spaces
of the text for a word, whichever tokenizer cut it, and has to be given the places of all tokens in
the text for it. Here one look into a table of V bits is enough, and the rows need nothing but ids.

**Whether it is the same tokenizer.** `tokenizer_hash` names what decides how text becomes numbers.
Truncation and padding are no part of it: the `tokenizer.json` of all-mpnet-base-v2 ships with both
switched on, at 128 tokens, and would silently cut every document. `load_tokenizer` switches them
off. The hash is part of the name of packed rows and of a checkpoint: two vocabularies of the same
size with two words exchanged fit the same network, and what it learned would be gibberish.

>>> before = tokenizer_hash(tokenizer)
>>> tokenizer.backend_tokenizer.enable_truncation(128)
>>> tokenizer_hash(tokenizer) == before
True
>>> tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
>>> tokenizer_hash(tokenizer) == before
False

Next: `text/sources.py`, where the text comes from; then `text/packing.py`.

    V vocabulary
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from annotated_mpnet.errors import ConfigError
from annotated_mpnet.mpnet.collator import Vocabulary
from annotated_mpnet.streams.hub import commit_of
from annotated_mpnet.text.sources import shown_text

NEEDED = {
    "mask": ("mask_token",),
    "pad": ("pad_token",),
    "cls (or bos)": ("cls_token", "bos_token"),
    "sep (or eos)": ("sep_token", "eos_token"),
    "unk": ("unk_token",),
}
"""The special tokens of a row, by purpose: the first attribute that is set names the token. BERT's
family calls the ends of a text cls and sep, GPT's bos and eos; RoBERTa and MPNet set all four."""


def vocabulary_of(tokenizer: PreTrainedTokenizerFast) -> Vocabulary:
    """Read the tables off a tokenizer.

    Raises:
        ConfigError: special tokens are missing, or nothing but special tokens is there.
    """
    mask_id, pad_id, cls_id, sep_id, unk_id = _special_ids(tokenizer)
    # Ids may have gaps, where tokens were taken out of a vocabulary. The embedding table has a
    # row for each number up to the largest; but a random stand-in is drawn from those that are
    # a piece, or the network would be shown, and train, rows that no text ever uses.
    pieces = tokenizer.get_vocab()
    existing = np.array(sorted(pieces.values()))
    size = int(existing[-1]) + 1

    # Two lists of special tokens, neither of which holds all: what transformers knows by its
    # purpose, and what the file marks.
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    is_special_V = np.zeros(size, dtype=np.bool_)
    is_special_V[tokenizer.all_special_ids] = True
    # Marked as special in the file, although it serves none of the known purposes: MPNet's
    # unused `<unk>` is one.
    is_special_V[[each for each, token in added.items() if token.special]] = True

    # A directory without tokenizer.json but with a configuration loads as a tokenizer of
    # nothing but its special tokens, without any complaint: hence the look at what is left.
    random_ids = existing[~is_special_V[existing]]
    if len(random_ids) == 0:
        raise ConfigError(
            f"the tokenizer knows {len(existing)} tokens and all of them are special; expected "
            "a vocabulary of words: does the directory of --tokenizer-name hold its "
            "tokenizer.json?"
        )
    starts_word_V = _starts_word(tokenizer, pieces, size)
    # A token that was added later is cut out of the text in one piece: a word of its own.
    starts_word_V[list(added)] = True
    return Vocabulary(
        size, pad_id, mask_id, cls_id, sep_id, unk_id, is_special_V, starts_word_V, random_ids
    )


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Load a tokenizer from a directory, the Hub, or the Hub's cache on this machine.

    Code that comes with a tokenizer is never run. Truncation and padding are switched off.

    Args:
        name: a directory, or a name on the Hub, `owner/name` or `name`. A directory is preferred.

    Raises:
        ConfigError: no such directory or Hub name, a file that cannot be read, a tokenizer without
            a fast version, without one of the special tokens, or whose mask is its padding.
    """
    path = Path(name).expanduser()
    local = path.is_dir()
    # What looks like a path and is none would be asked for on the Hub, which would answer that
    # there is no such repository: true, but not the mistake.
    if not local and (path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ConfigError(
            f"--tokenizer-name is {shown_text(name)}, which is not a directory; expected a "
            "directory that holds a tokenizer.json, or a Hub name"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(path) if local else name,
            trust_remote_code=False,
            local_files_only=local or not _hub_answers(name),
        )
    # A damaged file surfaces as whatever the parser behind it happens to raise, Rust's included. A
    # name without a fast tokenizer, or one that would need its own code, ends here as well.
    except Exception as error:
        raise ConfigError(_why_not_loaded(name, local, error)) from error
    # A slow one is a program in Python, without threads, and without the description as JSON that
    # `tokenizer_hash` and `_starts_word` read.
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigError(
            f"--tokenizer-name {shown_text(name)} is a {type(tokenizer).__name__}, which is not a "
            "fast tokenizer; expected one with a tokenizer.json"
        )
    # A document longer than a row goes on in the next one, and it is the collator that pads. The
    # look at the special tokens is for what it raises: here, and not after an hour of tokenising.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    _special_ids(tokenizer)
    return tokenizer


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the SHA-256 of all that decides how text becomes numbers.

    Of contents and not of files: a tokenizer that was saved, copied or downloaded again is the
    same one. Hashed are vocabulary, added tokens, normalizer, pre-tokenizer and the ids of the
    special tokens; not truncation and padding, nor how numbers become text again, nor how a text is
    framed (`post_processor`): packing frames rows itself.
    """
    # The description is the whole tokenizer as JSON, vocabulary and merges in `model`. Its keys are
    # sorted before it is hashed: that libraries write them in another order tomorrow is no change.
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    deciding = {
        part: description[part] for part in ("model", "added_tokens", "normalizer", "pre_tokenizer")
    }
    named = json.dumps([deciding, _special_ids(tokenizer)], sort_keys=True)
    return hashlib.sha256(named.encode()).hexdigest()


def check_for_export(vocabulary: Vocabulary) -> str | None:
    """Return why Hugging Face's MPNet could not use this vocabulary; None if it can.

    Asked before training, because after it the answer comes too late: there is no moving the
    padding then, without moving rows of the embedding table.

    HF: `MPNetEmbeddings` numbers positions from the padding's id on, and has the id 1 written into
    its code (`self.padding_idx = 1`), whatever the configuration says.
    """
    # `<mask>` and the others may stand anywhere: only this id is in the code.
    if vocabulary.pad_id == 1:
        return None
    return (
        f"the tokenizer's padding has the id {vocabulary.pad_id}; Hugging Face's MPNet has the id "
        "1 written into its code, and would count positions from another row of the table: give a "
        "tokenizer in MPNet's layout (train-mpnet-tokenizer makes one), or train with "
        "--no-export-hf"
    )


def _special_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the ids for the purposes of `NEEDED`, in its order.

    Raises:
        ConfigError: some are missing (all of them are named, not only the first), or the mask is
            the padding.
    """
    # From purpose to spelling, and from that to the id. Whatever is named has one: transformers
    # appends a special token to a vocabulary that lacks it.
    named = tokenizer.special_tokens_map
    found = {
        purpose: next((named[each] for each in attributes if each in named), None)
        for purpose, attributes in NEEDED.items()
    }
    missing = [purpose for purpose, token in found.items() if token is None]
    if missing:
        raise ConfigError(
            f"the tokenizer has no special token for: {', '.join(missing)}; expected all of "
            f"{', '.join(NEEDED)}; name them in its tokenizer_config.json (--tokenizer-name)"
        )
    pieces = tokenizer.get_vocab()
    ids = [pieces[str(token)] for token in found.values()]
    # GPT-like tokenizers come without padding, and a usual way out is to name some other token for
    # it. As padding the mask would be hidden from attention wherever it stands: nothing to predict
    # from, and no error.
    mask_id, pad_id = ids[:2]
    if mask_id == pad_id:
        raise ConfigError(
            f"the tokenizer's mask and pad are the same token, {shown_text(str(found['mask']))}; "
            "expected two: padding is invisible to the network, a mask must not be "
            "(--tokenizer-name)"
        )
    return ids


def _starts_word(
    tokenizer: PreTrainedTokenizerFast, pieces: dict[str, int], size: int
) -> npt.NDArray[np.bool_]:
    """Return which pieces begin a word, (V,).

    Args:
        tokenizer: whose description tells the family.
        pieces: its vocabulary, ids by piece.
        size: V.
    """
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    # WordPiece names its own mark, and whatever does not carry it starts a word: also `tall` where
    # it stands alone, and the comma. (BPE's description has the same entry, and nothing in it.)
    continues = description["model"].get("continuing_subword_prefix")
    before_the_model = json.dumps(
        [description["normalizer"], description["pre_tokenizer"]], ensure_ascii=False
    )
    # If nothing marks a word (Chinese characters; a tokenizer of whole words), all bits stay set:
    # each token is a word of its own, which is plain masking.
    starts_word_V = np.ones(size, dtype=np.bool_)
    if continues:
        marked = [each for piece, each in pieces.items() if piece.startswith(continues)]
        starts_word_V[marked] = False
        return starts_word_V
    # Byte-level BPE writes a space as Ġ, SentencePiece as ▁; the step that does so stands in the
    # description. A vocabulary would be a poorer witness: BERT's holds a plain "▁" too. In these
    # families it is the beginning that is marked, so that whatever has no mark continues.
    starts = "Ġ" if '"ByteLevel"' in before_the_model else "▁"
    if starts == "Ġ" or "▁" in before_the_model:
        marked = [each for piece, each in pieces.items() if not piece.startswith(starts)]
        starts_word_V[marked] = False
    return starts_word_V


def _hub_answers(name: str) -> bool:
    """Ask the Hub once, without its minute of retries: offline, the cache must do.

    Nothing hangs on the answer but where the loader looks: the same tokenizer comes from both.
    """
    try:
        commit_of(name, "model")
    # No network, no such name, no permission, offline mode: each has its own family of exceptions,
    # by version, and the loader that comes next reports whichever it was.
    except Exception:
        return False
    return True


def _why_not_loaded(name: str, local: bool, error: Exception) -> str:
    """Return the one line for a tokenizer that does not load, with what the loader said in it."""
    reason = shown_text(str(error))
    # A directory can be looked into; for a name, the way out without a network is a directory.
    if local:
        return (
            f"--tokenizer-name {shown_text(name)}: the directory holds no tokenizer that can be "
            f"loaded ({reason}); expected a tokenizer.json and a tokenizer_config.json"
        )
    return (
        f"--tokenizer-name {shown_text(name)}: no directory of that name, and the Hub could not "
        f"deliver it ({reason}); give a directory: --tokenizer-name DIR"
    )
