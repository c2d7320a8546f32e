"""Gradient checkpointing: the same numbers with less memory."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from samples import INPUT_MODES, TINY, random_batch, random_model
from torch.profiler import ProfilerActivity, profile

from annotated_mpnet.mpnet.batch import Batch
from annotated_mpnet.mpnet.config import InputMode, ModelConfig
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining

DROPPING = dataclasses.replace(TINY, dropout=0.2, attention_dropout=0.1, activation_dropout=0.3)


def loss_and_gradients(
    config: ModelConfig, batch: Batch, input_mode: InputMode, *, recompute: bool, bf16: bool = False
) -> list[torch.Tensor]:
    """Return the loss, all gradients, and the next random number after a training step."""
    model = random_model(config).train()
    model.use_gradient_checkpointing(recompute)
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model.loss_sum(batch, input_mode)
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = [parameter.grad for parameter in model.parameters()]
    return [loss.detach(), *(each for each in gradients if each is not None), torch.rand(())]


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("input_mode", INPUT_MODES)
def test_loss_and_every_gradient_have_the_same_bits(input_mode: InputMode, pre_norm: bool) -> None:
    config = dataclasses.replace(DROPPING, normalize_before=pre_norm)
    batch = random_batch(1, [14, 20, 9], [3, 5, 1], input_mode=input_mode)
    plain = loss_and_gradients(config, batch, input_mode, recompute=False)
    again = loss_and_gradients(config, batch, input_mode, recompute=True)
    # The last number shows that the generator's state is the same too.
    assert len(plain) == len(again) == 2 + len(list(random_model(config).parameters()))
    assert all(map(torch.equal, plain, again))


def test_under_autocast_recomputation_runs_in_bfloat16_too() -> None:
    batch = random_batch(1, [14, 20], [3, 5])
    plain = loss_and_gradients(DROPPING, batch, "mpnet", recompute=False, bf16=True)
    again = loss_and_gradients(DROPPING, batch, "mpnet", recompute=True, bf16=True)
    exact = loss_and_gradients(DROPPING, batch, "mpnet", recompute=True)
    assert all(map(torch.equal, plain, again))
    assert not torch.equal(again[0], exact[0])


def test_dropout_would_differ_without_restoring_the_generator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # So the test above can fail.
    from annotated_mpnet.mpnet import encoder

    checkpoint = encoder.checkpoint

    def forgetful(*arguments: object, **options: object) -> torch.Tensor:
        return checkpoint(*arguments, **{**options, "preserve_rng_state": False})

    monkeypatch.setattr(encoder, "checkpoint", forgetful)
    batch = random_batch(1, [14, 20], [3, 5])
    plain = loss_and_gradients(DROPPING, batch, "mpnet", recompute=False)
    again = loss_and_gradients(DROPPING, batch, "mpnet", recompute=True)
    assert torch.equal(plain[0], again[0])
    assert not all(map(torch.equal, plain, again))


def peak_bytes(work: Callable[[], object]) -> int:
    """Return the peak of allocated memory above that at the start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    kineto = profiler.profiler
    assert kineto is not None
    assert kineto.kineto_results is not None
    events = [e for e in kineto.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


# PyTorch 2.11 warns about its own default.
@pytest.mark.filterwarnings("ignore:.*Profiler clears events:UserWarning")
def test_memory_grows_by_a_layers_input_instead_of_its_activations() -> None:
    # The memory per layer, from the difference between 3 and 9 layers, without gradients, which are
    # stored in any case.
    batch = random_batch(1, [40] * 8, [6] * 8)
    grown = {}
    for recompute in (False, True):
        peaks = []
        for layers in (3, 9):
            model = random_model(dataclasses.replace(DROPPING, encoder_layers=layers)).train()
            model.use_gradient_checkpointing(recompute)
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            peaks.append(peak_bytes(lambda model=model: step(model, batch)))  # type: ignore[misc]
        grown[recompute] = (peaks[1] - peaks[0]) / 6
    # 8 sentences of 40 + 2 x 6 entries, 16 wide, in float32.
    layer_input = 8 * 52 * 16 * 4
    assert layer_input <= grown[True] < 2 * layer_input
    assert grown[False] > 10 * grown[True]


def step(model: MPNetForPretraining, batch: Batch) -> None:
    model.loss_sum(batch).backward()  # type: ignore[no-untyped-call]


def test_encode_and_evaluation_are_not_affected() -> None:
    model, batch = random_model(TINY), random_batch(1, [14, 20], [3, 5])
    with torch.no_grad():
        plain = model.loss_sum(batch), model.encode(batch.input_ids, batch.attention_mask)
        model.use_gradient_checkpointing(True)
        again = model.loss_sum(batch), model.encode(batch.input_ids, batch.attention_mask)
    assert all(map(torch.equal, plain, again))
