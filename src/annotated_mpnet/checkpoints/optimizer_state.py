"""The optimizer's state as a flat dictionary of tensors, `exp_avg.lm_head.bias` and so on.

PyTorch's own state dict numbers the parameters in the order of their groups. Its numbers change
their meaning as soon as a group changes: after one bias is unfrozen, every later number belongs to
another parameter, sometimes of the same shape. Names do not change. And a flat dictionary is what
safetensors can hold.

Learning rate, decay and betas are not part of it. They come from the configuration, on a resume
too.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from annotated_mpnet.errors import CheckpointError

STATE_NAMES = ("exp_avg", "exp_avg_sq", "step")
"""What AdamW keeps for each parameter: two means of its shape, and a count of steps, a scalar. A
group with another state has its names as `state_names` (`training/muon.py`)."""


def optimizer_tensors(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Return the state by name; empty before the first step.

    The tensors are the optimizer's own: copy them before the next step.

    Raises:
        RuntimeError: a parameter had no gradient yet. A resume would refuse this state.
    """
    slots = _slots(optimizer, model)
    # `get`, because the state is a defaultdict: [] would add an entry.
    tensors = {
        name: optimizer.state[parameter][key]
        for name, (parameter, key) in slots.items()
        if key in optimizer.state.get(parameter, {})
    }
    if tensors and (missing := slots.keys() - tensors.keys()):
        raise RuntimeError(f"the optimizer has no {min(missing)}: a parameter without a gradient")
    return tensors


def load_optimizer_tensors(
    optimizer: Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    """Restore what `optimizer_tensors` returned, bit for bit. The tensors are copied.

    Raises:
        CheckpointError: the state belongs to another network; nothing has been changed.
    """
    # PyTorch does not check the shapes, and would fail in the next step at best.
    slots = _slots(optimizer, model) if tensors else {}
    expected = {
        name: torch.Size([]) if key == "step" else parameter.shape
        for name, (parameter, key) in slots.items()
    }
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if different := sorted(dict(found.items() ^ expected.items())):
        name = different[0]
        saved, now = _optimizer_of(found), _optimizer_of(expected)
        if saved != now:
            raise CheckpointError(
                f"the checkpoint was trained with --optimizer {saved}, and this run has "
                f"--optimizer {now}, which would start with empty means; resume with {saved}, or "
                "start a new run from its weights (convert-to-hf, then --hf-model-path)"
            )
        raise CheckpointError(
            f"the optimizer's state {name!r:.80} has {_shape(found, name)}, expected "
            f"{_shape(expected, name)} (and {len(different) - 1} more differences); it belongs to "
            "another network"
        )
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    index_of = {each: index for index, each in enumerate(parameters)}
    state: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for name, (parameter, key) in slots.items():
        state[index_of[parameter]][key] = tensors[name].clone()
    # `load_state_dict` moves each tensor to the device where this kind of AdamW wants it. With the
    # optimizer's own groups, rates and decay stay as configured.
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _slots(optimizer: Optimizer, model: nn.Module) -> dict[str, tuple[nn.Parameter, str]]:
    """Return what an optimizer keeps after its first step: name -> parameter, key of its state.

    A tied parameter has one name.
    """
    keys = {
        each: group.get("state_names", STATE_NAMES)
        for group in optimizer.param_groups
        for each in group["params"]
    }
    return {
        f"{key}.{name}": (parameter, key)
        for name, parameter in model.named_parameters()
        for key in keys.get(parameter, ())
    }


def _shape(shapes: Mapping[str, torch.Size], name: str) -> str:
    return f"shape {tuple(shapes[name])}" if name in shapes else "no tensor"


def _optimizer_of(names: Iterable[str]) -> str:
    """Return which --optimizer keeps a state of these names."""
    return "muon" if any(name.startswith("momentum.") for name in names) else "adamw"
