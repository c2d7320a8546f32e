"""The optimizer: AdamW, which parameters decay, and the learning rate as a function of the update.

AdamW keeps two running means for each weight, of its gradient (`exp_avg`, m) and of its square
(`exp_avg_sq`, v), and moves the weight w by

    m = beta1 m + (1 - beta1) g          v = beta2 v + (1 - beta2) g^2
    w = w - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps) - lr decay w

so every weight takes steps of about lr, whatever the size of its gradients. Paper, section 3.1:
betas 0.9 and 0.98, eps 1e-6, decay 0.01, peak lr 6e-4.

The learning rate rises in a straight line, because the means know nothing yet and large steps along
them would go anywhere, and then falls polynomially (by default in a straight line again). It is a
function of the update's number alone: no scheduler object, no state to save, and a resume cannot
be off by one.

>>> config = OptimizationConfig(total_updates=20, warmup_updates=5, lr=1.0)
>>> print(picture(config))
1.00     ##
0.80    ######
0.60   ##########
0.40  ##############
0.20 ##################
     01234567890123456789

fairseq: decays every parameter, biases and norms too. HF: the Trainer exempts all that has "bias"
in its name, which with MPNet takes in the table `relative_attention_bias`, a matrix of 32 buckets
by heads. Ours is a rule of shape: what has one dimension does not decay, all else does.

Next: `checkpoint.py`, which saves the means.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from annotated_mpnet.config import OptimizationConfig
from annotated_mpnet.errors import CheckpointError

STATE_NAMES = ("exp_avg", "exp_avg_sq", "step")
"""What AdamW keeps for a parameter: two means of its shape, and its count of steps, a scalar."""

ParameterGroup = dict[str, list[nn.Parameter] | float]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[ParameterGroup]:
    """Split a model's trainable parameters into those that decay and those that do not.

    Decay pulls a weight towards zero. For a matrix that is a preference for small functions. A
    bias or the gain of a norm, though, scales or shifts a whole feature: zero is no simpler than
    another value, and a norm's gain would be pulled away from its neutral 1.
    """
    parameters = [each for each in model.parameters() if each.requires_grad]
    return [
        {
            "params": [each for each in parameters if each.dim() > 1],
            "weight_decay": weight_decay,
        },
        {
            "params": [each for each in parameters if each.dim() <= 1],
            "weight_decay": 0.0,
        },
    ]


def build_optimizer(
    model: nn.Module, config: OptimizationConfig, device: torch.device
) -> Optimizer:
    """Return AdamW over a model that is already on its device.

    Fused, one kernel does the whole update of many parameters; `foreach`, one kernel does one
    operation of it. The plain loop over parameters launches thousands.
    """
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
    """Return the learning rate of an update; the first update of a run is number 0.

    The warm-up ends with update W - 1, the first at the peak. The decay begins with update W and
    would arrive at `end_learning_rate` with update T = `total_updates`, one past the last: so no
    update of the run is wasted on a rate of zero, at either end.

    >>> config = OptimizationConfig(total_updates=100, warmup_updates=10, lr=1.0)
    >>> [round(learning_rate(update, config), 3) for update in (0, 4, 9, 10, 55, 99, 100)]
    [0.1, 0.5, 1.0, 1.0, 0.5, 0.011, 0.0]

    fairseq: the same polynomial; its warm-up has lr / W twice, for updates 0 and 1, and is one
    update late from there on.
    """
    warmup, total = config.effective_warmup_updates, config.total_updates
    if update < warmup:
        return config.lr * (update + 1) / warmup
    if update >= total:
        return config.end_learning_rate
    remaining = 1 - (update - warmup) / (total - warmup)
    span = config.lr - config.end_learning_rate
    return config.end_learning_rate + span * math.pow(remaining, config.power)


def picture(config: OptimizationConfig, height: int = 5) -> str:
    """Draw the schedule, a column an update; a `#` where the rate reaches the line's value."""
    rates = [learning_rate(update, config) for update in range(config.total_updates)]
    lines = []
    for level in range(height, 0, -1):
        value = config.lr * level / height
        # The tolerance lets 0.6000000000000001 count as reached by 0.6.
        row = "".join("#" if rate > value * (1 - 1e-9) else " " for rate in rates)
        lines.append(f"{value:.2f} {row}".rstrip())
    digits = "".join(str(update % 10) for update in range(config.total_updates))
    return "\n".join([*lines, f"     {digits}"])


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Set the learning rate of the next step, for all groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def optimizer_tensors(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Return AdamW's state under flat names, such as `exp_avg.lm_head.bias`; empty before the
    first step.

    PyTorch numbers parameters in the order of the groups, so that its own state dict means
    something else as soon as a group changes. Names do not. The tensors are the optimizer's own:
    save them before the next step, or copy them.

    Raises:
        RuntimeError: some parameters had steps and others had none. Such a state would be refused
            on resume, so it must not be saved.
    """
    tensors = {}
    for name, parameter in _named_parameters(optimizer, model).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = value
    missing = _expected_shapes(optimizer, model).keys() - tensors.keys()
    if tensors and missing:
        raise RuntimeError(f"the optimizer has no {min(missing)}: a parameter without a gradient")
    return tensors


def load_optimizer_tensors(
    optimizer: Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    """Put back, to the bit, what `optimizer_tensors` returned; the tensors are copied.

    Learning rate, decay and betas stay as the optimizer was built: they are the configuration's.

    Raises:
        CheckpointError: a name is missing or unknown, or a shape or dtype is another one; nothing
            has been changed then.
    """
    if tensors:
        _check_tensors(_expected_shapes(optimizer, model), tensors)
    names = {parameter: name for name, parameter in _named_parameters(optimizer, model).items()}
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    state = {
        index: {key: tensors[f"{key}.{names[each]}"].clone() for key in STATE_NAMES}
        for index, each in enumerate(parameters)
        if tensors
    }
    # load_state_dict moves each tensor to where this kind of AdamW wants it: the step counts of the
    # fused one live on the parameter's device, the others' on the CPU.
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _named_parameters(optimizer: Optimizer, model: nn.Module) -> dict[str, nn.Parameter]:
    """Return name -> parameter for those that the optimizer moves; a tied one has one name."""
    moved = {each for group in optimizer.param_groups for each in group["params"]}
    return {name: each for name, each in model.named_parameters() if each in moved}


def _expected_shapes(optimizer: Optimizer, model: nn.Module) -> dict[str, torch.Size]:
    scalar = torch.Size([])
    return {
        f"{key}.{name}": scalar if key == "step" else parameter.shape
        for name, parameter in _named_parameters(optimizer, model).items()
        for key in STATE_NAMES
    }


def _check_tensors(expected: Mapping[str, torch.Size], tensors: Mapping[str, Tensor]) -> None:
    if strange := sorted(tensors.keys() ^ expected.keys()):
        name = strange[0]
        problem = "lacks" if name in expected else "has an unknown"
        raise CheckpointError(
            f"the optimizer's state {problem} {name!r:.80} (and {len(strange) - 1} more such "
            "names); it belongs to another network"
        )
    for name, shape in expected.items():
        found = tensors[name]
        if found.shape != shape or found.dtype != torch.float32:
            raise CheckpointError(
                f"the optimizer's state {name!r:.80} is {found.dtype} of shape "
                f"{tuple(found.shape)}, expected torch.float32 of shape {tuple(shape)}; it "
                "belongs to another network"
            )
