"""The tokenizer, and the numbers of it that masking and packing need.

**Special tokens** are looked up by purpose (mask, pad, cls or bos, sep or eos, unk), never by
spelling: MPNet's vocabulary holds both `<unk>` (3, never used) and `[UNK]` (104, the tokenizer's).

**The number of embeddings** is the largest id plus one. Neither `len(tokenizer)` nor `vocab_size`
is, when ids have gaps or tokens were added later.

**Where words begin and end** is read from the pieces. Each family of tokenizers writes white space
in another way:

    family                           a piece that starts a word   one that continues it
    WordPiece (BERT, MPNet)          un                           ##bel
    byte-level BPE (GPT-2, RoBERTa)  Ġun                          bel
    SentencePiece (T5, XLM-R)        ▁un                          bel
    BPE with a suffix (XLM, CLIP)    after bel</w>                un
    none of these                    every piece                  -

So a piece is read as the text that it means. It begins a word if its first character is white
space, and ends one if its last character is, as that of a line break (Ċ in byte-level BPE). A
character of a script without spaces, `WITHOUT_SPACES`, counts like white space: there each piece is
a word, as in BERT's Chinese.

>>> from tokenizers import models, normalizers, pre_tokenizers
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
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from huggingface_hub import HfApi
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from annotated_mpnet.errors import ConfigError, shown
from annotated_mpnet.mpnet.collator import Vocabulary

SECONDS_TO_ANSWER = 10
"""How long the Hub may take to say which commit a revision is."""

WITHOUT_SPACES = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u19e0-\u19ff\ua9e0-\ua9ff\uaa60-\uaa7f"
    "\u2e80-\u312f\u31a0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f"
    "\U00020000-\U0003ffff]"
)
"""Thai, Lao, Tibetan, Myanmar and Khmer; Chinese and Japanese with their punctuation."""

_PRINTABLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTES = {chr(byte): bytes([byte]) for byte in _PRINTABLE} | {
    chr(256 + place): bytes([byte]) for place, byte in enumerate(_OTHERS)
}
"""How byte-level BPE writes bytes: a printable one as a letter, the others from U+0100 on."""

TOLERATED_GAPS = 100_000
"""Ids without a token that any tokenizer may have; more than that only if it has as many tokens."""

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
    if size > 2 * len(pieces) + TOLERATED_GAPS:
        last = max(pieces, key=pieces.__getitem__)
        raise ConfigError(
            f"the tokenizer's token {shown(last)} has the id {size - 1}, and there are "
            f"{len(pieces)} tokens; expected ids without large gaps, since each id takes a row of "
            "the embedding (--tokenizer-name)"
        )

    # What transformers knows by purpose, and what the file marks (MPNet's unused `<unk>`).
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    is_special_V = np.zeros(size, dtype=np.bool_)
    is_special_V[tokenizer.all_special_ids] = True
    is_special_V[[each for each, token in added.items() if token.special]] = True
    random_ids = existing[~is_special_V[existing]]
    is_special_V[_extra_ids(tokenizer)] = False

    # A directory without tokenizer.json loads as a tokenizer of its special tokens alone.
    if len(random_ids) == 0:
        raise ConfigError(
            f"the tokenizer has {len(existing)} tokens and all of them are special; expected "
            "a vocabulary of words: is there a tokenizer.json in --tokenizer-name?"
        )
    starts_word_V, ends_word_V = _word_limits(tokenizer, pieces, size)
    # A token that was added later is a word of its own.
    starts_word_V[list(added)] = ends_word_V[list(added)] = True
    special_ids = pad_id, mask_id, cls_id, sep_id, unk_id
    return Vocabulary(
        size, *special_ids, is_special_V, starts_word_V, ends_word_V, random_ids=random_ids
    )


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Load a tokenizer from a directory, the Hub, or the Hub's cache on this machine.

    Its own code is never run. Truncation and padding are switched off.

    Raises:
        ConfigError: no such directory or Hub name, a file that cannot be read, not a fast
            tokenizer, a special token is missing, or the mask is also the padding.
    """
    # `os.path`, not `pathlib`, which raises for an unknown ~user, or a name of 300 letters.
    path = os.path.expanduser(name)
    local = os.path.isdir(path)
    # What looks like a path is not looked up on the Hub.
    is_path = os.path.exists(path) or name.startswith((".", "/", "~")) or name.count("/") > 1
    if not local and is_path:
        raise ConfigError(
            f"--tokenizer-name is {shown(name)}, which is not a directory; expected a "
            "directory that holds a tokenizer.json, or a Hub name"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path if local else name,
            trust_remote_code=False,
            local_files_only=local or not _hub_answers(name),
        )
    # Parsers of damaged files raise anything, Rust's included.
    except Exception as error:
        what = "this directory holds no tokenizer that loads" if local else "the Hub has none"
        raise ConfigError(
            f"--tokenizer-name {shown(name)}: {what} ({shown(str(error))}); expected a "
            "directory with a tokenizer.json and a tokenizer_config.json, or a Hub name"
        ) from error
    # A slow tokenizer has no description as JSON, which the functions here read.
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigError(
            f"--tokenizer-name {shown(name)} is a {type(tokenizer).__name__}, which is not a "
            "fast tokenizer; expected one with a tokenizer.json"
        )
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    vocabulary_of(tokenizer)  # raises now, and not after an hour of tokenising
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
    special = [_special_ids(tokenizer), *filter(None, [_extra_ids(tokenizer)])]
    named = json.dumps([deciding, *special], sort_keys=True)
    return hashlib.sha256(named.encode()).hexdigest()


def reader_of_text(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """Return a copy of the tokenizer's backend in which the extra tokens are ordinary ones.

    The others can then be switched off, with `encode_special_tokens`.
    """
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    extra = _extra_ids(tokenizer)
    for token in description["added_tokens"]:
        token["special"] = token["special"] and token["id"] not in extra
    return Tokenizer.from_str(json.dumps(description))


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
            f"the tokenizer's mask and pad are the same token, {shown(str(found['mask']))}; "
            "expected two: padding is invisible to the network, a mask must not be "
            "(--tokenizer-name)"
        )
    return ids


def _extra_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the ids of special tokens that were added to be a part of text, such as `<url>`.

    They are predicted like words, but they are no random replacements.
    """
    with_purpose = tokenizer.special_tokens_map.values()
    extra = {str(token) for token in tokenizer.extra_special_tokens} - set(with_purpose)
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return sorted(each for each, token in added.items() if token.content in extra)


def _word_limits(
    tokenizer: PreTrainedTokenizerFast, pieces: dict[str, int], size: int
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Return which pieces begin a word and which end one, (V,) each."""
    text_of = _piece_reader(tokenizer)
    starts_V, ends_V = np.ones((2, size), dtype=np.bool_)
    # If nothing marks a word, each token is a word: plain masking.
    if text_of is None:
        return starts_V, ends_V
    for piece, number in pieces.items():
        text = text_of(piece)
        letters = text.decode(errors="replace")
        # A piece of bytes may end inside a character; it counts if all that it may become are of
        # such a script.
        completed = [(text + 2 * rest).decode(errors="replace") for rest in (b"\x80", b"\xbf")]
        starts_V[number] = letters[:1].isspace() or all(map(WITHOUT_SPACES.search, completed))
        # A space alone belongs to the word after it.
        ends_V[number] = letters.strip(" ") != "" and (
            letters[-1].isspace() or WITHOUT_SPACES.match(letters[-1]) is not None
        )
    return starts_V, ends_V


def _piece_reader(tokenizer: PreTrainedTokenizerFast) -> Callable[[str], bytes] | None:
    """Return how to read a piece as UTF-8 with white space, or None if nothing marks a word."""
    # The description decides, not the vocabulary: BERT's holds a plain "▁" too.
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    continues = description["model"].get("continuing_subword_prefix")
    ends = description["model"].get("end_of_word_suffix")
    before_the_model = json.dumps(
        [description["normalizer"], description["pre_tokenizer"]], ensure_ascii=False
    )
    is_byte_level = '"ByteLevel"' in before_the_model
    if not (continues or ends or is_byte_level or "▁" in before_the_model):
        return None

    def text_of(piece: str) -> bytes:
        end = b""
        if ends and piece.endswith(ends):
            piece, end = piece.removesuffix(ends), b" "
        if is_byte_level:
            return b"".join(BYTES.get(letter, letter.encode()) for letter in piece) + end
        if continues:
            begin = b"" if piece.startswith(continues) else b" "
            return begin + piece.removeprefix(continues).encode() + end
        # SentencePiece writes a byte that is in no other piece as <0x0A>.
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", piece):
            return bytes.fromhex(byte[1])
        return piece.replace("▁", " ").encode() + end

    return text_of


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
