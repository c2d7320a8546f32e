"""Draw who sees whom: `python docs/draw_two_streams.py > docs/two_streams.svg`.

The picture is read off the entries that training uses; only the words are given.
"""

import torch

from annotated_mpnet.explain.explanation import Objective, objective_of
from annotated_mpnet.explain.picture import picture, svg
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


if __name__ == "__main__":
    print(svg(picture(example())), end="")
