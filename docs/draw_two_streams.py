"""Draw who sees whom, in natural order and in the paper's.

    python docs/draw_two_streams.py > docs/two_streams.svg
    python docs/draw_two_streams.py permuted > docs/permuted.svg

Both are read off the entries that training uses; only the words are given.
"""

import sys

import torch

from annotated_mpnet.explain.explanation import Objective, objective_of
from annotated_mpnet.explain.picture import permuted, picture, svg
from annotated_mpnet.mpnet.batch import Batch

WORDS = ["the", "task", "is", "sentence", "labelling", "[M]"]
PREDICTED = [3, 1]  # "sentence" first, "task" second


def example() -> Objective:
    """Return the example of `mpnet/two_stream.py`."""
    order = torch.tensor([PREDICTED])
    mask_id, length = WORDS.index("[M]"), len(WORDS) - 1
    masked = torch.arange(length)[None].index_fill(1, order[0], mask_id)
    batch = Batch(masked, order, order, None, length, len(PREDICTED))
    return objective_of("mpnet", batch, WORDS.__getitem__, mask_id)


def drawing(form: str = "natural") -> str:
    """Return the picture as SVG."""
    return svg(picture(permuted(example()) if form == "permuted" else example()))


if __name__ == "__main__":
    print(drawing(*sys.argv[1:]), end="")
