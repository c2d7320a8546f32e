"""The local start: why short runs stop learning, and what ends it.

**The plateau.** A fresh masked language model quickly learns how often each token occurs. Then its
loss hardly moves, for hundreds or thousands of updates, until it suddenly falls. Many short runs
end before that. Here is MPNet-base on novels (sequences of 128 tokens, 128 in an update, one H200;
bits per predicted token on held-out text, where guessing by frequency needs 9.44):

    update                          100    300    600    900   1200
    N(0, 0.02), as in the paper    8.90   8.70   8.40   6.90   6.38
    the local start                7.30   6.12   5.43   5.01   4.80

**The reason.** To fill a gap, a model needs the words next to it. A head has to learn two things
for that: *where* to look (its queries, keys and relative position bias) and *what* to take from
there (its values and output). Each waits for the other. The scores of a fresh network are close to
zero, so each head spreads its attention evenly: of 64 tokens, each gets 1/64 of the weight. What
the values then take is the average of the sequence, which says little about *this* gap. And as long
as it does not matter what a head takes, it does not matter where it looks either: on the demo's
network, the gradient on the bias is a hundredth of that on the values, and its direction changes
from batch to batch.

**What ends it.** MPNet has a parameter made for preferring places: the relative position bias, a
number for each bucket of distances and each head, shared by all layers. The paper starts it with
noise. The local start adds, for a head that prefers offset o,

    b(d) = -2 log2(1 + |d - o|)        d = key position - query position

(each bucket gets the mean over its distances). A softmax over b gives weights that fall with the
power 2 / ln 2 = 2.9 of the distance from o. This is what a token sees before any training, among 63
others:

>>> distances = torch.arange(-32, 32)
>>> bias_SH = local_bias(num_buckets=32, max_distance=128, num_heads=4)
>>> buckets = relative_position_bucket(distances, num_buckets=32, max_distance=128)
>>> weights_HW = bias_SH[buckets].T.softmax(dim=1)
>>> print("percent on  -4   -3   -2   -1    0   +1   +2   +3   +4")
percent on  -4   -3   -2   -1    0   +1   +2   +3   +4
>>> for head, weights_W in enumerate(weights_HW):
...     print(f"head {head}  ", *(f"{100 * weight:4.0f}" for weight in weights_W[28:37]))
head 0      1    3    9   69    9    3    1    1    0
head 1      0    1    1    3    9   69    9    3    1
head 2      2    2    2    2    2    2    2    2    2
head 3      2    2    2    2    2    2    2    2    2

Of every four heads, one prefers the left neighbour and one the right. What they take is a single
word, so their values get a gradient three times as large from the first update on. The other two
start free, as in the paper: half of the heads can still look anywhere. Nothing is fixed; the table
is trained like any other parameter.

**Why these heads?** Because training ends there anyway. A run of the preset `tiny`'s shape with the
paper's start, after 6,000 updates, has one head with +3.1 on its left neighbour and one with +3.1
on its right one, of four. Started locally, the same run is ahead all the way, and at the end (4.63
bits against 4.81). The direction matters: heads that prefer both sides alike leave the plateau
later. `docs/log.md` has all that was tried, and `benchmarks/plateau.py` shows what the heads see
during training.

HF: the same start works for `MPNetForMaskedLM`, whose buckets are ours:
`model.mpnet.encoder.relative_attention_bias.weight.data += local_bias(32, 128, num_heads)`.

Not measured: long runs at the size of MPNet-base.

Related: ConViT (arXiv 2103.10697) starts attention as a soft convolution. ALiBi (2108.12409) keeps
its slopes fixed. The sudden fall of the loss is studied in 2309.07311.

Next: `attention.py` adds the bias to the scores.

    S buckets   H heads   W distances
"""

import torch
from torch import Tensor

from annotated_mpnet.modeling.positions import RelativePositionBias, relative_position_bucket

STRENGTH = 2.0
"""Measured at 1, 2 and 4: 2 and 4 are alike, 1 is a little behind."""

PREFERRED_OFFSETS = (-1, 1, None, None)
"""Taken in turn by the heads; None starts free."""


def local_bias(num_buckets: int, max_distance: int, num_heads: int) -> Tensor:
    """Return the bias with which the table starts, without the noise: (S, H), on the CPU.

    Each bucket gets the mean over its distances up to `max_distance`. A bucket without a distance
    gets 0, like all buckets of a free head.
    """
    with torch.device("cpu"):
        distance_W = torch.arange(-max_distance, max_distance + 1)
        bucket_W = relative_position_bucket(distance_W, num_buckets, max_distance)
        size_S = torch.bincount(bucket_W, minlength=num_buckets).clamp(min=1)
        bias_SH = torch.zeros(num_buckets, num_heads)
        for head in range(num_heads):
            offset = PREFERRED_OFFSETS[head % len(PREFERRED_OFFSETS)]
            if offset is not None:
                bias_W = -STRENGTH * torch.log2(1.0 + (distance_W - offset).abs())
                bias_SH[:, head] = torch.zeros(num_buckets).index_add(0, bucket_W, bias_W) / size_S
        return bias_SH


@torch.no_grad()
def start_locally(table: RelativePositionBias) -> None:
    """Add the local start to a table that holds fresh noise."""
    table.weight += local_bias(table.num_embeddings, table.max_distance, table.embedding_dim)
