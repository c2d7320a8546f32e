"""Do these weights and this tokenizer belong together?

Row 2000 of the embedding is whatever the original tokenizer calls 2000. Two tokenizers of 30,527
tokens fit the same table; if they number them differently, "the" has become "##ing", no shape is
wrong, and it looks like slow learning. Sizes are compared first, because that is always possible:

    weights' rows   tokenizer's tokens
    30527           30527                fits, as far as that goes
    30592           30527                fits: 65 rows of padding, for matrix kernels
    30527           30522                refused: MPNet's and BERT's; "the" is 2000 and 1996
    30522           30527                refused: five tokens would have no row

Where the weights bring their tokenizer, three more questions: does every token have the same id in
both; do the same ids serve as begin, padding, end and mask; do some difficult texts become the same
tokens? Hashes of the files would refuse too much: transformers writes the same tokenizer in several
ways, depending on its version.
"""

import os

from transformers import PreTrainedTokenizerFast

from annotated_mpnet.conversion.foreign import LoadedWeights
from annotated_mpnet.errors import CheckpointError, UserError, shown
from annotated_mpnet.files.records import reading
from annotated_mpnet.mpnet.collator import Vocabulary
from annotated_mpnet.mpnet.config import ModelConfig
from annotated_mpnet.text.tokenizer import load_tokenizer, vocabulary_of

LARGEST_PADDING = 128
"""Rows. Vocabularies are padded to a multiple of 8, 64 or 128 for matrix kernels. More rows without
a token than that mean another tokenizer."""
# Case, punctuation, a contraction, accents, an eszett, digits, another script, an emoji, a tab, and
# an empty text. The mask, which must stay one token, is added below.
PROBE_TEXTS = (
    "MPNet sees each position once: as a token, or as a mask.",
    "Don't PANIC -- it's only naïve Straße №5, 東京 and 🙂\tin one line.",
    "",
)


def check_vocabulary(
    loaded: LoadedWeights, source: str, tokenizer: PreTrainedTokenizerFast, tokenizer_name: str
) -> list[str]:
    """Refuse weights that belong to another vocabulary; return a note if that cannot be checked.

    Args:
        loaded: the weights.
        source: where they came from, for the messages.
        tokenizer: the run's.
        tokenizer_name: the value of `--tokenizer-name`.

    Raises:
        CheckpointError: they do not belong together; names the tokenizer to use instead.
    """
    own = _tokenizer_beside(loaded)
    problem = difference_to_weights(loaded.config, vocabulary_of(tokenizer))
    if problem is None and own is not None:
        with reading(f"the tokenizer of {source}"):
            problem = tokenizer_difference(tokenizer, own)
    if problem is not None:
        way_out = f"--tokenizer-name {loaded.tokenizer}" if own is not None else "its own tokenizer"
        raise CheckpointError(
            f"the weights of {source} and --tokenizer-name {tokenizer_name} do not belong "
            f"together: {problem}; their ids would mean other words: give {way_out}"
        )
    # A .pt file of annotated-mpnet holds at least the tokenizer's name.
    if own is not None or loaded.tokenizer == tokenizer_name:
        return []
    named = "" if loaded.tokenizer is None else f" but a name, {shown(loaded.tokenizer)}"
    return [
        f"{source} brings no tokenizer{named}: cannot check that {tokenizer_name} gives each token "
        "the same id"
    ]


def _tokenizer_beside(loaded: LoadedWeights) -> PreTrainedTokenizerFast | None:
    """Return the tokenizer that came with the weights, if it is on this machine and can be read."""
    if loaded.tokenizer is None or not os.path.isdir(loaded.tokenizer):
        return None
    try:
        with reading("the tokenizer"):
            return load_tokenizer(loaded.tokenizer)
    except UserError:
        return None


def difference_to_weights(config: ModelConfig, vocabulary: Vocabulary) -> str | None:
    """Compare the two numbers that a network knows of its tokenizer: size and padding id.

    A padded table has a round number of rows, and only a few too many. 30,527 rows are not BERT's
    30,522 and five more: the five came first and moved all the others.
    """
    rows, size = config.vocab_size, vocabulary.size
    padded = size < rows < size + LARGEST_PADDING and rows % 8 == 0
    if rows != size and not padded:
        return f"the weights have {rows} tokens, the tokenizer {size}"
    # Positions start after the padding id: another one is another row for every position.
    if config.pad_token_id != vocabulary.pad_id:
        return (
            f"padding has the id {config.pad_token_id} in the weights, {vocabulary.pad_id} in the "
            "tokenizer"
        )
    return None


def tokenizer_difference(
    ours: PreTrainedTokenizerFast, theirs: PreTrainedTokenizerFast, *, special: bool = False
) -> str | None:
    """Say how two tokenizers differ for the tokens of the second; None if they do not.

    Args:
        ours: without truncation and padding; it may have more tokens.
        theirs: the same.
        special: compare also what they add before and after a text; packing adds its own.

    >>> from tokenizers import Tokenizer, models
    >>> special = {"cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>"}
    >>> special |= {"unk_token": "<unk>", "mask_token": "<mask>"}
    >>> def numbering(*words: str) -> PreTrainedTokenizerFast:
    ...     ids = {word: i for i, word in enumerate([*special.values(), *words])}
    ...     words = Tokenizer(models.WordLevel(ids, "<unk>"))
    ...     return PreTrainedTokenizerFast(tokenizer_object=words, **special)
    >>> tokenizer_difference(numbering("a", "the", "of"), numbering("a", "of", "the"))
    "2 of 8 tokens have another id, among them 'of': 6 in one, 7 in the other"
    >>> tokenizer_difference(numbering("a", "of"), numbering("a", "of")) is None
    True
    """
    our_ids, their_ids = ours.get_vocab(), theirs.get_vocab()
    moved = [token for token, each in their_ids.items() if our_ids.get(token) != each]
    if moved:
        token = min(moved, key=their_ids.__getitem__)
        return (
            f"{len(moved)} of {len(their_ids)} tokens have another id, among them "
            f"{shown(token)}: {their_ids[token]} in one, {our_ids.get(token)} in the other"
        )
    # Not the unknown token: MPNet's vocabulary has two, and files disagree on which is meant.
    our_special, their_special = (
        [each.cls_id, each.pad_id, each.sep_id, each.mask_id]
        for each in (vocabulary_of(ours), vocabulary_of(theirs))
    )
    if our_special != their_special:
        return (
            f"begin, padding, end and mask have the ids {their_special} in one, {our_special} in "
            "the other"
        )
    for probe in (*PROBE_TEXTS, f"a {ours.mask_token} b"):
        our_tokens, their_tokens = (
            each.backend_tokenizer.encode(probe, add_special_tokens=special).ids
            for each in (ours, theirs)
        )
        if our_tokens != their_tokens:
            return f"they cut the text {probe!r} into other tokens"
    return None
