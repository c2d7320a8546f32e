"""MPNet's one idea, in natural order: a BERT batch plus an order.

**The problem.** BERT hides 15 % of a sentence behind masks and predicts each hidden token from what
is left. The hidden tokens cannot help to predict each other. XLNet predicts them one after the
other, in a random order, each from those before it (*permuted* language modelling). But then a
prediction does not know how long the sentence is, or where its other gaps are. MPNet (sections 2.2
and 2.3 of the paper) wants both. To predict number j of P tokens, in a random order, the network
may use

- every token that is not predicted,
- the predicted tokens 1..j-1, which BERT lacks,
- a mask at each position of the tokens j..P, which XLNet lacks (*position compensation*).

Every prediction then sees each position of the sentence exactly once, as a token or as a mask. With
x for the tokens, [M] for masks with their positions, and z1..zP for the predicted positions:

    BERT     log p(x_z1 | rest, [M]_z1..zP)  +  log p(x_z2 | rest, [M]_z1..zP)        + ...
    XLNet    log p(x_z1 | rest)              +  log p(x_z2 | rest, x_z1)              + ...
    MPNet    log p(x_z1 | rest, [M]_z1..zP)  +  log p(x_z2 | rest, x_z1, [M]_z2..zP)  + ...

BERT's sum treats the predicted tokens as independent, given the rest: where "New York" and "Los
Angeles" are equally likely, "New Angeles" is just as likely. The other two sums are the chain rule.

**How others write it.** Microsoft's code permutes the sentence until the predicted tokens come
last, appends 2P more entries, and runs two streams through every layer, with boolean matrices of
(L+P) x (L+P) and P x (L+P) and with relative positions that differ in each sample.

**How it is written here.** Attention does not depend on the order of its keys. Only the *ranks of
the predicted tokens* matter, and the sentence can stay as it is. Three groups of entries go through
the network:

    entries              how many  input token                           position  time tau
    masked sentence      L         the sentence, predicted tokens        0..L-1    0
                                   corrupted (mostly masks)
    content of number j  P         the original token                    its own   j
    query for number j   P         the corrupted token once more         its own   j-1

The *time* tau of an entry is the number of predictions that it may know. Every entry attends; the
keys and values come from the masked sentence and the content entries. Let the *order* of a
position be the rank of its prediction, 1..P, and infinity if it is not predicted. One rule then
says who sees whom:

    a masked-sentence key at position p is visible to an entry   iff   order(p) > tau(entry)
    the content key of number k is visible to an entry           iff   k <= tau(entry)

Exactly one of the two holds for each predicted position, so each position is seen exactly once.
Take five tokens. "sentence" (position 3) is predicted first and "task" (position 1) second:

>>> from annotated_mpnet.mpnet.pictures import draw_visibility
>>> words = ["the", "task", "is", "sentence", "labelling", "[M]"]
>>> masked, order = torch.tensor([[0, 5, 2, 5, 4]]), torch.tensor([[3, 1]])
>>> entries = mpnet_entries(masked, predicted_positions=order, predicted_ids=order)
>>> print(draw_visibility(entries, words))
    entry          0 the   1 [M]   2 is    3 [M]   4 labe  3 sent  1 task
 0  0 the            x       x       x       x       x
 1  1 [M]            x       x       x       x       x
 2  2 is             x       x       x       x       x
 3  3 [M]            x       x       x       x       x
 4  4 labelling      x       x       x       x       x
 5  3 sentence       x       x       x       .       x       x       .
 6  1 task           x       .       x       .       x       x       x
 7  3 [M]            x       x       x       x       x       .       .    -> loss
 8  1 [M]            x       x       x       .       x       x       .    -> loss

The lines are the entries, the columns the keys, each with its position. `x` means "sees", a dot is
a score that is computed and then masked, and a blank is not computed at all. Read the last line:
"task" is predicted from three plain tokens, from its own mask, and from "sentence", whose mask it
no longer sees. Entries 6 and 8 show why there are *two* streams. Both are at position 1, but entry
6 has read "task", and can tell later predictions; entry 8 has to predict it.

**Why masks for predicted tokens are also shown to later queries.** Query j sees a mask at its own
position and at those of all predictions after it. Without them it would not know that these
positions exist: to XLNet's query the sentence is shorter than it is. That is all that position
compensation adds over XLNet, and `mpnet/pictures.py` counts it.

**Why no query can see its own token.** In the first layer the rule holds by construction. In later
layers an entry also sees what its keys have seen. But a visible key never has a later time than the
entry itself: 0 for the masked sentence, k <= tau for content. Token j enters at time j, and so no
number of layers can carry it to a query of time j-1.

**What is gained.** The upper part is plain BERT: L entries see the same L keys, with one relative
position bias for the whole batch. Only the 2P entries below need the staircase at the right. With P
= 0.15 L, a head computes 1.345 L^2 scores, of which 0.345 L^2 need a bias of their own in each
sample. In the permuted form it computes 1.495 L^2, and all of them do.

**The other two objectives** are the same picture with entries left out. `mlm` has the masked
sentence alone and reads its predictions there. `plm` has L entries of original tokens (tau: their
rank, 0 if not predicted) and P queries that start as masks (tau: rank - 1); the only keys are the
original tokens, visible iff rank <= tau.

**Several documents in a sequence.** Short documents may share a sequence without seeing each other.
The attention mask then holds the number of each token's document, 1, 2, 3, ..., and an entry sees
only keys of its own document. Positions count from each document's first token. Padding is document
0, which is never visible; an ordinary mask of ones and zeros is the case of a single document.

Next: `mpnet/pictures.py` draws `plm` and two documents, and counts what each objective knows.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from annotated_mpnet.mpnet.batch import NOT_PREDICTED

NEVER = 2**30
"""Infinity, as an order or a rank: no entry has so late a time."""


@dataclass(frozen=True)
class Visibility:
    """Who sees whom in a block: the numbers that the rule of the chapter compares.

    The keys are first the masked sentence, then content.

    Attributes:
        tau: (B, Q) or (1, Q), the times of the queries.
        order: (B, L), of the masked sentence; (B, 0) in `plm`.
        rank: (B, P), of the content, `NEVER` in an empty slot; (B, 0) in `mlm`. In `plm` (B, L),
            and 0 for tokens that are not predicted.
        documents: (B, Q) of the queries and (B, M) of the keys; None without an attention mask.
    """

    tau: Tensor
    order: Tensor
    rank: Tensor
    documents: tuple[Tensor, Tensor] | None

    def matrix(self) -> Tensor:
        """Return (B, Q, M): whether a query sees a key."""
        tau = self.tau[:, :, None]
        sees_BQM = torch.cat([self.order[:, None] > tau, self.rank[:, None] <= tau], dim=2)
        if self.documents is None:
            return sees_BQM
        query_document_BQ, key_document_BM = self.documents
        same_BQM = query_document_BQ[:, :, None] == key_document_BM[:, None, :]
        # Padding sees all real tokens, as in Hugging Face's MPNet. Nothing reads the result, but a
        # softmax over nothing would be NaN.
        from_padding_BQ1 = (query_document_BQ == 0)[:, :, None]
        return sees_BQM & (same_BQM | from_padding_BQ1) & (key_document_BM != 0)[:, None, :]


@dataclass(frozen=True)
class Block:
    """Consecutive entries whose queries share their keys, the first M of all keys.

    Attributes:
        query_positions: (B, Q), or (1, Q) if all samples agree: positions in the sequence, 0..L-1.
        key_positions: (B, M) or (1, M).
        visibility: None if every query sees every key.
    """

    query_positions: Tensor
    key_positions: Tensor
    visibility: Visibility | None


@dataclass(frozen=True)
class Entries:
    """All that goes through the network for a batch.

    Attributes:
        input_ids: (B, E). The entries that give keys come first.
        position_ids: (B, E) or (1, E), for the position table: counted in each document, -1 for
            padding.
        blocks: together they cover the E queries, in order; the last one has all the keys.
        loss_entries: (B, P), the entries that make predictions; None if all entries are wanted.
        last_block: the queries of the last layer, which computes the wanted entries only.
    """

    input_ids: Tensor
    position_ids: Tensor
    blocks: tuple[Block, ...]
    loss_entries: Tensor | None
    last_block: Block


def sentence_entries(input_ids: Tensor, attention_mask: Tensor | None = None) -> Entries:
    """Return the entries of a plain encoder: the sentence (B, L), seen by itself.

    Without padding there is no mask, and all samples share one bias.
    """
    position_1L = _positions(input_ids)
    block = _block(position_1L, position_1L, attention_mask)
    position_ids = _position_ids(input_ids, attention_mask)
    return Entries(input_ids, position_ids, (block,), None, block)


def mlm_entries(
    input_ids: Tensor,
    predicted_positions: Tensor,
    predicted_ids: Tensor,
    attention_mask: Tensor | None = None,
) -> Entries:
    """BERT's objective: the masked sentence alone, read at the predicted positions.

    The arguments are the tensors of a `Batch`.
    """
    sentence = sentence_entries(input_ids, attention_mask)
    _, position_BP, _, _ = _slots(predicted_positions, predicted_ids, input_ids.shape[1])
    last_block = _block(position_BP, _positions(input_ids), attention_mask)
    return replace(sentence, loss_entries=position_BP, last_block=last_block)


def mpnet_entries(
    input_ids: Tensor,
    predicted_positions: Tensor,
    predicted_ids: Tensor,
    attention_mask: Tensor | None = None,
) -> Entries:
    """MPNet's objective: the masked sentence, then P content entries, then P queries.

    The arguments are the tensors of a `Batch`. The numbers in comments are the chapter's example.
    """
    sentence = sentence_entries(input_ids, attention_mask)
    length, num_slots = input_ids.shape[1], predicted_ids.shape[1]
    used_BP, position_BP, rank_1P, rank_BL = _slots(predicted_positions, predicted_ids, length)

    # Order [inf, 2, inf, 1, inf] and rank [1, 2]; tau [1, 2] for content and [0, 1] for queries.
    order_BL = torch.where(rank_BL == 0, NEVER, rank_BL)
    rank_BP = torch.where(used_BP, rank_1P, NEVER)
    query_tau_1P = rank_1P - 1
    tau_1Q = torch.cat([rank_1P, query_tau_1P], dim=1)

    # The queries are at [3, 1, 3, 1], the keys at [0, 1, 2, 3, 4, 3, 1].
    position_BM = torch.cat([_positions(input_ids).expand_as(input_ids), position_BP], dim=1)
    position_BQ = position_BP.repeat(1, 2)
    staircase = _block(position_BQ, position_BM, attention_mask, (tau_1Q, order_BL, rank_BP))
    queries = _block(position_BP, position_BM, attention_mask, (query_tau_1P, order_BL, rank_BP))

    # A query reads the corrupted token, which is not always a mask. -100 has no embedding, so an
    # empty slot gets some other token; nothing will see it.
    position_id_BL = sentence.position_ids.expand_as(input_ids)
    corrupted_BP = input_ids.gather(1, position_BP)
    original_BP = torch.where(used_BP, predicted_ids, corrupted_BP)
    return Entries(
        input_ids=torch.cat([input_ids, original_BP, corrupted_BP], dim=1),
        position_ids=torch.cat([position_id_BL, position_id_BL.gather(1, position_BQ)], dim=1),
        blocks=(*sentence.blocks, staircase),
        loss_entries=(rank_1P - 1 + length + num_slots).expand_as(position_BP),
        last_block=queries,
    )


def plm_entries(
    input_ids: Tensor,
    predicted_positions: Tensor,
    predicted_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    mask_token_id: int,
) -> Entries:
    """XLNet's objective: the original sentence as content, then P queries that start as masks.

    The arguments are the tensors of a `Batch`, whose `input_ids` are the *original* sentence here.
    """
    length = input_ids.shape[1]
    _, position_BP, rank_1P, rank_BL = _slots(predicted_positions, predicted_ids, length)

    # In the example: rank [0, 2, 0, 1, 0], tau [0, 2, 0, 1, 0] for content and [0, 1] for queries.
    # A content entry sees itself. The query at its position has a time one less, and that is the
    # difference between knowing a token and predicting it.
    query_tau_BP = (rank_1P - 1).expand_as(position_BP)
    tau_BE = torch.cat([rank_BL, query_tau_BP], dim=1)
    order_B0 = rank_BL[:, :0]

    # The sentence must not look ahead either, so nothing is dense, and there is only one block.
    position_1L = _positions(input_ids)
    position_BE = torch.cat([position_1L.expand_as(input_ids), position_BP], dim=1)
    block = _block(position_BE, position_1L, attention_mask, (tau_BE, order_B0, rank_BL))
    queries = _block(position_BP, position_1L, attention_mask, (query_tau_BP, order_B0, rank_BL))
    position_id_BL = _position_ids(input_ids, attention_mask).expand_as(input_ids)
    masks_BP = torch.full_like(position_BP, mask_token_id)
    return Entries(
        input_ids=torch.cat([input_ids, masks_BP], dim=1),
        position_ids=torch.cat([position_id_BL, position_id_BL.gather(1, position_BP)], dim=1),
        blocks=(block,),
        loss_entries=(rank_1P - 1 + length).expand_as(position_BP),
        last_block=queries,
    )


def _slots(
    predicted_positions: Tensor, predicted_ids: Tensor, length: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return for each slot whether it is used, its position and its rank; and all positions' ranks.

    An empty slot gets position 0 and goes through the network like the others. Dropping it would
    make shapes depend on the data: a wait for the GPU, and a new compilation.

    >>> _slots(torch.tensor([[3, 1, 9]]), torch.tensor([[3, 1, NOT_PREDICTED]]), length=5)[1:]
    (tensor([[3, 1, 0]]), tensor([[1, 2, 3]]), tensor([[0, 2, 0, 1, 0]]))
    """
    used_BP = predicted_ids != NOT_PREDICTED
    rank_1P = torch.arange(1, predicted_ids.shape[1] + 1, device=predicted_ids.device)[None]
    # Empty slots write their rank into an extra column, which is then cut off.
    target_BP = torch.where(used_BP, predicted_positions, length)
    rank_BL = target_BP.new_zeros(target_BP.shape[0], length + 1)
    rank_BL = rank_BL.scatter(1, target_BP, rank_1P.expand_as(target_BP))[:, :length]
    return used_BP, torch.where(used_BP, predicted_positions, 0), rank_1P, rank_BL


def _positions(input_ids: Tensor) -> Tensor:
    return torch.arange(input_ids.shape[1], device=input_ids.device)[None]


def _block(
    query_positions: Tensor,
    key_positions: Tensor,
    attention_mask: Tensor | None,
    rule: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Block:
    """Return a block under a rule (tau, order, rank), or with nothing revealed."""
    documents = None
    if attention_mask is not None:
        B = len(attention_mask)
        query_document_BQ = attention_mask.gather(1, query_positions.expand(B, -1))
        key_document_BM = attention_mask.gather(1, key_positions.expand(B, -1))
        documents = query_document_BQ, key_document_BM
        if rule is None:
            order_BM = torch.full_like(key_document_BM, NEVER)
            rule = torch.zeros_like(query_document_BQ), order_BM, order_BM[:, :0]
    visibility = None if rule is None else Visibility(*rule, documents)
    return Block(query_positions, key_positions, visibility)


def _position_ids(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Count positions from each document's first token, so padding on the left moves nothing.

    >>> _position_ids(torch.zeros(1, 8), torch.tensor([[0, 0, 1, 1, 1, 2, 2, 0]]))
    tensor([[-1, -1,  0,  1,  2,  0,  1, -1]])

    Padding is at -1, as in Hugging Face's MPNet.
    """
    position_1L = _positions(input_ids)
    if attention_mask is None:
        return position_1L
    # The highest number so far is the current document's; where it rises, a document begins.
    # In the example: reached [0, 0, 1, 1, 1, 2, 2, 2].
    reached_BL = attention_mask.cummax(dim=1).values
    before_BL = torch.cat([torch.zeros_like(reached_BL[:, :1]), reached_BL[:, :-1]], dim=1)
    first_BL = torch.where(reached_BL > before_BL, position_1L, 0).cummax(dim=1).values
    return torch.where(attention_mask != 0, position_1L - first_BL, -1)
