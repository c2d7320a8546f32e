"""Which tokens are predicted, in which order, and what stands in for them.

**The problem.** Of each row 15 % of the tokens are predicted (section 3.1 of the paper), whole
words at a time, in a random order. A mask stands in for 80 % of them, a random token for 10 %, and
10 % stand in for themselves. As a loop over tokens in Python this is too slow to feed a GPU:
annotated-mpnet has a Cython module for it. Here it is one sort.

**Choosing.** Permute the *words* of the row and predict the last P tokens of what comes out. Each
word gets one random key, each token takes the key of its word, and a stable sort of the tokens by
key is the permuted sentence: words in random order, each in one piece. Specials get the key -1 and
come first, where nothing is ever predicted. Where the last P tokens begin, at most one word is cut.
Take nine tokens, `un ##bel ##ie ##va ##bly` being one word:

>>> row = "<s> an un ##bel ##ie ##va ##bly tall </s>".split()
>>> predictable_BL = np.array([[token not in ("<s>", "</s>") for token in row]])
>>> starts_BL = np.array([[not token.startswith("##") for token in row]])
>>> word_BL = number_words(starts_BL, predictable_BL)
>>> word_BL  # word 0 is "an", 1 "unbelievably", 2 "tall"
array([[-1,  0,  1,  1,  1,  1,  1,  2, -1]])

Let the words' keys be 0.3, 0.9 and 0.5. The permuted sentence is `<s> </s> an tall un ##bel ##ie
##va ##bly`. With P = 3 its last three tokens are predicted, and "un ##bel" stays to be seen: this
is the one word that is cut. Then the three are shuffled among themselves, here by the keys 0.8, 0.2
and 0.6, since otherwise the pieces of a word would always be predicted from left to right:

>>> draws_UBL = np.zeros((4, 1, 9))
>>> draws_UBL[WORD_KEY, 0, :3] = [0.3, 0.9, 0.5]
>>> draws_UBL[ORDER_KEY, 0, 4:7] = [0.8, 0.2, 0.6]
>>> positions_BP = choose_predicted(word_BL, np.array([3]), draws_UBL)
>>> positions_BP, [row[position] for position in positions_BP[0]]
(array([[5, 6, 4]]), ['##va', '##bly', '##ie'])

**Each row its own 15 %.** P is counted row by row: a row that predicts fewer than the others of its
batch has empty slots at the end, position -1. annotated-mpnet takes P from the shortest row of the
batch for all of them, so that over documents of mixed length only 2 to 4 % are predicted.

>>> count_predicted(np.array([6, 510, 1, 0]), pred_prob=0.15)
array([ 1, 76,  1,  0])

**Corruption.** One number decides for each predicted token: below 0.1 a random token, below 0.2 the
token itself, otherwise a mask:

>>> draws_UBP = np.array([[[0.0] * 3], [[0.0] * 3], [[0.05, 0.15, 0.2]], [[0.5, 0.0, 0.0]]])
>>> corrupt(np.array([[50, 51, 52]]), draws_UBP, mask_id=99, random_ids=np.arange(10, 20),
...         rand_prob=0.1, keep_prob=0.1)
array([[15, 51, 99]])

Paper: as BERT. The stand-in is what the model reads in place of the
token, both in the masked sentence and as its query.

**Random numbers.** Each token of a row has four: `fold_in(seed, "mask", epoch, row)` gives a table
of 4 x length. So the masking of a row depends on nothing but its place in the run: not on its
neighbours in the batch, on padding, on workers, on how far the run was resumed. Drawing
them is about half of the collator's time, which altogether is no matter: `benchmarks/collate.py`
measures 6 to 10 million tokens a second on one core.

fairseq: the same thought, `numpy_seed(seed, epoch, index)`, but around numpy's global generator,
and one sample at a time.

Next: `collator.py`, which makes a batch of it.

    B batch   L tokens of a row   P predicted tokens (of the row that predicts most)
    U the four random numbers of a token: WORD_KEY, ORDER_KEY, KIND, REPLACEMENT
"""

import numpy as np
import numpy.typing as npt

from annotated_mpnet.randomness import fold_in

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

WORD_KEY, ORDER_KEY, KIND, REPLACEMENT = range(4)
"""What each of a token's random numbers is for. The first belongs to word number i of the row, not
to token i."""


def draw(seed: int, stream: str, epoch: int, index: int, length: int) -> Floats:
    """Return the random numbers of a row, (4, length), in [0, 1).

    Args:
        seed: the run's.
        stream: what the rows are for, so that training and evaluation never share their masks.
        epoch: which time the row is seen.
        index: which row of the text it is.
        length: its tokens, specials included.
    """
    return fold_in(seed, stream, epoch, index).random((4, length))


def count_predicted(predictable_B: Ints, pred_prob: float) -> Ints:
    """Return how many tokens each row predicts, (B,).

    The rounded share of its predictable tokens; at least one where there is one to predict.
    """
    share_B = np.rint(pred_prob * predictable_B).astype(np.int64)
    count_B: Ints = np.minimum(np.maximum(share_B, 1), predictable_B)
    return count_B


def number_words(starts_BL: Bools, predictable_BL: Bools) -> Ints:
    """Return which word of its row each token belongs to, (B, L) from 0; -1 if not predictable.

    Args:
        starts_BL: the token begins a word.
        predictable_BL: the token may be predicted: it is neither special nor padding.
    """
    # After a special token a word begins in any case: a row may be cut out of the middle of one.
    first_BL = predictable_BL.copy()
    first_BL[:, 1:] &= ~predictable_BL[:, :-1]
    word_BL = np.cumsum((starts_BL & predictable_BL) | first_BL, axis=1) - 1
    numbered_BL: Ints = np.where(predictable_BL, word_BL, -1)
    return numbered_BL


def choose_predicted(word_BL: Ints, count_B: Ints, draws_UBL: Floats) -> Ints:
    """Return the positions that are predicted, in the order of their prediction.

    Args:
        word_BL: from `number_words`.
        count_B: from `count_predicted`.
        draws_UBL: from `draw`, one row each.

    Returns:
        (B, P) with P the largest count; -1 in the slots that a row does not need, which come last.
    """
    length = word_BL.shape[1]
    slots = int(count_B.max(initial=0))
    # In the permuted sentence the tokens of a word stay together, even if two words happened to
    # draw the same key: the sort is stable.
    key_BL = np.take_along_axis(draws_UBL[WORD_KEY], np.maximum(word_BL, 0), axis=1)
    key_BL[word_BL < 0] = -1.0
    last_BP = np.argsort(key_BL, axis=1, kind="stable")[:, length - slots :]
    # A row that needs fewer slots owns only the last of these columns.
    surplus_BP = np.arange(slots) < slots - count_B[:, None]
    order_BP = np.take_along_axis(draws_UBL[ORDER_KEY], last_BP, axis=1)
    order_BP[surplus_BP] = 2.0
    shuffled_BP = np.argsort(order_BP, axis=1, kind="stable")
    positions_BP = np.take_along_axis(last_BP, shuffled_BP, axis=1)
    positions_BP[np.arange(slots) >= count_B[:, None]] = -1
    return positions_BP


def corrupt(
    original_BP: Ints,
    draws_UBP: Floats,
    *,
    mask_id: int,
    random_ids: Ints,
    rand_prob: float,
    keep_prob: float,
) -> Ints:
    """Return the stand-ins of predicted tokens, (B, P).

    Args:
        original_BP: the tokens.
        draws_UBP: their random numbers.
        mask_id: the stand-in of most.
        random_ids: what a random stand-in is drawn from.
        rand_prob: share of random stand-ins.
        keep_prob: share of tokens that stand in for themselves.
    """
    kind_BP = draws_UBP[KIND]
    random_BP = random_ids[(draws_UBP[REPLACEMENT] * len(random_ids)).astype(np.int64)]
    visible_BP = np.where(kind_BP < rand_prob, random_BP, original_BP)
    stand_in_BP: Ints = np.where(kind_BP < rand_prob + keep_prob, visible_BP, mask_id)
    return stand_in_BP
