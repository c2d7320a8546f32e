"""Muon: an optimizer for the matrices of the network, after which all directions count alike.

A matrix W turns the activations x of one layer into those of the next. Its gradient G is a sum of
directions ("if the input looks like v, more of u"), which the singular value decomposition lists
with their sizes: G = U S V^T. A few are large and most are small: what all tokens have in common
drowns what only some have. AdamW divides each *weight* by the size of its own gradient and leaves
that as it is. Muon (Keller Jordan, 2024) divides each *direction* by its size. It keeps a mean of
the gradients and steps along the nearest orthogonal matrix, U V^T:

    m = 0.95 m + 0.05 g                     the mean, over about 20 updates
    n = 0.95 m + 0.05 g                     the same, looking one step ahead (Nesterov)
    W = W - r decay W - r 0.2 sqrt(longest side) orthogonalise(n)

**Newton-Schulz.** An SVD is slow, on a GPU above all. But an odd polynomial of a matrix,
p(X) = a X + b (X X^T) X + c (X X^T)^2 X, changes the singular values and nothing else, because
between each U S V^T and the next, V^T V cancels. With a = 3.4445, b = -4.775 and c = 2.0315, and X
divided by its norm so that no value is above 1, five rounds bring all but the smallest near 1:

>>> values = torch.tensor([1.0, 0.3, 0.1, 0.01, 0.001])
>>> for rounds in (0, 1, 3, 5):
...     found = newton_schulz(values.diag()[None], rounds)[0].diag()
...     print(*(f"{value:.3f}" for value in found))
0.953 0.286 0.095 0.010 0.001
0.746 0.877 0.324 0.033 0.003
0.682 0.891 0.737 0.382 0.039
0.752 0.926 0.685 0.684 0.450

p is so steep at 0 that small values more than triple in each round. The price is that it does not
settle at 1, which does no harm: the step needs no favourites, not an exact length.

**The rate** r. An orthogonal matrix with n columns and at most as many rows has a root mean square
of 1 / sqrt(n). Times 0.2 sqrt(n) that is 0.2, about what a step of AdamW has, so that matrices of
all shapes, and all that is left to AdamW, want rates of the same size (Liu et al., arXiv
2502.16982). Here r is `--muon-lr`, by default twice `--lr`, which was best in both presets tried.

**What goes to Muon**: the weights of the projections, of the feed-forward nets and of the head's
dense layer. The queries', keys' and values' weights are one parameter, but three matrices, so they
are orthogonalised one by one. Embeddings, the relative position table, biases and norms stay with
AdamW: a row of a table is a vector of its own, not a direction of something shared.

**Clipping** (`mpnet/loop.py`) shortens the gradient before it enters the mean. A step of Muon has
the same length whatever the gradient's, so this only says how much a single update counts in the
mean, as in AdamW's.

Measured against AdamW in docs/performance.md.

    N matrices of one shape   R rows   C columns, at least as many
"""

from collections import defaultdict

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from annotated_mpnet.mpnet.config import OptimizationConfig
from annotated_mpnet.mpnet.optimizer import build_optimizer, learning_rate
from annotated_mpnet.training.distributed import full_tensor, shard

MOMENTUM = 0.95
SCALE = 0.2
ROUNDS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STACKED = "in_proj_weight"
"""The end of the name of a parameter that holds queries', keys' and values' matrices."""


def choose_optimizer(
    model: nn.Module, config: OptimizationConfig, device: torch.device
) -> Optimizer:
    """Return the optimizer of `--optimizer`, for a model that is already on its device."""
    build = Muon if config.optimizer == "muon" else build_optimizer
    return build(model, config, device)


def matrix_rate(config: OptimizationConfig) -> float:
    """Return the peak learning rate of Muon's matrices."""
    return 2 * config.lr if config.muon_lr is None else config.muon_lr


class Muon(AdamW):
    """Muon for the hidden matrices of a network, AdamW for all else.

    The last group has the matrices. For each of them the state is `momentum` alone, half of what
    AdamW keeps.
    """

    def __init__(self, model: nn.Module, config: OptimizationConfig, device: torch.device) -> None:
        hidden = hidden_matrices(model)
        matrices = set(hidden.values())
        rest = nn.ParameterList(each for each in model.parameters() if each not in matrices)
        super().__init__(build_optimizer(rest, config, device).param_groups)
        self.add_param_group(
            {
                "params": list(hidden.values()),
                "lr": learning_rate(0, config),
                "weight_decay": config.weight_decay,
                "factor": matrix_rate(config) / config.lr,
                "state_names": ("momentum",),
            }
        )
        self._pieces = {each: 3 if name.endswith(STACKED) else 1 for name, each in hidden.items()}
        self._dtype = fastest_dtype(device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step; a parameter without a gradient takes none."""
        *rest, group = self.param_groups
        self.param_groups = rest
        try:
            super().step()
        finally:
            self.param_groups = [*rest, group]
        weights = [each for each in group["params"] if each.grad is not None]
        for each in weights:
            if not self.state[each]:
                self.state[each]["momentum"] = torch.zeros_like(each)
        means = [self.state[each]["momentum"] for each in weights]
        gradients = [each.grad for each in weights]
        # On a GPU 1 after a NaN, and then nothing may change (`training/trainer.py`).
        halted = getattr(self, "found_inf", None)
        rate = group["lr"] * group["factor"]
        if halted is not None:
            gradients = [g.where(halted == 0, m) for g, m in zip(gradients, means, strict=True)]
        torch._foreach_lerp_(means, gradients, 1 - MOMENTUM)
        ahead = list(torch._foreach_lerp(gradients, means, MOMENTUM))
        for weight, step in zip(weights, self._orthogonalise(weights, ahead), strict=True):
            longest = max(weight.shape[0] // self._pieces[weight], weight.shape[1])
            kept = weight * (1 - rate * group["weight_decay"])
            moved = kept - step * (rate * SCALE * longest**0.5)
            weight.copy_(moved if halted is None else moved.where(halted == 0, weight))

    def _orthogonalise(self, weights: list[nn.Parameter], ahead: list[Tensor]) -> list[Tensor]:
        """Orthogonalise the matrices of each weight, all those of one shape at once."""
        pieces = [self._pieces[each] for each in weights]
        # Of shards, each rank gathers the whole: a part of a matrix has other directions.
        parts = [
            part
            for matrix, count in zip(ahead, pieces, strict=True)
            for part in full_tensor(matrix).chunk(count)
        ]
        alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, part in enumerate(parts):
            alike[tuple(sorted(part.shape))].append(i)
        for indices in alike.values():
            wide_NRC = torch.stack([_wide(parts[i]) for i in indices]).to(self._dtype)
            for i, done in zip(indices, newton_schulz(wide_NRC), strict=True):
                parts[i] = done if parts[i].shape == done.shape else done.T
        each = iter(parts)
        return [
            shard(torch.cat([next(each) for _ in range(count)]).float(), like=weight)
            for weight, count in zip(weights, pieces, strict=True)
        ]

    def __setstate__(self, state: dict[str, object]) -> None:
        # AdamW's own expects a count of steps for each parameter.
        Optimizer.__setstate__(self, state)


def _wide(matrix: Tensor) -> Tensor:
    """Return a matrix or its transpose, so that X X^T is the smaller of its two squares."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def newton_schulz(matrices_NRC: Tensor, rounds: int = ROUNDS) -> Tensor:
    """Bring the singular values of each matrix near 1, and keep its directions."""
    a, b, c = COEFFICIENTS
    # The norm is the root of the sum of the squared singular values.
    x_NRC: Tensor = matrices_NRC / matrices_NRC.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(rounds):
        square_NRR = x_NRC @ x_NRC.mT
        factor_NRR = torch.baddbmm(square_NRR, square_NRR, square_NRR, beta=b, alpha=c)
        x_NRC = torch.baddbmm(x_NRC, factor_NRR, x_NRC, beta=a)
    return x_NRC


def hidden_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable matrices that are not tables, by name.

    >>> model = nn.Sequential(nn.Embedding(9, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    >>> list(hidden_matrices(model))
    ['2.weight']
    """
    # The head's product with the token table is tied to the embedding, so it is a table too.
    tables = {each.weight for each in model.modules() if isinstance(each, nn.Embedding)}
    return {
        name: each
        for name, each in model.named_parameters()
        if each.dim() == 2 and each.requires_grad and each not in tables
    }


def fastest_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where products are faster in it; a rounded step is as good a step."""
    on_cpu = device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    fast = device.type == "cuda" or on_cpu
    return torch.bfloat16 if fast else torch.float32
