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

**Whether it is the same tokenizer.** `tokenizer_hash` names what decides how text becomes numbers.
Truncation and padding are no part of it: the `tokenizer.json` of all-mpnet-base-v2 ships with both
switched on, at 128 tokens, and would silently cut every document. `load_tokenizer` switches them
off.

Next: `sources.py`, where the text comes from; then `packing.py`.

    V vocabulary
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from annotated_mpnet.data.hub import commit_of
from annotated_mpnet.errors import ConfigError

NEEDED = {
    "mask": ("mask_token",),
    "pad": ("pad_token",),
    "cls (or bos)": ("cls_token", "bos_token"),
    "sep (or eos)": ("sep_token", "eos_token"),
    "unk": ("unk_token",),
}
"""The special tokens of a row, by purpose: the first attribute that is set names the token."""


@dataclass(frozen=True)
class Vocabulary:
    """What masking and packing know of a tokenizer: plain numbers and tables.

    Attributes:
        size: V, the number of embedding rows: the largest id plus one.
        pad_id: fills short rows.
        mask_id: stands in for a predicted token.
        cls_id: begins a row.
        sep_id: ends a row, and each document within it.
        unk_id: stands for text that the vocabulary cannot spell.
        is_special_V: (V,) bool. Never predicted, never a random stand-in.
        starts_word_V: (V,) bool. Begins a word.
        random_ids: the ids that a random stand-in is drawn from: those that exist and are not
            special.
    """

    size: int
    pad_id: int
    mask_id: int
    cls_id: int
    sep_id: int
    unk_id: int
    is_special_V: npt.NDArray[np.bool_]
    starts_word_V: npt.NDArray[np.bool_]
    random_ids: npt.NDArray[np.int64]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> "Vocabulary":
        """Read the tables off a tokenizer.

        Raises:
            ConfigError: special tokens are missing, or nothing but special tokens is there.
        """
        mask_id, pad_id, cls_id, sep_id, unk_id = _special_ids(tokenizer)
        pieces = tokenizer.get_vocab()
        existing = np.array(sorted(pieces.values()))
        size = int(existing[-1]) + 1

        added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
        is_special_V = np.zeros(size, dtype=np.bool_)
        is_special_V[tokenizer.all_special_ids] = True
        # Marked as special in the file, although it serves none of the known purposes: MPNet's
        # unused `<unk>` is one.
        is_special_V[[each for each, token in added.items() if token.special]] = True

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
        return cls(
            size, pad_id, mask_id, cls_id, sep_id, unk_id, is_special_V, starts_word_V, random_ids
        )


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Load a tokenizer from a directory, the Hub, or the Hub's cache on this machine.

    Code that comes with a tokenizer is never run. Truncation and padding are switched off.

    Raises:
        ConfigError: no such directory or Hub name, a file that cannot be read, a tokenizer without
            a fast version, without one of the special tokens, or whose mask is its padding.
    """
    path = Path(name).expanduser()
    local = path.is_dir()
    if not local and (path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ConfigError(
            f"--tokenizer-name is {_shown(name)}, which is not a directory; expected a directory "
            "that holds a tokenizer.json, or a Hub name"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(path) if local else name,
            trust_remote_code=False,
            local_files_only=local or not _hub_answers(name),
        )
    # A damaged file surfaces as whatever the parser behind it happens to raise, Rust's included.
    except Exception as error:
        raise ConfigError(_why_not_loaded(name, local, error)) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigError(
            f"--tokenizer-name {_shown(name)} is a {type(tokenizer).__name__}, which is not a fast "
            "tokenizer; expected one with a tokenizer.json"
        )
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    _special_ids(tokenizer)
    return tokenizer


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the SHA-256 of all that decides how text becomes numbers.

    That is vocabulary, added tokens, normalizer, pre-tokenizer and the ids of the special tokens;
    not truncation and padding, nor how numbers become text again.
    """
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    deciding = {
        part: description[part] for part in ("model", "added_tokens", "normalizer", "pre_tokenizer")
    }
    named = json.dumps([deciding, _special_ids(tokenizer)], sort_keys=True)
    return hashlib.sha256(named.encode()).hexdigest()


def check_for_export(vocabulary: Vocabulary) -> str | None:
    """Return why Hugging Face's MPNet could not use this vocabulary; None if it can.

    HF: `MPNetEmbeddings` numbers positions from the padding's id on, and has the id 1 written into
    its code (`self.padding_idx = 1`), whatever the configuration says.
    """
    if vocabulary.pad_id == 1:
        return None
    return (
        f"the tokenizer's padding has the id {vocabulary.pad_id}; Hugging Face's MPNet has the id "
        "1 written into its code, and would count positions from another row of the table: give a "
        "tokenizer in MPNet's layout (train-mpnet-tokenizer makes one), or train with "
        "--no-export-hf"
    )


def _special_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the ids for the purposes of `NEEDED`, in its order."""
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
    mask_id, pad_id = ids[:2]
    if mask_id == pad_id:
        raise ConfigError(
            f"the tokenizer's mask and pad are the same token, {_shown(str(found['mask']))}; "
            "expected two: padding is invisible to the network, a mask must not be "
            "(--tokenizer-name)"
        )
    return ids


def _starts_word(
    tokenizer: PreTrainedTokenizerFast, pieces: dict[str, int], size: int
) -> npt.NDArray[np.bool_]:
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    continues = description["model"].get("continuing_subword_prefix")
    before_the_model = json.dumps(
        [description["normalizer"], description["pre_tokenizer"]], ensure_ascii=False
    )
    starts_word_V = np.ones(size, dtype=np.bool_)
    if continues:
        marked = [each for piece, each in pieces.items() if piece.startswith(continues)]
        starts_word_V[marked] = False
        return starts_word_V
    # Byte-level BPE writes a space as Ġ, SentencePiece as ▁; the step that does so stands in the
    # description. A vocabulary would be a poorer witness: BERT's holds a plain "▁" too.
    starts = "Ġ" if '"ByteLevel"' in before_the_model else "▁"
    if starts == "Ġ" or "▁" in before_the_model:
        marked = [each for piece, each in pieces.items() if not piece.startswith(starts)]
        starts_word_V[marked] = False
    return starts_word_V


def _hub_answers(name: str) -> bool:
    """Ask the Hub once, without its minute of retries: offline, the cache must do."""
    try:
        commit_of(name, "model")
    # No network, no such name, no permission, offline mode: each has its own family of exceptions,
    # by version, and the loader that comes next reports whichever it was.
    except Exception:
        return False
    return True


def _why_not_loaded(name: str, local: bool, error: Exception) -> str:
    reason = _shown(str(error))
    if local:
        return (
            f"--tokenizer-name {_shown(name)}: the directory holds no tokenizer that can be loaded "
            f"({reason}); expected a tokenizer.json and a tokenizer_config.json"
        )
    return (
        f"--tokenizer-name {_shown(name)}: no directory of that name, and the Hub could not "
        f"deliver it ({reason}); give a directory: --tokenizer-name DIR"
    )


def _shown(text: str) -> str:
    """Quote foreign text so that it cannot break the line, at most 80 characters of it."""
    return repr(text if len(text) <= 80 else text[:77] + "...")
