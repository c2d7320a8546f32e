"""Do these weights and this tokenizer belong together?

Weights know tokens as numbers. Row 2000 of the embedding is whatever the tokenizer that they were
trained with calls 2000, and nothing in the table says what that was. Two tokenizers of 30,527
tokens each fit the same table: if they number them in another order, "the" has become "##ing", no
shape is wrong, and the loss merely starts high. It would look like slow learning.

Sizes are compared first, because that is always possible:

    weights' rows   tokenizer's tokens
    30527           30527                fits, as far as that goes
    30592           30527                fits: 65 rows of padding, for the sake of matrix kernels
    30527           30522                refused: MPNet's and BERT's; "the" is 2000 and 1996
    30522           30527                refused: five tokens would have no row

Where the weights bring their tokenizer, which all but `.pt` files do, three questions more, from
the plain to the subtle:

1. Has every token the same id in both?
2. Do the same ids serve as begin, padding, end and mask? Packing puts them around every row.
3. Do some difficult texts become the same tokens? (`proof.PROBE_TEXTS`) A tokenizer that does not
   lower-case may have the same vocabulary; it would spell "The" by its letters, or not at all.

Hashes of the two files would be simpler, and would refuse too much. transformers writes the same
tokenizer in several ways, depending on its version: a `<mask>` that swallows the space before it, a
post-processor that packing does not use, truncation. None of that matters to weights.

HF: `from_pretrained` loads model and tokenizer without comparing them; a training script that finds
another number of tokens usually calls `resize_token_embeddings`, which keeps all rows in their
place, whoever they belong to.

Next: `runs/initial_weights.py`, which asks.
"""

from pathlib import Path

from transformers import PreTrainedTokenizerFast

from annotated_mpnet.conversion.export import stands_for_no_token
from annotated_mpnet.conversion.proof import PROBE_TEXTS
from annotated_mpnet.conversion.recognise import LoadedWeights
from annotated_mpnet.errors import CheckpointError, ConfigError
from annotated_mpnet.text.tokenizer import load_tokenizer, vocabulary_of


def check_vocabulary(
    loaded: LoadedWeights, source: str, tokenizer: PreTrainedTokenizerFast, tokenizer_name: str
) -> list[str]:
    """Refuse weights over another vocabulary than a tokenizer's; say what could not be compared.

    Args:
        loaded: the weights.
        source: where they were read, for the messages.
        tokenizer: the run's, from `load_tokenizer`.
        tokenizer_name: what `--tokenizer-name` says.

    Returns:
        Notes for the user: none, if everything was compared.

    Raises:
        CheckpointError: they do not belong together; with the tokenizer to give instead, if the
            weights came with one.
    """
    own = _tokenizer_beside(loaded)
    problem = _difference_to_weights(loaded, tokenizer)
    if problem is None and own is not None:
        problem = _difference(tokenizer, own)
    if problem is not None:
        way_out = f"--tokenizer-name {loaded.tokenizer}" if own is not None else "its own tokenizer"
        raise CheckpointError(
            f"the weights of {source} and --tokenizer-name {tokenizer_name} do not belong "
            f"together: {problem}; their ids would mean other words: give {way_out}"
        )
    # A file of annotated-mpnet's holds the name of its tokenizer at least: the same name is as good
    # as the same files.
    if own is not None or loaded.tokenizer == tokenizer_name:
        return []
    named = "" if loaded.tokenizer is None else f" but a name, {repr(loaded.tokenizer)[:80]}"
    return [
        f"{source} brings no tokenizer{named}: whether {tokenizer_name} gives each token the same "
        "id cannot be checked"
    ]


def _tokenizer_beside(loaded: LoadedWeights) -> PreTrainedTokenizerFast | None:
    """Return the tokenizer that came with the weights, if it lies on this machine and is whole.

    A name in a file is not looked up: it would be a question to a server that nobody asked for. And
    one that cannot be loaded is no reason to refuse the weights, which need only agree with the
    run's.
    """
    if loaded.tokenizer is None or not Path(loaded.tokenizer).is_dir():
        return None
    try:
        return load_tokenizer(loaded.tokenizer)
    except ConfigError:
        return None


def _difference_to_weights(loaded: LoadedWeights, tokenizer: PreTrainedTokenizerFast) -> str | None:
    """Compare the two numbers that a network has of its tokenizer, size and padding id.

    They are all that there is where the weights came alone; and where a tokenizer lies beside them,
    it may be the wrong one there, too.
    """
    vocabulary = vocabulary_of(tokenizer)
    rows, padding = loaded.config.vocab_size, loaded.config.pad_token_id
    if rows != vocabulary.size and not stands_for_no_token(rows, vocabulary.size):
        return f"the weights have {rows} tokens, the tokenizer {vocabulary.size}"
    # Positions are counted from behind it: another padding id is another row for every position.
    if padding != vocabulary.pad_id:
        return f"padding has the id {padding} in the weights, {vocabulary.pad_id} in the tokenizer"
    return None


def _difference(ours: PreTrainedTokenizerFast, theirs: PreTrainedTokenizerFast) -> str | None:
    """Say in what two tokenizers differ, as far as it matters to weights; None if in nothing.

    >>> from tokenizers import Tokenizer, models
    >>> special = {"cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>"}
    >>> special |= {"unk_token": "<unk>", "mask_token": "<mask>"}
    >>> def numbering(*words: str) -> PreTrainedTokenizerFast:
    ...     ids = {word: i for i, word in enumerate([*special.values(), *words])}
    ...     words = Tokenizer(models.WordLevel(ids, "<unk>"))
    ...     return PreTrainedTokenizerFast(tokenizer_object=words, **special)
    >>> _difference(numbering("a", "the", "of"), numbering("a", "of", "the"))
    "2 of 8 tokens have another id, among them 'of': 6 in the weights, 7 in the tokenizer"
    >>> _difference(numbering("a", "of"), numbering("a", "of")) is None
    True
    """
    our_ids, their_ids = ours.get_vocab(), theirs.get_vocab()
    moved = [token for token, each in their_ids.items() if our_ids.get(token) != each]
    if moved:
        # One example, the first by number: two dictionaries list them in an order of their own.
        token = min(moved, key=their_ids.__getitem__)
        return (
            f"{len(moved)} of {len(their_ids)} tokens have another id, among them "
            f"{repr(token)[:80]}: {their_ids[token]} in the weights, {our_ids.get(token)} in the "
            "tokenizer"
        )
    # Not the unknown token: MPNet's vocabulary has two, and files do not agree on which is meant.
    our_special, their_special = (
        [each.cls_id, each.pad_id, each.sep_id, each.mask_id]
        for each in (vocabulary_of(ours), vocabulary_of(theirs))
    )
    if our_special != their_special:
        return (
            f"begin, padding, end and mask have the ids {their_special} in the weights, "
            f"{our_special} in the tokenizer"
        )
    # Without special tokens around the text: packing sets its own.
    for probe in PROBE_TEXTS:
        our_tokens, their_tokens = (
            each.backend_tokenizer.encode(probe, add_special_tokens=False).ids
            for each in (ours, theirs)
        )
        if our_tokens != their_tokens:
            return f"they cut the text {probe!r} into other tokens"
    return None
