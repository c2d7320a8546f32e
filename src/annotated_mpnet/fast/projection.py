"""The product with the vocabulary, in a shape that a GPU is fast at.

Tensor cores read rows in pieces of 16 bytes, 8 numbers in bfloat16. MPNet's vocabulary has 30,527
tokens, so the rows of logits begin anywhere, and the GPU takes kernels that are several times
slower. Here the product has a few more columns, which are -inf: tokens that cannot be, and that get
no gradient.

>>> import torch
>>> features, weight, bias = torch.ones(1, 3), torch.ones(5, 3), torch.arange(5.0)
>>> padded = padded_linear(features, weight, bias)
>>> padded.shape, padded[:, :5], padded[:, 5:].max()
(torch.Size([1, 64]), tensor([[3., 4., 5., 6., 7.]]), tensor(-inf))
>>> torch.allclose(padded.softmax(1)[:, :5], F.linear(features, weight, bias).softmax(1))
True
"""

import torch.nn.functional as F
from torch import Tensor

MULTIPLE = 64
"""Of this many tokens, for every tile of the kernels."""


def padded_linear(features: Tensor, weight_VD: Tensor, bias_V: Tensor) -> Tensor:
    """Return what `F.linear` does, to rounding, and up to 63 columns of -inf."""
    extra = -len(weight_VD) % MULTIPLE
    weight = F.pad(weight_VD, (0, 0, 0, extra))
    return F.linear(features, weight, F.pad(bias_V, (0, extra), value=float("-inf")))
