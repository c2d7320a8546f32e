"""The deferred check for GPUs: the same updates, and the same errors, raised later.

Here on a CPU. The immediate check: test_numerics.py. On two ranks: test_distributed.py.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from threading import current_thread, main_thread

import pytest
import torch
from test_distributed import batch, trainer_of
from test_numerics import assert_same, everything, spoil_gradient, spoil_loss
from torch.utils._python_dispatch import TorchDispatchMode

from annotated_mpnet.errors import DivergedError
from annotated_mpnet.mpnet.attention import EAGER, SDPA, Attention
from annotated_mpnet.mpnet.batch import Batch
from annotated_mpnet.settings.config import PretrainingConfig
from annotated_mpnet.training.distributed import World
from annotated_mpnet.training.loader import Update, pinned, prefetch
from annotated_mpnet.training.trainer import Trainer
from folders import checkpoint_tree
from tiny_run import TinyText, changed, run, tiny_config


@pytest.fixture
def looking_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each trainer check later, as on a GPU."""
    initialise = Trainer.__init__

    def later(self: Trainer, *arguments: object) -> None:
        initialise(self, *arguments)  # type: ignore[arg-type]
        self.look_later()

    monkeypatch.setattr(Trainer, "__init__", later)


def config_of(text: TinyText, directory: Path) -> PretrainingConfig:
    """Eight updates, checked only after the third, the sixth and the last."""
    return changed(
        tiny_config(text, directory),
        logging_steps=100,
        checkpoint_interval=3,
        eval_interval_steps=100,
        test_file=None,
        export_hf=False,
    )


def checkpoints_in(directory: Path) -> dict[str, dict[str, bytes]]:
    return {path.name: checkpoint_tree(path) for path in directory.glob("*checkpoint*")}


@pytest.fixture(scope="module")
def at_once(
    text: TinyText, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, bytes]]:
    config = config_of(text, tmp_path_factory.mktemp("at_once") / "run")
    run(config)
    return checkpoints_in(config.run.checkpoint_dir)


@pytest.mark.usefixtures("looking_later")
def test_updates_are_the_same_to_the_byte(
    text: TinyText, tmp_path: Path, at_once: dict[str, dict[str, bytes]]
) -> None:
    run(config_of(text, tmp_path / "run"))
    assert checkpoints_in(tmp_path / "run") == at_once
    assert at_once.keys() >= {"checkpoint3", "checkpoint6"}


@pytest.mark.usefixtures("looking_later")
@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("spoil", [spoil_loss, spoil_gradient])
def test_the_first_bad_update_is_named_and_nothing_is_saved_after_it(
    text: TinyText,
    tmp_path: Path,
    at_once: dict[str, dict[str, bytes]],
    spoil: Callable[[float, int, pytest.MonkeyPatch], None],
    value: str,
) -> None:
    # Update 4 is bad; the check comes after update 6, before its checkpoint.
    config = config_of(text, tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        spoil(float(value), 4, patch)
        with pytest.raises(DivergedError, match=r"of update 4 is (nan|inf)"):
            run(config)
    assert {path.name for path in (tmp_path / "run").glob("*checkpoint*")} == {"checkpoint3"}
    run(changed(config, resume=True))
    assert checkpoints_in(tmp_path / "run") == at_once


def test_no_update_is_applied_after_a_bad_one() -> None:
    trainer = trainer_of(World(), fsdp=False)
    trainer.look_later()
    for update in range(3):
        trainer.update(update, [batch(update, 3)])
    before = everything(trainer)
    parameter = next(trainer.model.parameters())
    hook = parameter.register_hook(lambda gradient: gradient * float("nan"))
    trainer.update(3, [batch(3, 3)])
    hook.remove()
    # After it, good updates change nothing either: moments, weights and step counts stay.
    for update in (4, 5):
        assert trainer.update(update, [batch(update, 3)]).gradient_norm.isfinite()
        assert_same(everything(trainer), before)
    with pytest.raises(DivergedError, match="gradient norm of update 4 is nan"):
        trainer.catch_up()


class NoReading(TorchDispatchMode):
    """Makes it an error to read a value from the device in a `with` block."""

    def __torch_dispatch__(
        self,
        operation: torch._ops.OpOverload,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        name = operation.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "equal"), name
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            indices = [each for each in args[1] if each is not None]  # type: ignore[attr-defined]
            assert not any(each.dtype == torch.bool for each in indices), name
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("attention", [SDPA, EAGER], ids=["sdpa", "eager"])
def test_an_update_reads_no_value_from_the_device(
    monkeypatch: pytest.MonkeyPatch, attention: Attention
) -> None:
    trainer = trainer_of(World(), fsdp=False)
    trainer.model.use_attention(attention)
    with monkeypatch.context() as patch:
        # On a CPU this is not an operation that the mode sees.
        patch.setattr(torch.Tensor, "tolist", lambda self: pytest.fail("tolist"))
        with NoReading(), pytest.raises(AssertionError, match="_local_scalar_dense"):
            trainer.update(0, [batch(0, 3)])
        trainer.look_later()
        with NoReading():
            for update in range(2):
                trainer.update(update, [batch(update, 3), batch(update + 1, 2)])
    trainer.catch_up()


def test_batches_for_a_gpu_are_pinned_by_the_thread_that_makes_them_and_are_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Pinned memory needs a GPU, so a fake copies and records the thread.
    callers, closed, devices = [], [], []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        callers.append(current_thread())
        return tensor.clone()

    def on(device: torch.device) -> nullcontext[None]:
        devices.append(device)
        return nullcontext()

    def updates() -> Generator[Update]:
        try:
            for number in range(100):
                yield [batch(number, 3), batch(number, 1)], None
        finally:
            closed.append(True)

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.cuda, "device", on)
    gpu = torch.device("cuda", 1)
    ahead: Iterator[Update] = prefetch(pinned(updates(), gpu), 2)
    for number in range(3):
        (first, second), _ = next(ahead)
        for found, made in ((first, batch(number, 3)), (second, batch(number, 1))):
            assert_same_batch(found, made)
    ahead.close()  # type: ignore[attr-defined]
    assert closed == [True]
    assert main_thread() not in callers
    assert set(devices) == {gpu}
    # A batch has three tensors here, without a mask.
    assert len(callers) == 3 * 2 * len(devices)


def assert_same_batch(found: Batch, made: Batch) -> None:
    assert torch.equal(found.input_ids, made.input_ids)
    assert torch.equal(found.predicted_positions, made.predicted_positions)
    assert torch.equal(found.predicted_ids, made.predicted_ids)
    assert (found.num_tokens, found.num_predicted) == (made.num_tokens, made.num_predicted)
    assert found.attention_mask is made.attention_mask is None
