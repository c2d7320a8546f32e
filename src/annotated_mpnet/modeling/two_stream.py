"""MPNet's one idea, in natural order: a BERT batch plus an order.

**The problem.** BERT hides 15 % of a sentence behind masks and predicts each hidden token from what
is left; the hidden tokens cannot help to predict one another. XLNet predicts them one after the
other, in a random order, each from those before it (*permuted* language modelling); but then a
prediction does not know how long the sentence is or where its other holes are. MPNet (section 2.2
and 2.3 of the paper) wants both. Say P tokens are predicted, in a random order. To predict number
j, the network may use

- every token that is not predicted,
- the predicted tokens 1..j-1: what BERT lacks,
- at the positions of the tokens j..P, a mask that carries its position: what XLNet lacks. The paper
  calls it *position compensation*.

So each prediction sees each position of the sentence exactly once: as a token, or as a mask. With x
for the tokens, [M] for masks with their positions, and z1..zP for the predicted positions:

    BERT     log p(x_z1 | rest, [M]_z1..zP)  +  log p(x_z2 | rest, [M]_z1..zP)        + ...
    XLNet    log p(x_z1 | rest)              +  log p(x_z2 | rest, x_z1)              + ...
    MPNet    log p(x_z1 | rest, [M]_z1..zP)  +  log p(x_z2 | rest, x_z1, [M]_z2..zP)  + ...

BERT's sum treats the predicted tokens as independent of one another, given the rest: where "New
York" and "Los Angeles" are equally likely, "New Angeles" is as likely to it as they are. The other
two sums are the chain rule, and so a proper joint probability of all predicted tokens, in whatever
order they come.

**How others write it.** Microsoft's code permutes the sentence, so that the predicted tokens come
last, appends 2P entries (a mask and another mask for each), runs two streams through each layer,
and steers them with boolean matrices of (L+P) x (L+P) and P x (L+P); relative positions are
gathered anew for each sample, because each has its own permutation. annotated-mpnet kept that.

**How it is written here.** Attention does not care in which order it meets its keys. Of the
permutation, therefore, only the *ranks of the predicted tokens* matter, and the sentence can stay
as it is. Three groups of rows go through the network:

    rows                 how many  input token                            position  time tau
    the masked sentence  L         the sentence, the predicted tokens     0..L-1    0
                                   replaced by their stand-ins
    content of number j  P         the original token                     its own   j
    query for number j   P         the stand-in once more                 its own   j-1

A row's *time* is how many predictions have been revealed to it. Keys and values come from the
masked sentence and the content rows; each row asks. Let the *order* of a position be the rank of
its prediction, 1..P, and infinity if it is not predicted. Then one rule says who sees whom:

    a key of the masked sentence at position p is visible to a row   iff   order(p) > tau(row)
    a content key of number k is visible to a row                    iff   k <= tau(row)

Each position is seen exactly once, because exactly one of the two holds. Take five tokens, of which
"sentence" (position 3) is predicted first and "task" (position 1) second:

>>> from annotated_mpnet.modeling.pictures import draw_visibility
>>> words = ["the", "task", "is", "sentence", "labelling", "[M]"]
>>> masked, order = torch.tensor([[0, 5, 2, 5, 4]]), torch.tensor([[3, 1]])
>>> rows = mpnet_rows(masked, predicted_positions=order, predicted_ids=order, attention_mask=None)
>>> print(draw_visibility(rows, words))
    row            0 the   1 [M]   2 is    3 [M]   4 labe  3 sent  1 task
 0  0 the            x       x       x       x       x
 1  1 [M]            x       x       x       x       x
 2  2 is             x       x       x       x       x
 3  3 [M]            x       x       x       x       x
 4  4 labelling      x       x       x       x       x
 5  3 sentence       x       x       x       .       x       x       .
 6  1 task           x       .       x       .       x       x       x
 7  3 [M]            x       x       x       x       x       .       .    -> loss
 8  1 [M]            x       x       x       .       x       x       .    -> loss

Down the side stand the rows, across the top the keys, each with its position. `x` is "sees", a dot
is a score that is computed and then ruled out, and where there is nothing, nothing is computed.
Read the last line: "task" is predicted from three plain tokens, from its own mask, and from the
revealed "sentence", whose mask it no longer sees. Rows 6 and 8 are why there are *two* streams:
both stand at position 1, but row 6 has read "task" and so can pass it on to later predictions,
while row 8, which is to predict it, must not have read it.

**What may not leak.** In the first layer the rule holds by construction. In the second, a row sees
what its keys have seen; so it must hold along every path. It does: a visible key never has a time
later than the row's own (0 for the sentence, k <= tau for content), so that time never grows along
a path backwards, and the token of number j, which enters at time j, cannot reach a query of time
j-1 in any number of layers.

**What is gained.** The upper part is plain BERT: L rows that all see the same L keys, with a
relative position bias that is the same for every sample of the batch. Only 2P rows, 30 % of L, need
the staircase at the right. Scores per head, in units of L^2: here, in the permuted form, and what
is left of them that must be gathered or masked for each sample (in the permuted form: all).

>>> L, P = 1000, 150
>>> [n / L**2 for n in (L * L + 2 * P * (L + P), (L + 2 * P) * (L + P), 2 * P * (L + P))]
[1.345, 1.495, 0.345]

In the last layer only the query rows are needed, since nobody looks at what the other rows would
become (`encoder.py`).

**The other two objectives** are the same picture with rows left out. `mlm` has the masked sentence
alone, and reads its predictions there. `plm` has L rows of original tokens (tau: their rank, 0 if
not predicted) and P queries that start as masks (tau: rank - 1); the only keys are the original
tokens, visible iff rank <= tau. No stand-ins anywhere, and no position compensation.

**Several documents in a row.** Short documents may share a row without seeing each other. The
attention mask then holds the number of each token's document, 1, 2, 3, ..., and who sees whom is
one comparison more: row and key are of the same document. Positions count from each document's
first token. Padding is document 0, which no document is; so an ordinary mask of ones and zeros is
the case of a single document, and needs no code of its own.

Next: `pictures.py` draws `plm` and two documents in a row, and counts what each objective knows;
then `positions.py`.

    B batch   L tokens of a sentence   P predicted tokens   R rows (L + 2P in mpnet mode)
    M keys (L + P)   S rows of the staircase (2P)   Q rows that ask
"""

from dataclasses import dataclass, replace

import torch

from annotated_mpnet.batch import NOT_PREDICTED

FOR_EVER = 2**30
"""A time that no row has: later than the rank of any prediction."""


@dataclass(frozen=True)
class Visibility:
    """Who sees whom: a time for each row, a span of time for each key, and everybody's document.

    A key can be seen from one time on until another. Both sides of the rule are of this kind, and
    so are the keys of all three objectives:

        key                               since      until
        position p of the masked sentence 0          order(p)
        content of number k               k          for ever
        empty slot of content             never
        token of `plm`                    its rank   for ever

    These are a few numbers for each row and key, where a matrix has one for each pair. The matrix
    is what most ways to compute attention want; a kernel can do without (`triton_attention.py`).

    Attributes:
        time: (B, Q) or (1, Q), each row's tau.
        since: (B, M), the first time at which a key is seen.
        until: (B, M), the first time at which it is not seen any more.
        documents: (B, Q) of the rows and (B, M) of the keys, 0 for padding; None if there is one
            document and no padding.
    """

    time: torch.Tensor
    since: torch.Tensor
    until: torch.Tensor
    documents: tuple[torch.Tensor, torch.Tensor] | None

    def of_all_pairs(self) -> torch.Tensor:
        """Return the matrix (B, Q, M)."""
        time = self.time[:, :, None]  # of one sample, if it is the same for all
        seen_BQM = (self.since[:, None, :] <= time) & (time < self.until[:, None, :])
        if self.documents is None:
            return seen_BQM
        return seen_BQM & _same_document(*self.documents)

    def of_rows(self, first: int) -> "Visibility":
        """Return the same for the rows from number `first` on."""
        documents = self.documents
        if documents is not None:
            documents = documents[0][:, first:], documents[1]
        return replace(self, time=self.time[:, first:], documents=documents)


@dataclass(frozen=True)
class Block:
    """Consecutive rows that ask the same keys.

    Positions here are *places in the row of tokens*, 0..L-1, padding and other documents counted:
    the relative bias needs only their differences, which are the same from wherever one counts.

    Attributes:
        rows: which of the rows that ask.
        query_positions: (B, Q), or (1, Q) when the same for the whole batch: where they stand in
            the sentence.
        key_positions: (B, M) or (1, M): where the keys stand. The block asks the first M keys.
        visibility: who sees whom; None where everybody sees everything.
    """

    rows: slice
    query_positions: torch.Tensor
    key_positions: torch.Tensor
    visibility: Visibility | None

    @property
    def visible(self) -> torch.Tensor | None:
        """(B, Q, M): who sees whom, pair by pair; None where everybody sees everything."""
        return None if self.visibility is None else self.visibility.of_all_pairs()


@dataclass(frozen=True)
class Rows:
    """All that goes through the network for a batch, whatever its objective.

    Rows that answer come first, those that only ask come last: keys are then a slice,
    `hidden[:, :num_keys]`, and not a copy.

    Attributes:
        input_ids: (B, R). All rows ask; the first `num_keys` rows also answer (give keys, values).
        positions: (B, R) or (1, R). Absolute positions, -1 for padding.
        num_keys: M.
        blocks: all rows, cut so that the rows of a block share their keys.
        loss_rows: (B, P). The rows at which the predictions are read, which is all that the last
            layer computes; None where every row is wanted.
        last_block: what the last layer computes, as a block.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    num_keys: int
    blocks: tuple[Block, ...]
    loss_rows: torch.Tensor | None
    last_block: Block


def sentence_rows(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> Rows:
    """Return the rows of a plain encoder: the sentence (B, L), seen by itself.

    Everything rests on this block: `encode` and `mlm` are nothing else, `mpnet` starts with it.
    Without padding it has no mask at all, and its bias needs no dimension for the batch:

    >>> block = sentence_rows(torch.zeros(8, 512, dtype=torch.long), None).last_block
    >>> block.visible, tuple(block.query_positions.shape)
    (None, (1, 512))
    """
    length, place_1L = input_ids.shape[1], _places(input_ids)
    visibility = None
    if attention_mask is not None:
        visibility = _at_any_time(attention_mask, attention_mask)
    block = Block(slice(0, length), place_1L, place_1L, visibility)
    positions = _absolute_positions(input_ids, attention_mask)
    return Rows(input_ids, positions, length, (block,), None, block)


def mlm_rows(
    input_ids: torch.Tensor,
    predicted_positions: torch.Tensor,
    predicted_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
) -> Rows:
    """BERT's objective: the masked sentence alone; the loss is read at the predicted positions.

    Args are those of `mpnet_rows`. Of `predicted_ids` only the empty slots matter here; the
    original tokens go nowhere but into the loss.
    """
    sentence = sentence_rows(input_ids, attention_mask)
    slots = Slots.of(predicted_positions, predicted_ids)
    visibility = None
    if attention_mask is not None:
        visibility = _at_any_time(attention_mask.gather(1, slots.positions_BP), attention_mask)
    # Layers before the last run the sentence's block: its rows are everybody's keys. The last one
    # runs only the P of them that predict, gathered from their places.
    place_1L = sentence.last_block.key_positions
    last_block = Block(slots.rows, slots.positions_BP, place_1L, visibility)
    return replace(sentence, loss_rows=slots.positions_BP, last_block=last_block)


def mpnet_rows(
    input_ids: torch.Tensor,
    predicted_positions: torch.Tensor,
    predicted_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
) -> Rows:
    """MPNet's objective: the masked sentence, then a content and a query row for each prediction.

    The comments follow the chapter's five tokens, "the [M] is [M] labelling", of which position 3
    is predicted first and position 1 second. The rows of the staircase (S) are content 1 and 2,
    query 1 and 2; the keys (M) five of the sentence and two of content.

    Args:
        input_ids: (B, L), the masked sentence.
        predicted_positions: (B, P), in the order of prediction; anything in an empty slot.
        predicted_ids: (B, P), the original tokens; `NOT_PREDICTED` in an empty slot.
        attention_mask: (B, L), the number of each token's document, 0 for padding; None if there
            is one document and no padding.
    """
    sentence = sentence_rows(input_ids, attention_mask)
    slots = Slots.of(predicted_positions, predicted_ids)
    length, num_slots = input_ids.shape[1], slots.rank_1P.shape[1]

    # The rule of the chapter, for the content rows (tau = j) and the query rows (tau = j - 1).
    # FOR_EVER, an order later than any prediction, is the infinity of what is not predicted.
    #     rank  [0, 2, 0, 1, 0]     until of the sentence's keys  [ever, 2, ever, 1, ever]
    #     tau   [1, 2, 0, 1]        since of the content's keys   [1, 2]
    # The last row, query 2 with tau = 1, sees of the sentence all but position 3, whose time is
    # over at 1, and of the content number 1. An empty slot's content must be ruled out by name: its
    # rank is like any other's.
    rank_BL = slots.ranks_in_sentence(length)
    until_BL = torch.where(rank_BL == 0, FOR_EVER, rank_BL)
    since_BP = torch.where(slots.used_BP, slots.rank_1P, FOR_EVER)
    tau_1S = torch.cat([slots.rank_1P, slots.rank_1P - 1], dim=1)

    # Where rows and keys stand: keys at [0, 1, 2, 3, 4, 3, 1], the staircase's rows at
    # [3, 1, 3, 1]. A revealed token stands where its mask stood, so the bias treats both alike.
    place_BL = _places(input_ids).expand_as(input_ids)
    place_BM = torch.cat([place_BL, slots.positions_BP], dim=1)
    twice_BS = slots.positions_BP.repeat(1, 2)
    documents = None
    if attention_mask is not None:
        documents = attention_mask.gather(1, twice_BS), attention_mask.gather(1, place_BM)
    visibility = Visibility(
        time=tau_1S,
        since=torch.cat([torch.zeros_like(rank_BL), since_BP], dim=1),
        until=torch.cat([until_BL, torch.full_like(since_BP, FOR_EVER)], dim=1),
        documents=documents,
    )

    # In the network the staircase stands behind the sentence. In the last layer its lower half, the
    # queries, is all there is, and the slots are the rows 0..P-1 of those that ask.
    staircase = Block(slice(length, length + 2 * num_slots), twice_BS, place_BM, visibility)
    queries = visibility.of_rows(num_slots)
    last_block = Block(slots.rows, slots.positions_BP, place_BM, queries)

    # What each row reads: content the original, a query the very stand-in of the masked sentence,
    # which for one in ten is a random token and for another the token itself. -100 is no row of the
    # embedding table, so that an empty slot needs some other id; nobody will see it.
    position_BL = sentence.positions.expand_as(input_ids)
    stand_in_BP = input_ids.gather(1, slots.positions_BP)
    original_BP = torch.where(slots.used_BP, predicted_ids, stand_in_BP)
    return Rows(
        input_ids=torch.cat([input_ids, original_BP, stand_in_BP], dim=1),
        positions=torch.cat([position_BL, position_BL.gather(1, twice_BS)], dim=1),
        num_keys=length + num_slots,
        blocks=(*sentence.blocks, staircase),
        loss_rows=slots.rows_behind(length + num_slots),
        last_block=last_block,
    )


def plm_rows(
    input_ids: torch.Tensor,
    predicted_positions: torch.Tensor,
    predicted_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    mask_token_id: int,
) -> Rows:
    """XLNet's objective: the original sentence in its order of revelation, and P queries.

    Args are those of `mpnet_rows`, but `input_ids` is the *original* sentence: each token is its
    own content row, at its own place, and no further rows need to hold it.
    """
    slots = Slots.of(predicted_positions, predicted_ids)
    length = input_ids.shape[1]

    # What is not predicted has rank 0: known from the start, and knowing nothing but its like.
    #     rank  [0, 2, 0, 1, 0]     tau  [0, 2, 0, 1, 0, 0, 1]
    # A key is seen from its own rank on, so that a content row sees itself. A query of the same
    # place has a tau one less, and that is the whole difference between knowing the token and
    # predicting it.
    rank_BL = slots.ranks_in_sentence(length)
    query_tau_BP = (slots.rank_1P - 1).expand_as(slots.positions_BP)
    tau_BR = torch.cat([rank_BL, query_tau_BP], dim=1)

    # No block of this is dense: even the sentence's own rows must not look ahead. So one block of
    # L + P rows has to carry a mask and a bias of its own for each sample.
    place_1L = _places(input_ids)
    place_BR = torch.cat([place_1L.expand_as(input_ids), slots.positions_BP], dim=1)
    documents = None
    if attention_mask is not None:
        documents = attention_mask.gather(1, place_BR), attention_mask
    visibility = Visibility(tau_BR, rank_BL, torch.full_like(rank_BL, FOR_EVER), documents)
    position_BL = _absolute_positions(input_ids, attention_mask).expand_as(input_ids)
    position_BP = position_BL.gather(1, slots.positions_BP)
    masks_BP = torch.full_like(slots.positions_BP, mask_token_id)
    return Rows(
        input_ids=torch.cat([input_ids, masks_BP], dim=1),
        positions=torch.cat([position_BL, position_BP], dim=1),
        num_keys=length,
        blocks=(Block(slice(0, place_BR.shape[1]), place_BR, place_1L, visibility),),
        loss_rows=slots.rows_behind(length),
        last_block=Block(slots.rows, slots.positions_BP, place_1L, visibility.of_rows(length)),
    )


@dataclass(frozen=True)
class Slots:
    """The P places for predictions in each row of the batch; a short document leaves some empty.

    Attributes:
        used_BP: whether a prediction is in the slot.
        positions_BP: where it stands in the sentence, 0 in an empty slot.
        rank_1P: 1..P, when it is predicted.
    """

    used_BP: torch.Tensor
    positions_BP: torch.Tensor
    rank_1P: torch.Tensor

    @classmethod
    def of(cls, predicted_positions: torch.Tensor, predicted_ids: torch.Tensor) -> "Slots":
        """Read the slots off a batch: both (B, P).

        Whatever position an empty slot came with becomes 0, which always exists, so that the slot
        can go through every `gather` like the others: dropping it would take a shape that depends
        on the data, and with it a wait for the GPU and a new compilation.
        """
        used_BP = predicted_ids != NOT_PREDICTED
        rank_1P = torch.arange(1, predicted_ids.shape[1] + 1, device=predicted_ids.device)[None]
        return cls(used_BP, torch.where(used_BP, predicted_positions, 0), rank_1P)

    @property
    def rows(self) -> slice:
        """The slots as the only rows that ask, in the last layer."""
        return slice(0, self.rank_1P.shape[1])

    def rows_behind(self, first: int) -> torch.Tensor:
        """Return the rows (B, P) of the slots when they stand behind `first` others."""
        return (self.rank_1P - 1 + first).expand_as(self.positions_BP)

    def ranks_in_sentence(self, length: int) -> torch.Tensor:
        """Return for each position (B, L) when it is predicted, 1..P, and 0 for never.

        >>> Slots.of(torch.tensor([[3, 1, 9]]), torch.tensor([[3, 1, -100]])).ranks_in_sentence(5)
        tensor([[0, 2, 0, 1, 0]])
        """
        # An empty slot writes behind the end, into a column that is then cut off, because as
        # position 0 it would overwrite the rank of a prediction that really stands there.
        target_BP = torch.where(self.used_BP, self.positions_BP, length)
        rank_BL = target_BP.new_zeros(target_BP.shape[0], length + 1)
        return rank_BL.scatter(1, target_BP, self.rank_1P.expand_as(target_BP))[:, :length]


def _places(input_ids: torch.Tensor) -> torch.Tensor:
    return torch.arange(input_ids.shape[1], device=input_ids.device)[None]


def _at_any_time(asking_BQ: torch.Tensor, answering_BM: torch.Tensor) -> Visibility:
    """Let documents alone decide: where nothing is revealed, all rows and keys are of time 0."""
    start_BM = torch.zeros_like(answering_BM)
    forever_BM = torch.full_like(answering_BM, FOR_EVER)
    documents = asking_BQ, answering_BM
    return Visibility(torch.zeros_like(asking_BQ), start_BM, forever_BM, documents)


def _same_document(asking_BQ: torch.Tensor, answering_BM: torch.Tensor) -> torch.Tensor:
    """Return (B, Q, M): whether a key is a real token, of the document of the row that asks.

    HF: padding sees every real token. Nobody reads what becomes of it, but it must see something,
    because a softmax over nothing is not a number; and so `encode` agrees even there.
    """
    same_BQM = asking_BQ[:, :, None] == answering_BM[:, None, :]
    asks_as_padding_BQ1 = (asking_BQ == 0)[:, :, None]
    return (same_BQM | asks_as_padding_BQ1) & (answering_BM != 0)[:, None, :]


def _absolute_positions(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """Count positions from each document's first token, so that padding on the left moves nothing.

    >>> _absolute_positions(torch.zeros(1, 8), torch.tensor([[0, 0, 1, 1, 1, 2, 2, 0]]))
    tensor([[-1, -1,  0,  1,  2,  0,  1, -1]])

    HF, and fairseq in fine-tuning: padding has the position of the padding id, -1 here. Nobody sees
    it, but so even the padded places of `encode` agree with Hugging Face. fairseq in pretraining:
    padding is permuted along, at positions of its own, and is attended to.
    """
    place_1L = _places(input_ids)
    if attention_mask is None:
        return place_1L
    # Documents are numbered in their order: the highest number so far is that of the document that
    # goes on here, even behind a hole in the mask, and where it rises a document begins. In the
    # example: reached [0, 0, 1, 1, 1, 2, 2, 2], first [0, 0, 2, 2, 2, 5, 5, 5].
    reached_BL = attention_mask.cummax(dim=1).values
    before_BL = torch.cat([torch.zeros_like(reached_BL[:, :1]), reached_BL[:, :-1]], dim=1)
    first_BL = torch.where(reached_BL > before_BL, place_1L, 0).cummax(dim=1).values
    return torch.where(attention_mask != 0, place_1L - first_BL, -1)
