"""The network. Needs torch only, and takes plain numbers, never a tokenizer.

Read `two_stream.py` first: it is the idea, and `pictures.py` draws it. Then follow a batch through:

    two_stream.py   a batch becomes rows, and who sees whom
    positions.py    rows get their places: absolute, and relative to one another
    local_start.py  where heads look before they have learned anything, and why that matters
    attention.py    rows gather from rows
    encoder.py      the layers around that, and the stack of them
    pretraining.py  rows become predictions, predictions a loss; how the weights begin
"""

from annotated_mpnet.modeling.pretraining import MPNetForPretraining

__all__ = ["MPNetForPretraining"]
