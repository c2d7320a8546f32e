"""The optimizer: AdamW, which parameters decay, and the learning rate of each update.

AdamW keeps two running means for each weight w: of its gradient g (`exp_avg`, m) and of the
gradient's square (`exp_avg_sq`, v). In step t = 1, 2, 3, ...

    m = beta1 m + (1 - beta1) g          v = beta2 v + (1 - beta2) g^2
    w = w - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps) - lr decay w

The divisions by 1 - beta^t correct for the means starting at zero: in the first step they turn m
back into g and v into g^2. So the first step has length lr whatever the size of the gradient, as
long as it is large compared with eps. Three weights at zero, gradients a billion times apart:

>>> network = nn.Linear(3, 1, bias=False)
>>> network.weight.data.zero_()
tensor([[0., 0., 0.]])
>>> config = OptimizationConfig(lr=0.1, warmup_updates=0)
>>> optimizer = build_optimizer(network, config, torch.device("cpu"))
>>> network.weight.grad = torch.tensor([[1000.0, 1.0, 0.000001]])
>>> optimizer.step()
>>> network.weight.data
tensor([[-0.1000, -0.1000, -0.0500]])

A Transformer needs this: the embedding of a rare word has far smaller gradients than a LayerNorm.
The length of a step is then up to the schedule alone.

Paper, section 3.1: betas 0.9 and 0.98, eps 1e-6, decay 0.01, peak lr 6e-4. A mean with beta covers
about 1 / (1 - beta) updates: 10 for the direction, 50 for the scale. The means cost 8 bytes per
weight, twice as much as the weights.

**The schedule.** The learning rate rises linearly, because the means know little yet, and then
falls, by default linearly again:

    update u < W:        lr (u + 1) / W
    W <= u < D:          lr
    D <= u < T:          end + (lr - end) r^power                     polynomial, wsd
                         end + (lr - end) (1 + cos(pi (1 - r))) / 2   cosine

with W = `warmup_updates`, T = `total_updates`, end = `end_learning_rate`, u from 0, and r = (T - u)
/ (T - D), the share of the decay that is left. The decay begins at D = W, or with wsd (warm-up,
stable, decay) `decay_updates` before the end. It is a function of the update's number: no
scheduler, no state, no resume that is off by one.

>>> config = OptimizationConfig(total_updates=20, warmup_updates=5, lr=1.0)
>>> print(picture(config))
1.00     ##
0.80    ######
0.60   ##########
0.40  ##############
0.20 ##################
     01234567890123456789

With wsd only the decay knows where the end is. So a checkpoint of the stable part can go on to any
total, and ends as a run would that was planned so (Hu et al., arXiv 2404.06395; Haegele et al.,
arXiv 2405.18392):

>>> config = OptimizationConfig(
...     total_updates=20, warmup_updates=5, lr=1.0, schedule="wsd", decay_updates=5
... )
>>> print(picture(config))
1.00     ############
0.80    ##############
0.60   ################
0.40  ##################
0.20 ####################
     01234567890123456789

The line reaches `end_learning_rate` at u = T, one step after the last update. fairseq does the
same; otherwise the last update of a run that ends at 0 would read a batch and change nothing.

>>> config = OptimizationConfig(total_updates=20, warmup_updates=5, lr=1.0, end_learning_rate=0.1)
>>> [round(learning_rate(update, config), 3) for update in (18, 19, 20)]
[0.22, 0.16, 0.1]

Next: `mpnet/loop.py`, which takes the steps.
"""

import math

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from annotated_mpnet.mpnet.config import OptimizationConfig

ParameterGroup = dict[str, list[nn.Parameter] | float]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[ParameterGroup]:
    """Split the trainable parameters into those that decay, which come first, and the others.

    Matrices and tables decay: smaller weights make a simpler function. Biases and the gains of
    norms do not: zero is no simpler for them than another value, and a gain's neutral value is 1.

    >>> model = nn.Sequential(nn.Embedding(9, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    >>> for group in parameter_groups(model, 0.01):
    ...     print(group["weight_decay"], [tuple(each.shape) for each in group["params"]])
    0.01 [(9, 4), (2, 4)]
    0.0 [(4,), (4,), (2,)]

    The decay is not divided by sqrt(v), as an L2 penalty in the loss would be: the weights with the
    largest gradients would then decay least.

    fairseq: everything decays. HF: the Trainer exempts every name with "bias" in it, and so also
    the matrix `relative_attention_bias`.
    """
    parameters = [each for each in model.parameters() if each.requires_grad]
    matrices = [each for each in parameters if each.dim() > 1]
    vectors = [each for each in parameters if each.dim() <= 1]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


def build_optimizer(
    model: nn.Module, config: OptimizationConfig, device: torch.device
) -> Optimizer:
    """Return AdamW for a model that is already on its device."""
    # Fused, one kernel updates many parameters at once. A loop over parameters starts thousands.
    fused = device.type in ("cpu", "cuda", "mps")
    return AdamW(
        parameter_groups(model, config.weight_decay),
        lr=learning_rate(0, config),
        betas=(config.beta1, config.beta2),
        eps=config.adam_eps,
        fused=fused,
        foreach=not fused,
    )


def learning_rate(update: int, config: OptimizationConfig) -> float:
    """Return the learning rate of an update, counted from 0.

    >>> config = OptimizationConfig(total_updates=100, warmup_updates=10, lr=1.0)
    >>> [round(learning_rate(update, config), 3) for update in (0, 4, 9, 10, 55, 99, 100)]
    [0.1, 0.5, 1.0, 1.0, 0.5, 0.011, 0.0]

    fairseq and HF: the warm-up starts with u / W, so the first update has rate 0.
    """
    warmup, total = config.effective_warmup_updates, config.total_updates
    first = config.first_decay_update
    if update < warmup:
        return config.lr * (update + 1) / warmup
    if update >= total:
        return config.end_learning_rate
    if update < first:
        return config.lr
    remaining = 1 - (update - first) / (total - first)
    if config.schedule == "cosine":
        share = (1 + math.cos(math.pi * (1 - remaining))) / 2
    else:
        share = math.pow(remaining, config.power)
    return config.end_learning_rate + (config.lr - config.end_learning_rate) * share


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Set the learning rate of the next step, for both groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def picture(config: OptimizationConfig, height: int = 5) -> str:
    """Draw the schedule: a column for each update, a `#` where its rate reaches the line's."""
    rates = [learning_rate(update, config) for update in range(config.total_updates)]
    lines = []
    for level in range(height, 0, -1):
        value = config.lr * level / height
        # The tolerance lets 0.6 reach 0.6000000000000001.
        columns = "".join("#" if rate > value * (1 - 1e-9) else " " for rate in rates)
        lines.append(f"{value:.2f} {columns}".rstrip())
    digits = "".join(str(update % 10) for update in range(config.total_updates))
    return "\n".join([*lines, f"     {digits}"])
