"""Who sees whom, drawn from the `Entries` that the network gets.

**plm.** The five tokens of the last chapter under XLNet's objective, "sentence" (position 3)
predicted first and "task" (position 1) second:

>>> import torch
>>> from annotated_mpnet.mpnet.two_stream import mlm_entries, mpnet_entries, plm_entries
>>> words = ["the", "task", "is", "sentence", "labelling", "[M]", "<pad>"]
>>> original, order = torch.tensor([[0, 1, 2, 3, 4]]), torch.tensor([[3, 1]])
>>> print(draw_visibility(plm_entries(original, order, order, mask_token_id=5), words))
    entry          0 the   1 task  2 is    3 sent  4 labe
 0  0 the            x       .       x       .       x
 1  1 task           x       x       x       x       x
 2  2 is             x       .       x       .       x
 3  3 sentence       x       .       x       x       x
 4  4 labelling      x       .       x       .       x
 5  3 [M]            x       .       x       .       x    -> loss
 6  1 [M]            x       .       x       x       x    -> loss

Compare entry 5 with the first query of `mpnet`, which sees five keys where this one sees three: for
entry 5 the positions 1 and 3 do not exist. If "labelling" were predicted too, it could not even
know that the sentence goes on. And entries 0, 2 and 4 must not look ahead either, because the
queries look at them.

**Several documents in a sequence.** "the task" and "is sentence" are two documents, followed by a
token of padding. "task" is predicted first, then "sentence":

>>> masked, order, ids = (torch.tensor([x]) for x in ([0, 5, 2, 5, 6], [1, 3], [1, 3]))
>>> documents = torch.tensor([[1, 1, 2, 2, 0]])
>>> print(draw_visibility(mpnet_entries(masked, order, ids, documents), words))
    entry          0 the   1 [M]   0 is    1 [M]  -1 <pad  1 task  1 sent
 0  0 the            x       x       .       .       .
 1  1 [M]            x       x       .       .       .
 2  0 is             .       .       x       x       .
 3  1 [M]            .       .       x       x       .
 4 -1 <pad>          x       x       x       x       .
 5  1 task           x       .       .       .       .       x       .
 6  1 sentence       .       .       x       .       .       .       x
 7  1 [M]            x       x       .       .       .       .       .    -> loss
 8  1 [M]            .       .       x       x       .       .       .    -> loss

Positions restart in each document. Ranks do not ("sentence" has rank 2), which does no harm: only
their order within a document counts.

**What an average prediction knows.** The paper compares the objectives by the share of tokens and
of positions that a prediction is made from. For 100 tokens, of which the last 15 are predicted:

>>> MASK, sentence, predicted = 999, torch.arange(100)[None], torch.arange(85, 100)[None]
>>> masked = sentence.where(sentence < 85, MASK)
>>> def knows(entries):
...     block = entries.last_block
...     keys_M = entries.input_ids[0, : block.key_positions.shape[1]]
...     sees_PM = block.visibility.matrix()[0] if block.visibility else torch.ones(15, len(keys_M))
...     tokens, positions = (sees_PM * (keys_M != MASK)).sum() / 15, sees_PM.sum() / 15
...     return f"{tokens:.0f} % of the tokens, {positions:.0f} % of the positions"
>>> knows(mlm_entries(masked, predicted, predicted))
'85 % of the tokens, 100 % of the positions'
>>> knows(plm_entries(sentence, predicted, predicted, mask_token_id=MASK))
'92 % of the tokens, 92 % of the positions'
>>> knows(mpnet_entries(masked, predicted, predicted))
'92 % of the tokens, 100 % of the positions'

(The paper says 92.5 %. Prediction j knows j - 1 of the others: 7 on average, not 7.5.)

Next: `mpnet/positions.py`, how the network knows where a token is.
"""

from collections.abc import Sequence

from annotated_mpnet.mpnet.two_stream import Entries


def draw_visibility(entries: Entries, words: Sequence[str]) -> str:
    """Draw who sees whom in the first sample of a batch; `words` are the names of the tokens.

    A line for the keys, then one for each entry: its number, its position, the token that it
    *reads*, what it sees, and "-> loss" if it makes a prediction.
    """
    positions = entries.position_ids.expand_as(entries.input_ids)[0].tolist()
    inputs = [words[token] for token in entries.input_ids[0].tolist()]
    predicting = [] if entries.loss_entries is None else entries.loss_entries[0].tolist()
    num_keys = entries.last_block.key_positions.shape[1]
    keys = list(zip(positions, inputs, strict=True))[:num_keys]
    header = "".join(f"{position:2} {word[:4]:<5}" for position, word in keys)
    lines = [f"    entry         {header}"]
    for block in entries.blocks:
        sees = [[True] * block.key_positions.shape[1]] * block.query_positions.shape[1]
        if block.visibility is not None:
            sees = block.visibility.matrix()[0].tolist()
        for keys_seen in sees:
            entry = len(lines) - 1
            cells = "".join(f"{'x' if seen else '.':>4}    " for seen in keys_seen)
            end = "-> loss" if entry in predicting else ""
            lines.append(f"{entry:2} {positions[entry]:2} {inputs[entry]:12}{cells}{end}")
    return "\n".join(line.rstrip() for line in lines)
