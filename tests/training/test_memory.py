"""Out of memory: recognised, and reported with flags that fit the run."""

import pytest
import torch

from annotated_mpnet.mpnet.config import OptimizationConfig
from annotated_mpnet.settings.config import MachineConfig, PretrainingConfig
from annotated_mpnet.training.memory import is_out_of_memory, out_of_memory, smaller_micro_batch

CPU = torch.device("cpu")
# The first lines of an error on an H200.
CUDA = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139.80 GiB"
)


def settings(machine: MachineConfig, batch_size: int = 16) -> PretrainingConfig:
    return PretrainingConfig(
        machine=machine, optimization=OptimizationConfig(batch_size=batch_size, update_freq=8)
    )


def test_the_error_of_the_cpus_allocator_is_recognised() -> None:
    # 4 exabytes: more than any machine allocates.
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.float32)
    assert is_out_of_memory(caught.value)


def test_other_errors_are_not_recognised_as_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    assert not is_out_of_memory(caught.value)


def test_the_line_says_what_was_seen_and_what_to_try_in_order() -> None:
    assert is_out_of_memory(CUDA)
    line = str(out_of_memory(settings(MachineConfig()), CPU))
    assert "\n" not in line
    assert "micro-batches of 16 sequences of 512 tokens" in line
    assert "GiB" in line
    tries = ["--batch-size 8 --update-freq 16", "--precision bf16", "--gradient-checkpointing"]
    places = [line.index(each) for each in tries]
    assert places == sorted(places)
    assert "the same 128 sequences per update" in line
    assert "--fsdp" not in line


def test_flags_that_are_already_set_are_not_suggested() -> None:
    machine = MachineConfig(precision="bf16", gradient_checkpointing=True, fsdp=True)
    said = str(out_of_memory(settings(machine, batch_size=1), CPU, world_size=4))
    line = said.partition("try, in this order: ")[2]
    for flag in ("--batch-size", "--precision", "--gradient-checkpointing", "--fsdp"):
        assert flag not in line
    assert "--max-tokens" in line


def test_fsdp_is_suggested_to_several_processes() -> None:
    line = str(out_of_memory(settings(MachineConfig()), CPU, world_size=4))
    assert "--fsdp" in line
    assert "the same 512 sequences per update" in line


@pytest.mark.parametrize("batch_size", [2, 3, 16, 35, 127])
def test_the_suggested_flags_keep_the_number_of_sequences_per_update(batch_size: int) -> None:
    cut = smaller_micro_batch(batch_size, 8)
    assert cut is not None
    assert cut[0] * cut[1] == batch_size * 8
    assert cut[0] < batch_size
    optimization = OptimizationConfig(batch_size=cut[0], update_freq=cut[1])
    PretrainingConfig(optimization=optimization).validate()
