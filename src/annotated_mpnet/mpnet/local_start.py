"""The local start: why short runs get stuck on a plateau, and what ends it.

**The plateau.** A new masked language model quickly learns how often each token occurs. Then its
loss hardly moves for hundreds or thousands of updates, until it suddenly falls. Many short runs end
before that. MPNet-base on novels (sequences of 128 tokens, 128 per update, one H200), in bits per
predicted token on held-out text, where guessing by frequency needs 9.44:

    update                          100    300    600    900   1200
    N(0, 0.02), as in the paper    8.90   8.70   8.40   6.90   6.38
    the local start                7.30   6.12   5.43   5.01   4.80

**The reason.** To fill a gap, a model needs the words next to it. A head has to learn *where* to
look (queries, keys, relative position bias) and *what* to take from there (values, output). Each
waits for the other. A new network has scores close to zero, so a head spreads its attention evenly:
each of 64 tokens gets 1.6 %. What the head takes is the average of the sequence, which says little
about *this* gap. And while it does not matter what a head takes, it does not matter where it looks.

`python benchmarks/plateau.py` shows it, on the preset `demo`: what each head sees (mean attention
weight by distance, in percent), the length of the gradients on its values and on its column of the
table (times 1,000), and the loss on a batch of validation text, where guessing by frequency needs
about 9.24 bits. Two of the four heads:

    the paper's start         -3   -2   -1    0   +1   +2   +3     values   table
    update 0    9.47   head 0  2    2    2    2    2    2    2        5.7     0.1
    update 50   9.36   head 0  1    2    2    1    2    2    2       10.2     0.3
    update 250  9.14   head 0  2    2    2    1    2    2    2       21.7     1.2

    the local start           -3   -2   -1    0   +1   +2   +3     values   table
    update 0    9.47   head 0  3   10   69    9    3    1    1       22.0     0.2
                       head 1  1    1    3    9   70    9    3       22.8     0.1
    update 50   9.18   head 0  3    9   71    8    3    1    1       79.8     2.5
                       head 1  1    1    2    8   74    8    3       79.9     9.4
    update 250  7.59   head 0  4   10   62   12    4    1    1      180.3    10.4
                       head 1  1    1    4   14   63    9    3      192.2     3.9

With the paper's start the heads see the same at update 250 as at update 0, and at first the
gradient on the table is a sixtieth of that on the values. A head that sees one word gets four times
the gradient on its values at once. After 50 updates its values are worth something, and the
gradient on the table has grown more than tenfold: now it matters where the head looks.

**What ends the plateau.** MPNet has a parameter for preferring places, the relative position bias:
a number for each bucket of distances and each head, shared by all layers. The paper starts it with
noise. The local start adds, for a head that prefers the offset o,

    b(d) = -2 log2(1 + |d - o|)        d = key position - query position

(each bucket gets the mean over its distances). After the softmax, the weights fall with the power
2 / ln 2 = 2.9 of the distance from o. For head 0, in a sequence of 64 tokens and in percent:

>>> buckets = relative_position_bucket(torch.arange(-32, 32), num_buckets=32, max_distance=128)
>>> weights_W = local_bias(32, 128, num_heads=4)[buckets, 0].softmax(dim=0)
>>> [round(100 * weight) for weight in weights_W[29:34].tolist()]  # distances -3 to 1
[3, 9, 69, 9, 3]

Of every four heads, one prefers the left neighbour, one the right, and two start as in the paper.
Training can change the table like any other parameter.

**Why these heads?** Because training ends there anyway. After 6,000 updates from the paper's start,
a model of the preset `tiny`'s shape has one head of four with +3.1 on its left neighbour and one
with +3.1 on its right. Started locally, it is ahead all the way (4.63 bits in the end, not 4.81).
Heads that prefer both sides alike leave the plateau later. `docs/log.md` has all that was tried.
Long runs of MPNet-base have not been measured.

The same start works in Hugging Face's `MPNetForMaskedLM`, which has the same buckets:
`model.mpnet.encoder.relative_attention_bias.weight.data += local_bias(32, 128, num_heads)`.

Related: ConViT (arXiv 2103.10697) and ALiBi (2108.12409); 2309.07311 on the sudden fall of a loss.

Next: `mpnet/attention.py` adds the bias to the scores.
"""

import torch
from torch import Tensor

from annotated_mpnet.mpnet.positions import RelativePositionBias, relative_position_bucket

STRENGTH = 2.0
"""Of 1, 2 and 4, 2 and 4 work equally well, and 1 slightly worse."""

PREFERRED_OFFSETS = (-1, 1, None, None)
"""The heads take these in turn; None starts free."""


def local_bias(num_buckets: int, max_distance: int, num_heads: int) -> Tensor:
    """Return the bias of the local start (S, H), on the CPU.

    A bucket gets the mean over its distances up to `max_distance`, or 0 if it has none.
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
    """Add the local start to a table that holds the paper's noise."""
    table.weight += local_bias(table.num_embeddings, table.max_distance, table.embedding_dim)
