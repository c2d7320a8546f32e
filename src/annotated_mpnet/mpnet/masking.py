"""Which tokens are predicted, in which order, and what the model reads in their place.

Section 3.1 of the paper: 15 % of the tokens of a sequence are predicted, whole words at a time, in
a random order. The model reads a mask in place of 80 % of them, a random token in place of 10 %,
and 10 % stay as they are. A Python loop over tokens could not feed a GPU; here it is one sort.

**Choosing.** Permute the *words* of a sequence and predict the last P tokens of the result. Every
token takes the random key of its word's first token, and a stable sort by key is the permuted
sentence: words in random order, each in one piece. Special tokens get the key -1 and come first.
In this sentence, `un ##bel ##ie ##va ##bly` is one word:

>>> sentence = "<s> an un ##bel ##ie ##va ##bly tall </s>".split()
>>> predictable_BL = np.array([[token not in ("<s>", "</s>") for token in sentence]])
>>> starts_BL = np.array([[not token.startswith("##") for token in sentence]])
>>> word_BL = find_words(starts_BL, predictable_BL)
>>> word_BL  # "an" begins at position 1, "unbelievably" at 2, "tall" at 7
array([[-1,  1,  2,  2,  2,  2,  2,  7, -1]])

Let the words' keys be 0.3, 0.9 and 0.5: the long word comes last. With P = 3 it is cut, as at most
one word is, where the last P tokens begin. Were its tokens in their natural order, the beginning of
a long word would never be predicted, and in a text without spaces that is nearly everything. So
each word is shuffled first, here by the keys 0.1, 0.7, 0.2, 0.5 and 0.9, which gives `un ##ie ##va
##bel ##bly`: the last three are predicted. Then these are shuffled among themselves, here by the
keys 0.8, 0.2 and 0.6 of `##bel ##va ##bly`: the order in which they are predicted.

>>> draws_UBL = np.zeros((5, 1, 9))
>>> draws_UBL[WORD_KEY, 0, [1, 2, 7]] = [0.3, 0.9, 0.5]
>>> draws_UBL[CUT_KEY, 0, 2:7] = [0.1, 0.7, 0.2, 0.5, 0.9]
>>> draws_UBL[ORDER_KEY, 0, [3, 5, 6]] = [0.8, 0.2, 0.6]
>>> document_BL = np.ones((1, 9), dtype=np.int64)
>>> positions_BP = choose_predicted(word_BL, document_BL, np.array([[0, 3]]), draws_UBL)
>>> positions_BP, [sentence[position] for position in positions_BP[0]]
(array([[5, 6, 3]]), ['##va', '##bly', '##bel'])

**Documents.** Documents may share a sequence without seeing each other. Each is then masked as if
it were alone: counted, permuted and shuffled by itself. This takes no loop either, only a sort by
document before the sort by key. Documents are numbered from 1; 0 is padding.

Next: `mpnet/collator.py`, which makes batches with this.

    N documents of a sequence, and the padding as document 0
    U the five random numbers of a token: WORD_KEY, ORDER_KEY, KIND, REPLACEMENT, CUT_KEY
"""

import numpy as np
import numpy.typing as npt

from annotated_mpnet.mpnet.randomness import fold_in

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

WORD_KEY, ORDER_KEY, KIND, REPLACEMENT, CUT_KEY = range(5)
"""What a token's random numbers are for. Only the first token of a word uses its WORD_KEY."""


def draw(seed: int, stream: str, epoch: int, index: int, length: int, document: int = 1) -> Floats:
    """Return the random numbers of one document, (U, length), in [0, 1).

    They depend on the position in the run and on nothing else: not on the other sequences of the
    batch, on padding, on the number of workers or on a resume. fairseq: MPNet's collater draws from
    global generators, so another number of workers gives other masks.

    Args:
        seed: of the run.
        stream: "mask" for training; evaluation has another, and so its own masks.
        epoch: how often the sequence was seen before.
        index: of the sequence in the text.
        length: of the document, with its special tokens.
        document: its number in the sequence. The first one uses the numbers of the sequence, so a
            document alone in its sequence is masked alike with every `--packing`.
    """
    position = (epoch, index) if document == 1 else (epoch, index, document)
    return fold_in(seed, stream, *position).random((5, length))


def count_predicted(predictable: Ints, pred_prob: float) -> Ints:
    """Return how many tokens each document predicts: its share, but at least one if it can.

    >>> count_predicted(np.array([6, 510, 1, 0]), pred_prob=0.15)
    array([ 1, 76,  1,  0])

    fairseq: 15 % of the padded length of the batch, special tokens and padding included: 77 of 512.
    annotated-mpnet: 15 % of the shortest sequence, for all: about 2 % of text of mixed length.
    """
    share = np.rint(pred_prob * predictable).astype(np.int64)
    return np.clip(share, np.minimum(predictable, 1), predictable)


def count_in_documents(flags_BL: Bools, document_BL: Ints) -> Ints:
    """Return how many flags are set in each document, (B, N)."""
    batch, documents = len(document_BL), int(document_BL.max(initial=0)) + 1
    # One count for the whole batch, in which no two sequences have the same numbers.
    distinct_BL = document_BL + documents * np.arange(batch)[:, None]
    count = np.bincount(distinct_BL[flags_BL], minlength=batch * documents)
    return count.reshape(batch, documents)


def find_words(starts_BL: Bools, predictable_BL: Bools) -> Ints:
    """Return where the word of each token begins, (B, L); -1 if the token is not predictable.

    Args:
        starts_BL: the token begins a word.
        predictable_BL: the token is neither special nor padding.
    """
    # After a special token a word begins in any case: a sequence may start inside a word.
    begins_BL = starts_BL.copy()
    begins_BL[:, 0] = True
    begins_BL[:, 1:] |= ~predictable_BL[:, :-1]
    position_BL = np.where(begins_BL, np.arange(begins_BL.shape[1]), 0)
    return np.where(predictable_BL, np.maximum.accumulate(position_BL, axis=1), -1)


def choose_predicted(word_BL: Ints, document_BL: Ints, count_BN: Ints, draws_UBL: Floats) -> Ints:
    """Return the predicted positions, document after document, each in its order of prediction.

    Two documents in one sequence, `<s> a b </s> <s> c d </s>`, which predict a token each:

    >>> document_BL = np.array([[1, 1, 1, 1, 2, 2, 2, 2]])
    >>> word_BL = np.array([[-1, 1, 2, -1, -1, 5, 6, -1]])
    >>> draws_UBL = np.zeros((5, 1, 8))
    >>> draws_UBL[WORD_KEY, 0] = [0, 0.9, 0.1, 0, 0, 0.2, 0.3, 0]
    >>> choose_predicted(word_BL, document_BL, np.array([[0, 1, 1]]), draws_UBL)
    array([[1, 6]])

    Args:
        word_BL: from `find_words`.
        document_BL: the number of each token's document; 0 for padding.
        count_BN: how many tokens each document predicts, from `count_predicted`; 0 for padding.
        draws_UBL: from `draw`.

    Returns:
        (B, P), with P the most that a sequence predicts. Empty slots are -1 and come last.
    """
    key_BL = np.take_along_axis(draws_UBL[WORD_KEY], np.maximum(word_BL, 0), axis=1)
    key_BL[word_BL < 0] = -1.0
    # The tokens of a word have the same key, so a stable sort leaves them in the order in which it
    # finds them: a random one. Keys lie in [-1, 1), so adding twice the document's number keeps
    # documents apart.
    random_BL = np.argsort(draws_UBL[CUT_KEY], axis=1)
    key_BL = np.take_along_axis(key_BL + 2 * document_BL, random_BL, axis=1)
    sorted_BL = np.argsort(key_BL, axis=1, kind="stable")
    permuted_BL = np.take_along_axis(random_BL, sorted_BL, axis=1)

    # The last tokens of each document are predicted.
    length_BN = count_in_documents(np.ones(document_BL.shape, dtype=np.bool_), document_BL)
    begin_BN = np.cumsum(length_BN, axis=1) - count_BN
    permuted_document_BL = np.take_along_axis(document_BL, permuted_BL, axis=1)
    begin_BL = np.take_along_axis(begin_BN, permuted_document_BL, axis=1)
    is_predicted_BL = np.arange(word_BL.shape[1]) >= begin_BL

    # Move them to the left, then shuffle those of each document among themselves.
    count_B = count_BN.sum(axis=1)
    is_used_BP = np.arange(count_B.max(initial=0)) < count_B[:, None]
    chosen_BP = np.zeros(is_used_BP.shape, dtype=np.int64)
    chosen_BP[is_used_BP] = permuted_BL[is_predicted_BL]
    order_BP = np.take_along_axis(draws_UBL[ORDER_KEY] + 2 * document_BL, chosen_BP, axis=1)
    order_BP[~is_used_BP] = np.inf
    shuffled_BP = np.take_along_axis(chosen_BP, np.argsort(order_BP, axis=1, kind="stable"), axis=1)
    return np.where(is_used_BP, shuffled_BP, -1)


def corrupt(
    original_BP: Ints,
    draws_UBP: Floats,
    *,
    mask_id: int,
    random_ids: Ints,
    rand_prob: float,
    keep_prob: float,
) -> Ints:
    """Return what the model reads at the predicted positions, (B, P): 80/10/10, as in BERT.

    One random number decides. Below `rand_prob` the token becomes a random one of `random_ids`, in
    the next `keep_prob` it stays, otherwise it becomes a mask:

    >>> draws_UBP = np.zeros((5, 1, 3))
    >>> draws_UBP[[KIND, REPLACEMENT], 0] = [0.05, 0.15, 0.2], [0.5, 0.0, 0.0]
    >>> corrupt(np.array([[50, 51, 52]]), draws_UBP, mask_id=99, random_ids=np.arange(10, 20),
    ...         rand_prob=0.1, keep_prob=0.1)
    array([[15, 51, 99]])
    """
    kind_BP = draws_UBP[KIND]
    random_BP = random_ids[(draws_UBP[REPLACEMENT] * len(random_ids)).astype(np.int64)]
    visible_BP = np.where(kind_BP < rand_prob, random_BP, original_BP)
    return np.where(kind_BP < rand_prob + keep_prob, visible_BP, mask_id)
