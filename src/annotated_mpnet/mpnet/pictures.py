"""Who sees whom, drawn: the pictures of `mpnet/two_stream.py`, and three more.

A picture is read off the `Entries` that the network gets, and off nothing else, so that it cannot show
another network than the one that runs. Down the side stand the rows, across the top the keys, each
with its absolute position. `x` is "sees", a dot is a score that is computed and then ruled out, and
where there is nothing, nothing is computed.

**plm.** The five tokens of the chapter, "sentence" (position 3) predicted first and "task"
(position 1) second, under XLNet's objective:

>>> import torch
>>> from annotated_mpnet.mpnet.two_stream import mlm_entries, mpnet_entries, plm_entries
>>> words = ["the", "task", "is", "sentence", "labelling", "[M]", "<pad>"]
>>> original, order = torch.tensor([[0, 1, 2, 3, 4]]), torch.tensor([[3, 1]])
>>> print(draw_visibility(plm_entries(original, order, order, None, mask_token_id=5), words))
    row            0 the   1 task  2 is    3 sent  4 labe
 0  0 the            x       .       x       .       x
 1  1 task           x       x       x       x       x
 2  2 is             x       .       x       .       x
 3  3 sentence       x       .       x       x       x
 4  4 labelling      x       .       x       .       x
 5  3 [M]            x       .       x       .       x    -> loss
 6  1 [M]            x       .       x       x       x    -> loss

Compare row 5 with the first query of `mpnet`, which sees five keys where this one sees three. For
what it gathers, the positions 1 and 3 do not exist; were "labelling" predicted too, it could not
even know that the sentence goes on. And no block is dense any more: rows 0, 2 and 4 must not look
ahead either, because the queries look at them.

**Several documents in a row.** "the task" and "is sentence" are two documents here, with a token of
padding behind them; "task" is predicted first, then "sentence":

>>> masked, order, ids = (torch.tensor([x]) for x in ([0, 5, 2, 5, 6], [1, 3], [1, 3]))
>>> documents = torch.tensor([[1, 1, 2, 2, 0]])
>>> print(draw_visibility(mpnet_entries(masked, order, ids, documents), words))
    row            0 the   1 [M]   0 is    1 [M]  -1 <pad  1 task  1 sent
 0  0 the            x       x       .       .       .
 1  1 [M]            x       x       .       .       .
 2  0 is             .       .       x       x       .
 3  1 [M]            .       .       x       x       .
 4 -1 <pad>          x       x       x       x       .
 5  1 task           x       .       .       .       .       x       .
 6  1 sentence       .       .       x       .       .       .       x
 7  1 [M]            x       x       .       .       .       .       .    -> loss
 8  1 [M]            .       .       x       x       .       .       .    -> loss

Positions start anew at the second document. The ranks do not, they run through the row: the content
of "task" has rank 1 and that of "sentence" rank 2, though each is the first of its document. That
does no harm, since within a document only their order counts. And padding sees the real tokens:
somebody it must see (`_same_document` says why).

**What an average prediction knows.** The paper compares the objectives by it: the share of the
sentence's tokens, and of its positions, that a prediction is made from. Counted over the rows where
the loss is read, for 100 tokens of which the last 15 are predicted:

>>> MASK, sentence, predicted = 999, torch.arange(100)[None], torch.arange(85, 100)[None]
>>> masked = sentence.where(sentence < 85, MASK)
>>> def knows(rows):
...     block, keys_M = rows.last_block, rows.input_ids[0, : rows.num_keys]
...     seen_PM = torch.ones(15, len(keys_M)) if block.visible is None else block.visible[0]
...     tokens, positions = (seen_PM * (keys_M != MASK)).sum() / 15, seen_PM.sum() / 15
...     return f"{tokens:.0f} % of the tokens, {positions:.0f} % of the positions"
>>> knows(mlm_entries(masked, predicted, predicted, None))
'85 % of the tokens, 100 % of the positions'
>>> knows(plm_entries(sentence, predicted, predicted, None, MASK))
'92 % of the tokens, 92 % of the positions'
>>> knows(mpnet_entries(masked, predicted, predicted, None))
'92 % of the tokens, 100 % of the positions'

Next: `mpnet/positions.py`.

    P predicted tokens   M keys
"""

from collections.abc import Sequence

from annotated_mpnet.mpnet.two_stream import Entries


def draw_visibility(rows: Entries, words: Sequence[str]) -> str:
    """Draw who sees whom in the first sample of a batch.

    Args:
        rows: of any objective.
        words: how each token id is written.

    Returns:
        A line for the keys, then one for each row. Its input is what the row *reads*: a query reads
        a mask. Behind it comes what the row sees, and "-> loss" if its prediction is made there.
    """
    positions = rows.positions.expand_as(rows.input_ids)[0].tolist()
    inputs = [words[token] for token in rows.input_ids[0].tolist()]
    loss_entries = [] if rows.loss_entries is None else rows.loss_entries[0].tolist()
    keys = list(zip(positions, inputs, strict=True))[: rows.num_keys]
    header = "".join(f"{position:2} {word[:4]:<5}" for position, word in keys)
    lines = [f"    row           {header}"]
    for block in rows.blocks:
        num_keys = block.key_positions.shape[1]
        for row in range(block.rows.start, block.rows.stop):
            sees = [True] * num_keys
            if block.visible is not None:
                sees = block.visible[0, row - block.rows.start].tolist()
            cells = "".join(f"{'x' if seen else '.':>4}    " for seen in sees)
            end = "-> loss" if row in loss_entries else ""
            lines.append(f"{row:2} {positions[row]:2} {inputs[row]:12}{cells}{end}")
    return "\n".join(line.rstrip() for line in lines)
