"""The optimizer: AdamW, which parameters decay, and the learning rate as a function of the update.

AdamW keeps two running means for each weight, of its gradient (`exp_avg`, m) and of its square
(`exp_avg_sq`, v), and moves the weight w by

    m = beta1 m + (1 - beta1) g          v = beta2 v + (1 - beta2) g^2
    w = w - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps) - lr decay w

where t counts the steps, g is the gradient, and the divisions by 1 - beta^t make up for the means
having started at zero: after the first step m is (1 - beta1) g, and divided it is g. So the first
step has the length lr, whatever the size of the gradient, as long as it is large beside eps. Three
weights at zero, gradients a billion times apart:

>>> network = nn.Linear(3, 1, bias=False)
>>> network.weight.data.zero_()
tensor([[0., 0., 0.]])
>>> config = OptimizationConfig(lr=0.1, warmup_updates=0)
>>> optimizer = build_optimizer(network, config, torch.device("cpu"))
>>> network.weight.grad = torch.tensor([[1000.0, 1.0, 0.000001]])
>>> optimizer.step()
>>> network.weight.data
tensor([[-0.1000, -0.1000, -0.0500]])

That is what a Transformer needs, of which the embedding of a rare word has gradients far smaller
than a LayerNorm's; and it is why the *length* of a step is the schedule's business alone.

Paper, section 3.1: betas 0.9 and 0.98, eps 1e-6, decay 0.01, peak lr 6e-4. A mean with beta looks
back over about 1 / (1 - beta) updates: 10 for the direction, 50 for the scale. The price of the two
means is 8 bytes a weight: twice what the weights take, in memory and in each checkpoint.

**The schedule.** The learning rate rises in a straight line, because the means know nothing yet and
large steps along them would go anywhere, and then falls polynomially (by default in a straight line
again):

    update u < W:        lr (u + 1) / W
    W <= u < T:          end + (lr - end) (1 - (u - W) / (T - W))^power

with W = `warmup_updates`, T = `total_updates`, end = `end_learning_rate`, and u counted from 0. It
is a function of the update's number alone: no scheduler object, no state to save, and a resume
cannot be off by one.

>>> config = OptimizationConfig(total_updates=20, warmup_updates=5, lr=1.0)
>>> print(picture(config))
1.00     ##
0.80    ######
0.60   ##########
0.40  ##############
0.20 ##################
     01234567890123456789

**`end_learning_rate` is not the rate of the last update.** It is where the line arrives at u = T,
and the last update is T - 1: one step above the end. Update 19 of the picture, which ends at 0,
still has 1/15 of the peak. fairseq does the same, and it is worth having: with an end of 0, an
update at that rate would read a batch and move nothing.

>>> config = OptimizationConfig(total_updates=20, warmup_updates=5, lr=1.0, end_learning_rate=0.1)
>>> [round(learning_rate(update, config), 3) for update in (18, 19, 20)]
[0.22, 0.16, 0.1]

**What decays.** fairseq: decays every parameter, biases and norms too. HF: the Trainer exempts all
that has "bias" in its name, which with MPNet takes in the table `relative_attention_bias`, a matrix
of 32 buckets by heads. Ours is a rule of shape: what has one dimension does not decay, all else
does.

The decay stands outside of the fraction (the W of AdamW): divided by sqrt(v) like a gradient, as in
plain Adam with an L2 penalty, the weights with the largest gradients would decay least. It is
multiplied by lr, so that it warms up and dies away with the steps.

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

    >>> model = nn.Sequential(nn.Embedding(9, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    >>> for group in parameter_groups(model, 0.01):
    ...     print(group["weight_decay"], [tuple(each.shape) for each in group["params"]])
    0.01 [(9, 4), (2, 4)]
    0.0 [(4,), (4,), (2,)]

    A frozen parameter is in neither: it would decay although it never gets a gradient. A tied one
    (the token embeddings are the head's matrix too) is one parameter, and takes one step.
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

    Rate, betas, eps and decay are the configuration's, on a resume too; only means and step counts
    come from a checkpoint (`load_optimizer_tensors`).

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

    The warm-up ends with update W - 1, the first at the peak. The decay begins with update W, still
    at the peak, and would arrive at `end_learning_rate` with update T = `total_updates`, one past
    the last: so no update of the run is wasted on a rate of zero, at either end.

    >>> config = OptimizationConfig(total_updates=100, warmup_updates=10, lr=1.0)
    >>> [round(learning_rate(update, config), 3) for update in (0, 4, 9, 10, 55, 99, 100)]
    [0.1, 0.5, 1.0, 1.0, 0.5, 0.011, 0.0]

    fairseq: the same polynomial. fairseq and HF: the warm-up begins with u / W, so that the first
    update has the rate 0 and moves nothing.

    Args:
        update: from 0; behind the last one the rate stays at `end_learning_rate`.
        config: `effective_warmup_updates` of 0 starts at the peak, of T never leaves the warm-up.
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
    """Set the learning rate of the next step, for all groups.

    The groups differ in decay and in nothing else; each keeps a rate of its own, and `step` reads
    those, so that one that was forgotten would go on with the rate of the first update.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate


def optimizer_tensors(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Return AdamW's state under flat names, such as `exp_avg.lm_head.bias`; empty before the
    first step.

    PyTorch numbers parameters in the order of the groups, so that its own state dict means
    something else as soon as a group changes: thaw one bias, and all numbers behind it are another
    parameter's, of which some have the same shape. Names do not. And a flat dictionary of tensors
    is what safetensors can hold, which knows no nesting and runs no code.

    The tensors are the optimizer's own: save them before the next step, or copy them.

    Raises:
        RuntimeError: some parameters had steps and others had none. Such a state would be refused
            on resume, so it must not be saved.
    """
    # `get`, for the state is a defaultdict: asked with [], it would make an entry, and reading must
    # not change what is read.
    tensors = {
        f"{key}.{name}": value
        for name, parameter in _named_parameters(optimizer, model).items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    missing = _expected_shapes(optimizer, model).keys() - tensors.keys()
    if tensors and missing:
        raise RuntimeError(f"the optimizer has no {min(missing)}: a parameter without a gradient")
    return tensors


def load_optimizer_tensors(
    optimizer: Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    """Put back, to the bit, what `optimizer_tensors` returned; the tensors are copied.

    Learning rate, decay and betas stay as the optimizer was built: they are the configuration's.
    PyTorch's own state dict holds them too, and would quietly put the former ones back.

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
    """Return name -> parameter for those that the optimizer moves; a tied one has one name.

    `named_parameters` gives each tensor once, under the first name by which it comes to it: the
    embeddings are `sentence_encoder.embed_tokens.weight`, in each run and version alike.
    """
    moved = {each for group in optimizer.param_groups for each in group["params"]}
    return {name: each for name, each in model.named_parameters() if each in moved}


def _expected_shapes(optimizer: Optimizer, model: nn.Module) -> dict[str, torch.Size]:
    """Return the name and shape of everything that a state has after a step."""
    scalar = torch.Size([])
    return {
        f"{key}.{name}": scalar if key == "step" else parameter.shape
        for name, parameter in _named_parameters(optimizer, model).items()
        for key in STATE_NAMES
    }


def _check_tensors(expected: Mapping[str, torch.Size], tensors: Mapping[str, Tensor]) -> None:
    """Refuse a state that is not exactly this network's, before anything of it is put back.

    PyTorch does not look at the shapes when it loads a state, and fails, at best, in the next step.
    """
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
