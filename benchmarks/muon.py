"""Muon, for `optimizers.py`: a step in which all directions of a matrix count alike.

A gradient G of a matrix is a sum of directions of very different sizes, G = U S V^T. AdamW divides
each weight by the size of its own gradient, Muon (Keller Jordan, 2024) each direction by its size:
it replaces G by U V^T. For a weight W with momentum m, in each step

    m = 0.95 m + 0.05 g            W = W - rate decay W
    n = 0.05 g + 0.95 m            W = W - rate 0.2 sqrt(longest side) orthogonalise(n)

The second mean looks one step ahead (Nesterov). An orthogonal matrix of n rows and m columns, m the
longer side, has a root mean square of 1 / sqrt(m); times 0.2 sqrt(m) it is 0.2, about that of a
step of AdamW, so the same rates suit both (Liu et al., arXiv 2502.16982).

Only the matrices between two activations are orthogonalised. Embeddings, biases, norms and the
table of the relative positions go to AdamW, at a rate of their own.
"""

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from annotated_mpnet.mpnet.config import OptimizationConfig
from annotated_mpnet.mpnet.optimizer import build_optimizer

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
SCALE = 0.2
STACKED = "in_proj_weight"
"""The queries', keys' and values' matrices of a layer, one below the other."""


class Muon(Optimizer):
    """Muon for the matrices of a network, AdamW for its other parameters.

    The loop sets one rate, AdamW's; that of the matrices is `ratio` times as large.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimizationConfig,
        ratio: float,
        dtype: torch.dtype = torch.bfloat16,
        momentum: float = 0.95,
    ) -> None:
        found = hidden_matrices(model)
        chosen = {id(each) for each in found.values()}
        rest = nn.ParameterList(each for each in model.parameters() if id(each) not in chosen)
        self.adamw = build_optimizer(rest, config, rest[0].device)
        self._parts = {weight: 3 if STACKED in name else 1 for name, weight in found.items()}
        self._dtype = dtype
        group = {"params": list(found.values()), "weight_decay": config.weight_decay}
        super().__init__([group], {"lr": config.lr, "ratio": ratio, "momentum": momentum})
        # The same dictionaries, so both see the rate that the loop sets.
        self.param_groups += self.adamw.param_groups

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step of both."""
        self.adamw.step()
        group = self.param_groups[0]
        rate, momentum = group["lr"] * group["ratio"], group["momentum"]
        weights = [each for each in group["params"] if each.grad is not None]
        for weight in weights:
            if weight not in self.state:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
        gradients: list[Tensor] = [each.grad for each in weights]
        means: list[Tensor] = [self.state[each]["momentum"] for each in weights]
        torch._foreach_lerp_(means, gradients, 1 - momentum)
        ahead = torch._foreach_lerp(gradients, means, momentum)
        torch._foreach_mul_(weights, 1 - rate * group["weight_decay"])
        steps = self._orthogonalise(weights, list(ahead))
        for weight, step in zip(weights, steps, strict=True):
            longest = max(weight.shape[0] // self._parts[weight], weight.shape[1])
            weight.add_(step, alpha=-rate * SCALE * longest**0.5)

    def _orthogonalise(self, weights: list[nn.Parameter], ahead: list[Tensor]) -> list[Tensor]:
        """Orthogonalise each matrix, all of one shape at once."""
        wide: dict[torch.Size, list[Tensor]] = {}
        where: list[list[tuple[torch.Size, int, bool]]] = []
        for weight, matrix in zip(weights, ahead, strict=True):
            places = []
            for part in matrix.chunk(self._parts[weight]):
                tall = part.shape[0] > part.shape[1]
                lying = part.T if tall else part
                same = wide.setdefault(lying.shape, [])
                places.append((lying.shape, len(same), tall))
                same.append(lying)
            where.append(places)
        done = {
            shape: newton_schulz(torch.stack(each).to(self._dtype)) for shape, each in wide.items()
        }
        return [
            torch.cat(
                [done[shape][i].T if tall else done[shape][i] for shape, i, tall in places]
            ).float()
            for places in where
        ]


def newton_schulz(matrices_NRC: Tensor) -> Tensor:
    """Bring the singular values of each matrix near 1; directions stay.

    An odd polynomial of a matrix X, written with X X^T, changes its singular values and nothing
    else. So p(x) = 3.4445 x - 4.775 x^3 + 2.0315 x^5, applied five times, does with products what
    an SVD would. p is steep at 0, so small values grow fast; near 1 it does not settle:

    >>> values = torch.tensor([1.0, 0.3, 0.1, 0.01])
    >>> newton_schulz(torch.diag(values)[None])[0].diag()
    tensor([0.7525, 0.9263, 0.6849, 0.6842])
    """
    a, b, c = COEFFICIENTS
    # Afterwards no singular value is larger than 1.
    x = matrices_NRC / matrices_NRC.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def hidden_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the matrices with an activation on both sides, by name."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {
        name: each
        for name, each in model.named_parameters()
        if each.dim() == 2 and id(each) not in tables
    }
