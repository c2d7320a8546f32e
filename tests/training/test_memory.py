"""Out of memory: recognised, and answered with flags that fit the run."""

import pytest
import torch

from annotated_mpnet.config import MachineConfig, OptimizationConfig, PretrainingConfig
from annotated_mpnet.training.memory import is_out_of_memory, out_of_memory, smaller_micro_batch

CPU = torch.device("cpu")
# What an H200 said: the first lines of it.
CUDA = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139.80 GiB"
)


def settings(machine: MachineConfig, batch_size: int = 16) -> PretrainingConfig:
    return PretrainingConfig(
        machine=machine, optimization=OptimizationConfig(batch_size=batch_size, update_freq=8)
    )


def test_what_the_cpus_allocator_says_is_recognised() -> None:
    # 4 exabytes: more than any machine promises, whatever its settings.
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.float32)
    assert is_out_of_memory(caught.value)


def test_other_errors_are_not_taken_for_it() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    assert not is_out_of_memory(caught.value)


def test_the_line_says_what_was_seen_and_what_to_try_in_order() -> None:
    assert is_out_of_memory(CUDA)
    line = str(out_of_memory(settings(MachineConfig()), CPU))
    assert "\n" not in line
    assert "micro-batches of 16 rows of 512 tokens" in line
    assert "GiB" in line
    tries = ["--batch-size 8 --update-freq 16", "--precision bf16", "--gradient-checkpointing"]
    places = [line.index(each) for each in tries]
    assert places == sorted(places)
    assert "the same 128 rows per update" in line
    assert "--fsdp" not in line


def test_what_is_on_already_is_not_advised() -> None:
    machine = MachineConfig(precision="bf16", gradient_checkpointing=True, fsdp=True)
    said = str(out_of_memory(settings(machine, batch_size=1), CPU, world_size=4))
    line = said.partition("try, in this order: ")[2]
    for flag in ("--batch-size", "--precision", "--gradient-checkpointing", "--fsdp"):
        assert flag not in line
    assert "--max-tokens" in line


def test_several_processes_may_share_the_network() -> None:
    line = str(out_of_memory(settings(MachineConfig()), CPU, world_size=4))
    assert "--fsdp" in line
    assert "the same 512 rows per update" in line


@pytest.mark.parametrize("batch_size", [2, 3, 16, 35, 127])
def test_the_flags_keep_the_rows_of_an_update(batch_size: int) -> None:
    cut = smaller_micro_batch(batch_size, 8)
    assert cut is not None
    assert cut[0] * cut[1] == batch_size * 8
    assert cut[0] < batch_size
    optimization = OptimizationConfig(batch_size=cut[0], update_freq=cut[1])
    PretrainingConfig(optimization=optimization).validate()
