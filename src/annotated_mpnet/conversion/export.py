"""Our weights as a Hugging Face model: written, proved (`proof.py`), and only then published.

What is written:

    model.safetensors       the tensors in float32, under Hugging Face's names
    config.json             what MPNetConfig needs, eps and padding id spelled out
    tokenizer.json, ...     so that the directory is enough, offline
    pytorch_model.bin       on request, for readers that know no safetensors

**All or nothing.** Everything happens in a sibling `.tmp-NAME`; a rename publishes it, and a rename
happens or does not. Where an older export is replaced, it steps aside first. Killed at any moment,
this is what lies on the disk, with the name free or with an older export there:

    killed while it                          NAME, if free    NAME, if taken    beside it
    ---------------------------------------  ---------------  ----------------  -------------------
    writes, proves, syncs                    nothing          the old one       .tmp-NAME
    is between the two renames               (only one)       nothing           .tmp-NAME, .old-NAME
    deletes what was replaced                (nothing to)     the new one       .old-NAME

At no time is there a mixture of two, or half of one, under the name. The next export to it clears
the rest away. And only what is proved gets the name: `proof.py` opens the `.tmp-NAME` as its user
will open `NAME`, and a difference in the logits leaves nothing behind.

**What is left out.** The optimizer's means and the update's number: two thirds of a checkpoint, and
of use to nobody who does not resume. And rows of the embeddings that stand for no token, when the
vocabulary was padded for the sake of matrix kernels: 30,527 tokens in 30,592 rows, say.

>>> -(-ModelConfig().vocab_size // LARGEST_PADDING) * LARGEST_PADDING
30592

**Length.** The tokenizer's `model_max_length` is `max_positions`: 512 tokens, `<s>` and `</s>`
included; not the 514 of `max_position_embeddings` (`configuration.py`).

**sentence-transformers** opens the directory as it is, as any model of Hugging Face's: it finds no
`modules.json`, puts a mean over the tokens behind the encoder, and cuts texts at
`model_max_length`. We could write that file. It would change nothing but what the directory claims
to be: a model whose mean over the tokens somebody has trained to stand for a sentence. Pretraining
does not; fine-tuning does, and saves the file.

HF: `save_pretrained` writes into the directory itself, file by file, over what is there.

Next: `proof.py`.
"""

import copy
import dataclasses
import io
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from annotated_mpnet.conversion.configuration import reasons_not_representable, to_mpnet_config
from annotated_mpnet.conversion.names import to_hugging_face
from annotated_mpnet.conversion.proof import compare_logits, compare_tokenizers, quiet_transformers
from annotated_mpnet.errors import ConfigError, WriteError
from annotated_mpnet.files.atomic import sync
from annotated_mpnet.mpnet.config import ModelConfig
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining

LARGEST_PADDING = 128
"""Rows. Vocabularies are padded to a multiple of 8, 64 or 128 for the sake of matrix kernels. More
rows than that without a token are no padding, but another tokenizer's."""


@dataclass(frozen=True)
class ExportReport:
    """What an export has proved and left behind.

    Only an export that has been published has one: `max_difference` is at most the tolerance of
    `proof.py`, and tells how far below it the two programs agree.

    Attributes:
        directory: where the model is.
        files: what is in it, sorted.
        max_difference: the largest difference of a logit between the two networks.
        vocabulary_cut: rows of the embedding that stood for no token and were left out.
    """

    directory: Path
    files: tuple[Path, ...]
    max_difference: float
    vocabulary_cut: int


def export_to_hugging_face(
    model: MPNetForPretraining,
    directory: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    overwrite: bool,
    pytorch_bin: bool = False,
    save_tokenizer: bool = True,
) -> ExportReport:
    """Write a model as Hugging Face's `MPNetForMaskedLM`, and prove that it is the same network.

    In the order in which it can go wrong: refuse, write, prove, publish.

    >>> from tempfile import TemporaryDirectory
    >>> config = ModelConfig(vocab_size=99, encoder_embed_dim=24, encoder_ffn_dim=32)
    >>> model = MPNetForPretraining(dataclasses.replace(config, encoder_layers=1))
    >>> with TemporaryDirectory() as folder:
    ...     target = Path(folder) / "hf"
    ...     report = export_to_hugging_face(model, target, tokenizer=None, overwrite=False)
    >>> [file.name for file in report.files], report.max_difference < 1e-5
    (['config.json', 'model.safetensors'], True)

    Args:
        model: on any device, in any mode; it is not changed.
        directory: where to; absent or empty, unless `overwrite`.
        tokenizer: the model's. It tells the ids of `<s>` and `</s>`, and how many rows of a padded
            vocabulary are tokens. None: 0, 2 and all.
        overwrite: replace an older Hugging Face model there.
        pytorch_bin: write `pytorch_model.bin` too.
        save_tokenizer: write the tokenizer too, without truncation and padding.

    Raises:
        ConfigError: Hugging Face cannot represent the network (all reasons are named), the
            tokenizer is not the model's, or the directory is in use. Nothing was written.
        CheckpointError: the export does not do what the model does. Nothing was left behind.
        WriteError: full disk, lost permission. Nothing was left behind.
    """
    # Refuse: everything that can be known beforehand, before the first byte is written.
    reasons = reasons_not_representable(model.config) + _tokenizer_reasons(model.config, tokenizer)
    if reasons:
        raise ConfigError(
            f"Hugging Face's MPNet cannot be this model: {'; '.join(reasons)}; nothing was "
            "written. Train with what it can represent, or use the checkpoint as it is"
        )
    target = directory.resolve()
    with _writing(target):
        _check_target(target, overwrite)
    config, tensors = _without_padded_vocabulary(model, tokenizer)
    bos = _first_id(tokenizer, ("bos_token", "cls_token"), 0)
    eos = _first_id(tokenizer, ("eos_token", "sep_token"), 2)
    with _staging(target) as staging, quiet_transformers():
        # Write: all files of the directory, under a name that nobody looks for.
        with _writing(target):
            _write(staging, tensors)
            to_mpnet_config(config, bos, eos).save_pretrained(staging)
            if pytorch_bin:
                _write_pytorch_bin(staging, tensors)
            if tokenizer is not None and save_tokenizer:
                _untruncated(tokenizer, config.max_positions).save_pretrained(staging)
        # Prove: outside of `_writing`, since what goes wrong here is no full disk. Against the
        # tensors rather than the model, whose rows beyond the vocabulary have just been cut off.
        difference = compare_logits(staging, config, tensors)
        if tokenizer is not None and save_tokenizer:
            compare_tokenizers(staging, tokenizer)
        # Publish. An error up to here, and `_staging` clears away all that there is.
        with _writing(target):
            _publish(staging, target)
    return ExportReport(
        directory=directory,
        files=tuple(directory / path.name for path in sorted(target.iterdir())),
        max_difference=difference,
        vocabulary_cut=model.config.vocab_size - config.vocab_size,
    )


def number_of_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the size of the table that a tokenizer needs: its largest id, plus one.

    Neither `vocab_size` (without added tokens) nor `len` (too small if ids were left out) is that.
    Here a table of `len` = 6 rows would end before "a", which is id 7:

    >>> from tokenizers import Tokenizer, models
    >>> words = models.WordLevel({"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "a": 7}, "<unk>")
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words))
    >>> _ = tokenizer.add_tokens(["b"])
    >>> tokenizer.vocab_size, len(tokenizer), number_of_ids(tokenizer)
    (5, 6, 8)
    """
    return 1 + max(tokenizer.get_vocab().values(), default=-1)


def stands_for_no_token(rows: int, size: int) -> bool:
    """Tell whether a table is a tokenizer's, padded: the rows from `size` on stand for no token.

    A padded table has a round number of rows, and few too many. 30,527 rows are not the 30,522 of
    BERT's tokenizer and five more: the five came first, and moved all the others.

    >>> stands_for_no_token(30592, 30527), stands_for_no_token(30527, 30522)
    (True, False)
    """
    return size < rows < size + LARGEST_PADDING and rows % 8 == 0


def _tokenizer_reasons(config: ModelConfig, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """Say why a tokenizer cannot be the one that the network was trained with.

    Sizes are all that can be compared here: two tokenizers of the same size would both pass. That
    is why a checkpoint carries its own, and `convert-to-hf` takes that one.
    """
    if tokenizer is None:
        return []
    reasons = []
    # Fewer rows than ids: some token has no embedding. A few more: padding. Many more: another's.
    size, rows = number_of_ids(tokenizer), config.vocab_size
    if rows != size and not stands_for_no_token(rows, size):
        reasons.append(f"the tokenizer has {size} ids and the model {rows}: not its own tokenizer")
    if tokenizer.pad_token_id != config.pad_token_id:
        reasons.append(
            f"the tokenizer's padding id is {tokenizer.pad_token_id}, the model's "
            f"{config.pad_token_id}"
        )
    return reasons


def _check_target(target: Path, overwrite: bool) -> None:
    """Refuse a target that holds anything which the user did not ask to lose."""
    # `lexists`, for a link that leads nowhere is there all the same, and in the way.
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise ConfigError(f"{target} is a file; expected a directory: choose another name")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise ConfigError(
            f"{target} is not empty; nothing was written. Choose another directory, or replace "
            "what is there with --overwrite"
        )
    # Replacing deletes whatever is there. A slip of the hand must not cost a home directory; nor a
    # checkpoint of ours, which has a config.json too, and is known by its manifest.
    if not (target / "config.json").is_file() or (target / "manifest.json").exists():
        raise ConfigError(
            f"{target} holds something other than a Hugging Face model, which --overwrite would "
            "delete; choose another directory, or empty it yourself"
        )


def _without_padded_vocabulary(
    model: MPNetForPretraining, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return the network on the CPU, in float32, with a row for each token and no more.

    Rows without a token do no harm in training, where they are never an input and soon the least
    likely output. In Hugging Face's world they do: `generate` and fill-mask pick ids from all the
    logits, and decode what they picked; and a vocabulary that is not the tokenizer's looks like a
    mistake to the next program that compares the two.
    """
    # float32, whatever it was trained in: the proof goes down to 1e-4, and with the 8 significant
    # bits of bfloat16 a logit between 8 and 16 is rounded to a multiple of 2**-4.
    tensors = {name: tensor.detach().cpu().float() for name, tensor in model.state_dict().items()}
    size = model.config.vocab_size if tokenizer is None else number_of_ids(tokenizer)
    # The two that have a row for each token: the table, (V, D), which the head shares, and the
    # bias, (V,). Softmax over fewer tokens: each of the others gains a little probability.
    for name in ("sentence_encoder.embed_tokens.weight", "lm_head.bias"):
        tensors[name] = tensors[name][:size]
    return dataclasses.replace(model.config, vocab_size=size), tensors


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """Make the directory in which an export comes to be, and leave nothing of it after an error.

    One that is there already was left by a process that had no time to clear it away.
    """
    # A sibling, not a directory under /tmp: a rename is all or nothing only within a file system.
    staging = target.with_name(f".tmp-{target.name}")
    with _writing(target):
        if staging.exists():
            shutil.rmtree(staging)
        staging.mkdir(parents=True)
    try:
        yield staging
    except BaseException:  # Ctrl-C too
        shutil.rmtree(staging, ignore_errors=True)
        raise


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Turn a failed write into a `WriteError`; whatever is no failed write is left as it is.

    tokenizers writes in Rust, and says what went wrong only in the text of a bare `Exception`:
    "No space left on device (os error 28)". So the text decides, where the class does not.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and "os error" not in str(error):
            raise
        raise WriteError(
            f"{target} could not be written: {repr(str(error))[:80]}; nothing was left behind. "
            "Make room or mend that, or choose another directory"
        ) from error


def _write(staging: Path, tensors: Mapping[str, Tensor]) -> None:
    # Through bytes rather than `save_file`, whose files nobody but their owner may read: at the
    # price of a second copy in memory. transformers refuses files that do not say "pt".
    # `contiguous`, for q, k and v are views into one matrix, and safetensors wants plain rows.
    theirs = {name: each.contiguous() for name, each in to_hugging_face(tensors).items()}
    data = safetensors.torch.save(theirs, metadata={"format": "pt"})
    (staging / "model.safetensors").write_bytes(data)


def _first_id(
    tokenizer: PreTrainedTokenizerBase | None, purposes: tuple[str, ...], default: int
) -> int:
    """Return the id of the first of these special tokens that the tokenizer has.

    MPNet's two ends of a sentence have two names each: `<s>` is the beginning (bos) and what a
    classifier reads (cls), `</s>` the end (eos) and what stands between two sentences (sep). A
    tokenizer may declare either.
    """
    if tokenizer is None:
        return default
    vocabulary = tokenizer.get_vocab()
    tokens = [str(tokenizer.special_tokens_map.get(purpose)) for purpose in purposes]
    return next((vocabulary[token] for token in tokens if token in vocabulary), default)


def _untruncated(tokenizer: PreTrainedTokenizerBase, max_positions: int) -> PreTrainedTokenizerBase:
    """Return a copy that cuts and pads only when it is asked to.

    `tokenizer.json` of all-mpnet-base-v2 has both switched on, at 128 tokens: who trains on what it
    returns throws away the rest of each text without a word.
    """
    # A copy: training may still be using the caller's, with settings of its own.
    plain = copy.deepcopy(tokenizer)
    plain.model_max_length = max_positions
    # The settings stand in two places: in the Rust object, saved as tokenizer.json, and among the
    # arguments that are saved as tokenizer_config.json, from where they would come back.
    if isinstance(plain, PreTrainedTokenizerFast):
        plain.backend_tokenizer.no_truncation()
        plain.backend_tokenizer.no_padding()
    for setting in ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of"):
        plain.init_kwargs.pop(setting, None)
    return plain


def _write_pytorch_bin(staging: Path, tensors: Mapping[str, Tensor]) -> None:
    # Old readers know no tying by omission: they want the decoder's weight and bias by name. The
    # two names share memory, and torch.save stores shared memory once: no 94 MB are added. `clone`,
    # for q, k and v as views would each drag their whole matrix into the file.
    theirs = {name: each.clone() for name, each in to_hugging_face(tensors).items()}
    theirs["lm_head.decoder.weight"] = theirs["mpnet.embeddings.word_embeddings.weight"]
    theirs["lm_head.decoder.bias"] = theirs["lm_head.bias"]
    buffer = io.BytesIO()
    torch.save(theirs, buffer)
    (staging / "pytorch_model.bin").write_bytes(buffer.getbuffer())


def _publish(staging: Path, target: Path) -> None:
    """Give a finished export its name; what had it is deleted last."""
    # On the disk before it has its name: a file system may write a rename before the contents, and
    # after a power cut a name without contents would look like an export.
    for path in (*staging.iterdir(), staging):
        sync(path)
    former = target.with_name(f".old-{target.name}")
    # An empty directory needs no moving: a rename replaces it.
    if target.exists() and any(target.iterdir()):
        shutil.rmtree(former, ignore_errors=True)
        os.rename(target, former)
    # The two renames are as close together as can be: between them the name is free.
    try:
        os.rename(staging, target)
    except OSError:
        if former.exists():
            os.rename(former, target)
        raise
    shutil.rmtree(former, ignore_errors=True)
