"""Weights from Hugging Face: the right ones, all of them, or none.

Three kinds of directory hold an MPNet:

    MPNetForMaskedLM        mpnet.encoder...   lm_head...        the whole network
    MPNetModel              encoder...         pooler...         the encoder, without a head
    sentence-transformers   modules.json, which says where one of the former two is: in the
                            directory itself, or in 0_Transformer

The two kinds of weights are told apart by their names, not by `architectures` in config.json
(all-mpnet-base-v2 calls itself MPNetForMaskedLM, and is none): the class with a head puts `mpnet.`
before each name of its encoder, the class without does not. So an encoder that never had a head is
something else than a network that lost it. The first gets a fresh head, and a note says so; the
second is refused.

    names in the file                          is                         becomes
    -----------------------------------------  -------------------------  ----------------------
    mpnet.encoder...        and lm_head...     whole                      itself
    mpnet.encoder...        and no lm_head     whole once, now damaged    an error
    encoder...              and pooler...      an encoder                 itself, and a fresh head
    bert.encoder...                            BERT                       an error

An encoder-only model is a good place to start from: 99 % of what was learned is in it. The head of
MPNet-base has 0.6 million weights of its own, of 110 million, and the token embeddings do the rest:

>>> sizes = {name: each.numel() for name, each in expected_tensors(ModelConfig()).items()}
>>> sum(size for name, size in sizes.items() if name.startswith("lm_head."))
622655

What the configuration says counts only where Hugging Face's code heeds it (`configuration.py`).

HF: `from_pretrained` on another architecture's directory warns, and draws the weights that are
missing from a random generator; that is why it is not used here. Files are read as plain tensors,
`pytorch_model.bin` with `weights_only=True`, which runs no code.

The order in which a directory is read is the order in which it can be refused cheaply: a thousand
bytes of configuration say what the network is; the names and shapes of the weights must be exactly
that; only then are 438 MB looked at number by number.

Next: `fairseq.py`.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from huggingface_hub import snapshot_download
from torch import Tensor

from annotated_mpnet.conversion.configuration import WAY_OUT, read_mpnet_config
from annotated_mpnet.conversion.names import (
    check_tensors,
    expected_tensors,
    to_hugging_face,
    to_ours,
)
from annotated_mpnet.errors import CheckpointError
from annotated_mpnet.mpnet.config import ModelConfig

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
"""`name` or `owner/name`, and no path that leads somewhere; see `locate`."""
LARGEST_JSON = 1024 * 1024
"""Bytes; a configuration has about one thousand."""


def load_hugging_face(
    directory_or_name: str,
) -> tuple[ModelConfig, dict[str, Tensor], list[str]]:
    """Read an MPNet of Hugging Face's.

    Args:
        directory_or_name: a directory, or else a name on the Hub; only this touches the network.

    Returns:
        The network's configuration; its tensors in float32 under our names, complete; and what the
        user should know. `mask_token_id` is the tokenizer's to tell, and has its default here;
        `activation_dropout` is 0, since Hugging Face's network has none.

    Raises:
        CheckpointError: not there, not an MPNet, not readable without running code, not complete,
            or not a network that Hugging Face's own code would run as described.
    """
    return read_directory(locate(directory_or_name))


def locate(directory_or_name: str) -> Path:
    """Return the directory that holds config.json and weights, downloaded if need be.

    What is there is never looked for on the Hub, and what is plainly a path is not either: a slip
    in a path must not become a question to a server.

    >>> names = ["mpnet-base", "microsoft/mpnet-base", "./mpnet-base", "/mpnet-base", "my/old/run"]
    >>> [HUB_NAME.fullmatch(name) is not None for name in names]
    [True, True, False, False, False]
    """
    path = Path(directory_or_name)
    if not path.is_dir():
        path = _download(directory_or_name)
    return _transformer_of(path)


def read_directory(directory: Path) -> tuple[ModelConfig, dict[str, Tensor], list[str]]:
    """Read a directory that `locate` returned; see `load_hugging_face`.

    The two are apart so that a caller who also wants the tokenizer's files looks for the directory
    once, and finds weights and tokenizer in the same place.
    """
    path = directory / "config.json"
    config = read_mpnet_config(path, _read_json(path))
    path, found = _read_weights(directory)
    notes = []
    # Two things that are no part of what is pretrained. Early versions saved the numbers 0, 1, 2,
    # ... with the weights. And a pooler is a layer on `<s>` for classifying whole sentences: BERT
    # trained it by predicting the next sentence, which MPNet does not do.
    wanted = {name: each for name, each in found.items() if not name.endswith(".position_ids")}
    found = {name: each for name, each in wanted.items() if ".pooler." not in f".{name}"}
    if len(found) < len(wanted):
        notes.append(f"{path}: the pooler was left aside; pretraining has no use for it")

    # What a network of this configuration has, asked of our own network and translated, so that
    # file and expectation are compared in the file's language: an error names what is in the file.
    expected = to_hugging_face(expected_tensors(config))
    encoder_only = not any(name.startswith(("mpnet.", "lm_head.")) for name in found)
    if encoder_only:
        # With the names of the other class from here on, and without asking for a head.
        found = {f"mpnet.{name}": tensor for name, tensor in found.items()}
        expected = {name: each for name, each in expected.items() if name.startswith("mpnet.")}
        notes.append(f"{path}: an encoder without LM head; the head starts from fresh weights")
    tensors = to_ours(check_tensors(_untied(found, str(path)), expected, str(path)))
    if encoder_only:
        tensors |= _fresh_head(tensors["sentence_encoder.embed_tokens.weight"])
    return config, tensors, notes


def read_safely(path: Path) -> object:
    """Read a file of `torch.save`, as far as it holds plain data; no code in it is run.

    Such a file is a pickle, which is a program for a small machine with one dangerous instruction:
    GLOBAL, "import this name", followed by "call it". `weights_only` runs the program on a machine
    of PyTorch's own that knows a short list of names, those of tensors, and stops at any other.
    Which one, it says in the text of its error, and we pass on.

    Raises:
        CheckpointError: it holds something else, or is damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    # Damaged bytes can make a pickle machine raise anything, so that no shorter list is right here.
    except Exception as error:
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign is None:
            raise CheckpointError(
                f"{path} cannot be read: {type(error).__name__} {repr(str(error))[:80]}; it is "
                "damaged, or no file of PyTorch's"
            ) from error
        raise CheckpointError(
            f"{path} holds {repr(foreign[1])[:80]}, which only a program could rebuild; nothing in "
            "it was run. If you trust it, save its plain tensors anew where it was made: "
            "torch.save({'args': vars(args), 'model': model.state_dict()}, 'plain.pt')"
        ) from error


def _download(name: str) -> Path:
    if HUB_NAME.fullmatch(name) is None:
        raise CheckpointError(f"{name!r} is no directory, and no name on the Hub; {WAY_OUT}")
    # Configuration, weights and whatever files a tokenizer may have; no code, no other framework's
    # copy of the weights.
    plain = ["*.json", "*.txt", "*.model", "*.safetensors"]
    try:
        path = Path(snapshot_download(name, allow_patterns=plain))
        # The less safe format only where there is no other: most repositories hold both, and the
        # same 438 MB need not come twice.
        if not any(path.rglob("*.safetensors")):
            snapshot_download(name, allow_patterns=["pytorch_model.bin", "*/pytorch_model.bin"])
    # What the network does wrong is an OSError there; a name against the Hub's rules a ValueError.
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{name!r} is no directory here, and the Hub does not give it: {type(error).__name__} "
            f"{' '.join(str(error).split())[:80]!r}; check name and connection, or give a directory"
        ) from error
    return path


def _transformer_of(directory: Path) -> Path:
    """Return where in a sentence-transformers directory the network is; others are returned.

    `modules.json` is a list of what a sentence passes through, each with the directory of its
    files. Today the network is at the top, formerly it was in a directory of its own:

        modules.json      [Transformer in "", Pooling in "1_Pooling", ...]     what is searched
        config.json       the network's, beside model.safetensors              what is returned: "."
        1_Pooling/        config.json, of the pooling: no network

    Only the Transformer is pretrained. Pooling, a mean over the tokens, has no weights.
    """
    if not (directory / "modules.json").is_file():
        old_layout = directory / "0_Transformer"
        return old_layout if (old_layout / "config.json").is_file() else directory
    modules = _read_json(directory / "modules.json")
    for module in modules if isinstance(modules, list) else []:
        if isinstance(module, dict) and str(module.get("type")).endswith("Transformer"):
            # A file from elsewhere names a path: it shall not lead out of its own directory.
            inner = directory / str(module.get("path", ""))
            if inner.resolve().is_relative_to(directory.resolve()):
                return inner
    raise CheckpointError(
        f"{directory / 'modules.json'} names no Transformer module inside of the directory; "
        f"{WAY_OUT}"
    )


def _read_json(path: Path) -> object:
    # RecursionError: "[" a hundred thousand times is legal JSON as far as it goes.
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError(f"more than {LARGEST_JSON} bytes")
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {type(error).__name__} {repr(str(error))[:80]}; {WAY_OUT}"
        ) from error


def _read_weights(directory: Path) -> tuple[Path, dict[str, Tensor]]:
    """Return the file that the weights are in, and the weights under the names that it has.

    safetensors first: eight bytes of length, a JSON header of names, shapes and offsets, then the
    numbers. There is nothing in it that could run.
    """
    path = directory / "model.safetensors"
    if path.is_file():
        try:
            return path, safetensors.torch.load_file(path, device="cpu")
        except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
            raise CheckpointError(
                f"{path} cannot be read: {type(error).__name__} {repr(str(error))[:80]}; it is "
                "damaged, or no safetensors file"
            ) from error
    # A pickle, and read as one that nobody trusts.
    path = directory / "pytorch_model.bin"
    if not path.is_file():
        raise CheckpointError(
            f"{directory} has neither model.safetensors nor pytorch_model.bin; {WAY_OUT}"
        )
    weights = read_safely(path)
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"{path} holds no named tensors; {WAY_OUT}")
    # What is no tensor is dropped here; if it should have been one, it is missing further on.
    return path, {str(name): each for name, each in weights.items() if isinstance(each, Tensor)}


def _untied(found: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Drop the second names of tied tensors, if they really are the same.

    Tied means: one tensor with two names, the token embeddings as the last matrix of the head. A
    file may hold either name or both, depending on the version that wrote it; the bias of the
    decoder may even be there under its second name alone. So the second name fills in for a missing
    first one (`setdefault`), and must equal one that is there. Where the two differ, one of them
    would have to be thrown away, and the logits would be another model's.

    >>> list(_untied({"lm_head.decoder.bias": torch.zeros(3)}, "an old file"))
    ['lm_head.bias']
    """
    kept = dict(found)
    # By value, not by identity: in a file, two names of one tensor are two copies of the numbers.
    for second, first in (
        ("lm_head.decoder.weight", "mpnet.embeddings.word_embeddings.weight"),
        ("lm_head.decoder.bias", "lm_head.bias"),
    ):
        tensor = kept.pop(second, None)
        if tensor is not None and not torch.equal(kept.setdefault(first, tensor), tensor):
            raise CheckpointError(
                f"{source}: {second} differs from {first}; MPNet's head shares them, so this is "
                "another kind of model"
            )
    return kept


def _fresh_head(table_VD: Tensor) -> dict[str, Tensor]:
    """Return a head for a trained encoder that has none: nothing in it is random.

    A new network's head would be drawn from N(0, 0.02), and is no head for a trained one. Its
    matrix would hide from the token embeddings what the encoder says, and its norm, of gain 1,
    would make logits as large as the embeddings are long: 2.3 in all-mpnet-base-v2, where a new
    network has 0.02 sqrt(768) = 0.55. The loss would begin at 19 bits, far above guessing evenly.

    So the hidden state passes as it is (the identity): in a network with tied embeddings it lies in
    their space, and has something of the token that fits. And the gain makes the logits as small as
    a new network's. Measured with all-mpnet-base-v2 on the demo's text, the encoder kept as it is,
    the bias set to the frequencies of the tokens (alone they give 9.1 bits), bits per token:

        matrix     gain   at first   after 40 updates at 5e-5   at 5e-4
        random     1.0     12.8      11.1                       9.1
        random     0.24     9.3       9.1                       8.4
        identity   1.0     12.1       9.8                       8.4
        identity   0.24     8.9       8.6                       8.1      <- this one

    Args:
        table_VD: (V, D), the token embeddings.

    >>> for name, tensor in _fresh_head(torch.ones(9, 4)).items():
    ...     print(name, tuple(tensor.shape), round(tensor.flatten()[0].item(), 3))
    lm_head.bias (9,) 0.0
    lm_head.dense.weight (4, 4) 1.0
    lm_head.dense.bias (4,) 0.0
    lm_head.layer_norm.weight (4,) 0.02
    lm_head.layer_norm.bias (4,) 0.0
    """
    vocab_size, embed_dim = table_VD.shape
    # What the norm gives out is sqrt(D) long, times the gain; a logit is its product with a row.
    # At most 1, the gain of a new network: embeddings as short as its own need no more.
    length = float(table_VD.norm(dim=1).mean())
    gain = min(1.0, 0.02 * embed_dim**0.5 / length) if length > 0 else 1.0
    return {
        "lm_head.bias": torch.zeros(vocab_size),
        "lm_head.dense.weight": torch.eye(embed_dim),
        "lm_head.dense.bias": torch.zeros(embed_dim),
        "lm_head.layer_norm.weight": torch.full((embed_dim,), gain),
        "lm_head.layer_norm.bias": torch.zeros(embed_dim),
    }
