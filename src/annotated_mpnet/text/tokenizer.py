"""The tokenizer, and the numbers of it that masking and packing need.

**Special tokens** are looked up by purpose (mask, pad, cls or bos, sep or eos, unk), never by
spelling: MPNet's vocabulary holds both `<unk>` (3, never used) and `[UNK]` (104, the tokenizer's).

**The number of embeddings** is the largest id plus one. Neither `len(tokenizer)` nor `vocab_size`
is, when ids have gaps or tokens were added later.

**Where words begin** is marked in the pieces themselves:

    family                           a piece that starts a word   one that continues it
    WordPiece (BERT, MPNet)          un                           ##bel
    byte-level BPE (GPT-2, RoBERTa)  Ġun                          bel
    SentencePiece (T5, XLM-R)        ▁un                          bel
    none of these                    every piece                  -

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
>>> _ = tokenizer.add_tokens(["tallest"])
>>> tokenizer.vocab_size, vocabulary_of(tokenizer).size
(9, 10)

**Is it the same tokenizer?** `tokenizer_hash` covers what decides how text becomes ids. It is part
of the key of packed text and of a run's identity: two vocabularies with two words swapped fit the
same network, and what it learned would be gibberish. Truncation and padding do not count (the
tokenizer.json of all-mpnet-base-v2 has both switched on, at 128 tokens; `load_tokenizer` switches
them off):

>>> before = tokenizer_hash(tokenizer)
>>> tokenizer.backend_tokenizer.enable_truncation(128)
>>> tokenizer_hash(tokenizer) == before
True
>>> tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
>>> tokenizer_hash(tokenizer) == before
False

    V vocabulary
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
from huggingface_hub import HfApi
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from annotated_mpnet.errors import ConfigError
from annotated_mpnet.mpnet.collator import Vocabulary
from annotated_mpnet.text.sources import shown_text

SECONDS_TO_ANSWER = 10
"""How long the Hub may take to say which commit a revision is."""

NEEDED = {
    "mask": ("mask_token",),
    "pad": ("pad_token",),
    "cls (or bos)": ("cls_token", "bos_token"),
    "sep (or eos)": ("sep_token", "eos_token"),
    "unk": ("unk_token",),
}
"""Special tokens by purpose: the first attribute that is set names the token."""


def vocabulary_of(tokenizer: PreTrainedTokenizerFast) -> Vocabulary:
    """Return the tables of a tokenizer.

    Raises:
        ConfigError: special tokens are missing, or there are no others.
    """
    mask_id, pad_id, cls_id, sep_id, unk_id = _special_ids(tokenizer)
    # Ids may have gaps. Random replacements are drawn from the ids that exist.
    pieces = tokenizer.get_vocab()
    existing = np.array(sorted(pieces.values()))
    size = int(existing[-1]) + 1

    # What transformers knows by purpose, and what the file marks (MPNet's unused `<unk>`).
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    is_special_V = np.zeros(size, dtype=np.bool_)
    is_special_V[tokenizer.all_special_ids] = True
    is_special_V[[each for each, token in added.items() if token.special]] = True

    # A directory without tokenizer.json loads as a tokenizer of its special tokens alone.
    random_ids = existing[~is_special_V[existing]]
    if len(random_ids) == 0:
        raise ConfigError(
            f"the tokenizer has {len(existing)} tokens and all of them are special; expected "
            "a vocabulary of words: is there a tokenizer.json in --tokenizer-name?"
        )
    starts_word_V = _starts_word(tokenizer, pieces, size)
    # A token that was added later is a word of its own.
    starts_word_V[list(added)] = True
    return Vocabulary(
        size, pad_id, mask_id, cls_id, sep_id, unk_id, is_special_V, starts_word_V, random_ids
    )


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Load a tokenizer from a directory, the Hub, or the Hub's cache on this machine.

    Its own code is never run. Truncation and padding are switched off.

    Raises:
        ConfigError: no such directory or Hub name, a file that cannot be read, not a fast
            tokenizer, a special token is missing, or the mask is also the padding.
    """
    path = Path(name).expanduser()
    local = path.is_dir()
    # What looks like a path is not looked up on the Hub.
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
    # Parsers of damaged files raise anything, Rust's included.
    except Exception as error:
        what = "this directory holds no tokenizer that loads" if local else "the Hub has none"
        raise ConfigError(
            f"--tokenizer-name {shown_text(name)}: {what} ({shown_text(str(error))}); expected a "
            "directory with a tokenizer.json and a tokenizer_config.json, or a Hub name"
        ) from error
    # A slow tokenizer has no description as JSON, which `tokenizer_hash` and `_starts_word` read.
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigError(
            f"--tokenizer-name {shown_text(name)} is a {type(tokenizer).__name__}, which is not a "
            "fast tokenizer; expected one with a tokenizer.json"
        )
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    _special_ids(tokenizer)  # raises now, and not after an hour of tokenising
    return tokenizer


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write a tokenizer's files, in a directory that transformers 4 opens as well.

    transformers 5 would name the class TokenizersBackend, which 4 does not know.
    """
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    description = json.loads(path.read_text(encoding="utf-8"))
    if description.get("tokenizer_class") == "TokenizersBackend":
        description["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(
            json.dumps(description, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the SHA-256 of all that decides how text becomes ids.

    These are vocabulary, added tokens, normalizer, pre-tokenizer and the ids of special tokens; not
    truncation, padding, decoder or post-processor: packing adds `<s>` and `</s>` itself.
    """
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    deciding = {
        part: description[part] for part in ("model", "added_tokens", "normalizer", "pre_tokenizer")
    }
    named = json.dumps([deciding, _special_ids(tokenizer)], sort_keys=True)
    return hashlib.sha256(named.encode()).hexdigest()


def check_for_export(vocabulary: Vocabulary) -> str | None:
    """Return why Hugging Face's MPNet could not use this vocabulary; None if it can.

    HF: `MPNetEmbeddings` has `self.padding_idx = 1`, whatever the configuration says.
    """
    if vocabulary.pad_id == 1:
        return None
    return (
        f"the tokenizer's padding has the id {vocabulary.pad_id}; in Hugging Face's MPNet the id 1 "
        "is hard-coded, so positions would be wrong: use a tokenizer in MPNet's layout "
        "(train-mpnet-tokenizer makes one), or train with --no-export-hf"
    )


def _special_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the ids for the purposes of `NEEDED`, in its order.

    Raises:
        ConfigError: some are missing (all of them are named), or the mask is the padding.
    """
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
    # GPT-like tokenizers have no padding, and some other token is often named for it.
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
    """Return which pieces begin a word, (V,)."""
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    # WordPiece names its own mark; the same entry is empty in BPE's description.
    continues = description["model"].get("continuing_subword_prefix")
    before_the_model = json.dumps(
        [description["normalizer"], description["pre_tokenizer"]], ensure_ascii=False
    )
    # If nothing marks a word, each token is a word: plain masking.
    starts_word_V = np.ones(size, dtype=np.bool_)
    if continues:
        marked = [each for piece, each in pieces.items() if piece.startswith(continues)]
        starts_word_V[marked] = False
        return starts_word_V
    # Byte-level BPE writes a space as Ġ, SentencePiece as ▁. The description decides, not the
    # vocabulary: BERT's holds a plain "▁" too.
    starts = "Ġ" if '"ByteLevel"' in before_the_model else "▁"
    if starts == "Ġ" or "▁" in before_the_model:
        marked = [each for piece, each in pieces.items() if not piece.startswith(starts)]
        starts_word_V[marked] = False
    return starts_word_V


def commit_of(name: str, kind: str, revision: str | None = None) -> str:
    """Ask the Hub once, without its minutes of retries, which commit a revision is.

    Args:
        name: of the repository.
        kind: "model" or "dataset".
        revision: commit, tag or branch; None for the newest.

    Raises:
        Exception: no network, no such name, no permission, offline mode: any of several families.
    """
    info = HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=SECONDS_TO_ANSWER)
    return str(info.sha)


def _hub_answers(name: str) -> bool:
    """Ask the Hub once, without its minute of retries; if it does not answer, the cache must do."""
    try:
        commit_of(name, "model")
    # The loader reports whatever it was.
    except Exception:
        return False
    return True
