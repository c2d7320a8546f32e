"""Which tokens are predicted, in which order, and what stands in for them.

**The problem.** Of each row 15 % of the tokens are predicted (section 3.1 of the paper), whole
words at a time, in a random order. A mask stands in for 80 % of them, a random token for 10 %, and
10 % stand in for themselves. As a loop over tokens in Python this is too slow to feed a GPU:
annotated-mpnet has a Cython module for it. Here it is one sort.

**Choosing.** Permute the *words* of the row and predict the last P tokens of what comes out. Each
word takes the random key of its first token, each token the key of its word, and a stable sort of
the tokens by key is the permuted sentence: words in random order, each in one piece. Specials get
the key -1 and come first, where nothing is ever predicted. Where the last P tokens begin, at most
one word is cut. Take nine tokens, `un ##bel ##ie ##va ##bly` being one word:

>>> row = "<s> an un ##bel ##ie ##va ##bly tall </s>".split()
>>> predictable_BL = np.array([[token not in ("<s>", "</s>") for token in row]])
>>> starts_BL = np.array([[not token.startswith("##") for token in row]])
>>> word_BL = find_words(starts_BL, predictable_BL)
>>> word_BL  # "an" begins at position 1, "unbelievably" at 2, "tall" at 7
array([[-1,  1,  2,  2,  2,  2,  2,  7, -1]])

Let the words' keys be 0.3, 0.9 and 0.5. The permuted sentence is `<s> </s> an tall un ##bel ##ie
##va ##bly`. With P = 3 its last three tokens are predicted, and "un ##bel" stays to be seen: this
is the one word that is cut. Then the three are shuffled among themselves, here by the keys 0.8, 0.2
and 0.6, since otherwise the pieces of a word would always be predicted from left to right:

>>> draws_UBL = np.zeros((4, 1, 9))
>>> draws_UBL[WORD_KEY, 0, [1, 2, 7]] = [0.3, 0.9, 0.5]
>>> draws_UBL[ORDER_KEY, 0, 4:7] = [0.8, 0.2, 0.6]
>>> document_BL = np.ones((1, 9), dtype=np.int64)
>>> positions_BP = choose_predicted(word_BL, document_BL, np.array([[0, 3]]), draws_UBL)
>>> positions_BP, [row[position] for position in positions_BP[0]]
(array([[5, 6, 4]]), ['##va', '##bly', '##ie'])

**Each document its own 15 %.** P is counted row by row: a row that predicts fewer than the others
of its batch has empty slots at the end, position -1. annotated-mpnet takes P from the shortest row
of the batch for all of them, so that over documents of mixed length only 2 to 4 % are predicted.
fairseq: all rows predict 15 % of the padded length of the batch, specials and padding included: 77
of 512. Both count as words, so that `<s>`, `</s>` and padding can be predicted too.

>>> count_predicted(np.array([6, 510, 1, 0]), pred_prob=0.15)
array([ 1, 76,  1,  0])

Where documents share a row without seeing each other (`row_cutting.py`), each is masked as if it
stood alone: counted, permuted and shuffled by itself. The only thing that it takes is to sort by
document first. Documents are numbered from 1, padding is 0, in which nothing is predicted. In a row
of two, `<s> a b </s> <s> c d </s>`, with a token of each:

>>> document_BL = np.array([[1, 1, 1, 1, 2, 2, 2, 2]])
>>> word_BL = np.array([[-1, 1, 2, -1, -1, 5, 6, -1]])
>>> draws_UBL = np.zeros((4, 1, 8))
>>> draws_UBL[WORD_KEY, 0] = [0, 0.9, 0.1, 0, 0, 0.2, 0.3, 0]
>>> choose_predicted(word_BL, document_BL, np.array([[0, 1, 1]]), draws_UBL)
array([[1, 6]])

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
neighbours in the batch, on padding, on workers, on how far the run was resumed. A document that
shares a row has its own, `fold_in(seed, "mask", epoch, row, number)`; but for the first, whose are
those of the row, so that a document alone in its row is masked alike in all modes. Drawing them is
about half of the collator's time, which altogether is no matter: `benchmarks/data.py` measures 6
to 10 million tokens a second on one core.

fairseq: MPNet's collater draws from the global generators of numpy and PyTorch, which know nothing
of the row: another number of workers, or a resume within an epoch, gives other masks.

Next: `collator.py`, which makes a batch of it.

    B batch   L tokens of a row   P predicted tokens (of the row that predicts most)
    N documents of a row (of the row that has most) and the padding, which is number 0
    U the four random numbers of a token: WORD_KEY, ORDER_KEY, KIND, REPLACEMENT
"""

import numpy as np
import numpy.typing as npt

from annotated_mpnet.randomness import fold_in

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

WORD_KEY, ORDER_KEY, KIND, REPLACEMENT = range(4)
"""What each of a token's random numbers is for. The first is looked at where a word begins."""


def draw(seed: int, stream: str, epoch: int, index: int, length: int, document: int = 1) -> Floats:
    """Return the random numbers of a document in a row, (4, length), in [0, 1).

    Args:
        seed: the run's.
        stream: what the rows are for, so that training and evaluation never share their masks.
        epoch: which time the row is seen.
        index: which row of the text it is.
        length: the document's tokens, specials included.
        document: its number in the row, from 1.
    """
    position = (epoch, index) if document == 1 else (epoch, index, document)
    return fold_in(seed, stream, *position).random((4, length))


def count_predicted(predictable: Ints, pred_prob: float) -> Ints:
    """Return how many tokens are predicted in each document, given how many are predictable.

    The rounded share of its predictable tokens; at least one where there is one to predict.
    """
    share = np.rint(pred_prob * predictable).astype(np.int64)
    count: Ints = np.minimum(np.maximum(share, 1), predictable)
    return count


def count_in_documents(flags_BL: Bools, document_BL: Ints) -> Ints:
    """Return how many flags are set in each document, (B, N)."""
    rows, documents = len(document_BL), int(document_BL.max(initial=0)) + 1
    flat = document_BL + documents * np.arange(rows)[:, None]
    count = np.bincount(flat[flags_BL], minlength=rows * documents)
    return count.reshape(rows, documents)


def find_words(starts_BL: Bools, predictable_BL: Bools) -> Ints:
    """Return where the word of each token begins, (B, L); -1 if the token is not predictable.

    Args:
        starts_BL: the token begins a word.
        predictable_BL: the token may be predicted: it is neither special nor padding.
    """
    # After a special token a word begins in any case: a row may be cut out of the middle of one.
    first_BL = predictable_BL.copy()
    first_BL[:, 1:] &= ~predictable_BL[:, :-1]
    begins_BL = (starts_BL & predictable_BL) | first_BL
    place_BL = np.where(begins_BL, np.arange(begins_BL.shape[1]), 0)
    word_BL: Ints = np.where(predictable_BL, np.maximum.accumulate(place_BL, axis=1), -1)
    return word_BL


def choose_predicted(word_BL: Ints, document_BL: Ints, count_BN: Ints, draws_UBL: Floats) -> Ints:
    """Return the positions that are predicted: document after document, each in its order.

    Args:
        word_BL: from `find_words`.
        document_BL: the number of each token's document in its row; 0 for padding.
        count_BN: how many tokens each document predicts, from `count_predicted`; 0 for padding.
        draws_UBL: from `draw`.

    Returns:
        (B, P) with P the largest sum of counts of a row; -1 in the slots that a row does not need,
        which come last.
    """
    # In the permuted sentence the tokens of a word stay together, even if two words happened to
    # draw the same key: the sort is stable. A document's keys lie between 2n - 1 and 2n + 1.
    key_BL = np.take_along_axis(draws_UBL[WORD_KEY], np.maximum(word_BL, 0), axis=1)
    key_BL[word_BL < 0] = -1.0
    permuted_BL = np.argsort(key_BL + 2 * document_BL, axis=1, kind="stable")

    # Of each document, the last tokens are predicted.
    sorted_BL = np.take_along_axis(document_BL, permuted_BL, axis=1)
    end_BN = np.cumsum(
        count_in_documents(np.ones_like(word_BL, dtype=np.bool_), document_BL), axis=1
    )
    begin_BL = np.take_along_axis(end_BN - count_BN, sorted_BL, axis=1)
    is_predicted_BL = np.arange(word_BL.shape[1]) >= begin_BL

    # Collected at the left, and shuffled among the tokens of their document.
    count_B = count_BN.sum(axis=1)
    slots = int(count_B.max(initial=0))
    is_used_BP = np.arange(slots) < count_B[:, None]
    chosen_BP = np.zeros(is_used_BP.shape, dtype=np.int64)
    chosen_BP[is_used_BP] = permuted_BL[is_predicted_BL]
    order_BP = np.take_along_axis(draws_UBL[ORDER_KEY] + 2 * document_BL, chosen_BP, axis=1)
    order_BP[~is_used_BP] = np.inf
    shuffled_BP = np.argsort(order_BP, axis=1, kind="stable")
    positions_BP: Ints = np.where(
        is_used_BP, np.take_along_axis(chosen_BP, shuffled_BP, axis=1), -1
    )
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
