"""Operations are counted as PyTorch counts them; devices are recognised by name."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from annotated_mpnet.mpnet.batch import Batch
from annotated_mpnet.mpnet.config import InputMode, ModelConfig
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining
from annotated_mpnet.training.throughput import (
    memory_in_use,
    memory_peak,
    peak_flops,
    training_flops,
)

SMALL = ModelConfig(
    vocab_size=211,
    encoder_layers=3,
    encoder_embed_dim=32,
    encoder_ffn_dim=80,
    encoder_attention_heads=4,
    max_positions=40,
)
MODES: list[InputMode] = ["mpnet", "mlm", "plm"]


def batch_of(config: ModelConfig, batch_size: int, length: int, num_predicted: int) -> Batch:
    ids_BL = torch.randint(5, config.vocab_size, (batch_size, length))
    order_BP = torch.stack([torch.randperm(length)[:num_predicted] for _ in range(batch_size)])
    return Batch(ids_BL, order_BP, ids_BL.gather(1, order_BP), None, ids_BL.numel(), 0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layers", [1, 3])
def test_operations_of_forward_and_backward_are_what_pytorch_counts(
    mode: InputMode, layers: int
) -> None:
    config = ModelConfig(**{**vars(SMALL), "encoder_layers": layers})
    model = MPNetForPretraining(config)
    batch = batch_of(config, batch_size=2, length=40, num_predicted=6)
    with FlopCounterMode(display=False) as counter:
        model.loss_sum(batch, mode).backward()
    assert counter.get_total_flops() == training_flops(config, mode, 2, 40, 6)


@pytest.mark.parametrize("mode", MODES)
def test_operations_of_mpnet_base_are_what_pytorch_counts(mode: InputMode) -> None:
    config = ModelConfig()
    # Fake tensors have shapes and devices, but nothing is computed.
    with FakeTensorMode(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = MPNetForPretraining(config)
        model.loss_sum(batch_of(config, batch_size=1, length=512, num_predicted=76), mode)
    assert 3 * counter.get_total_flops() == training_flops(config, mode, 1, 512, 76)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
    ],
)
def test_a_device_is_recognised_by_its_name(name: str, tflops: int) -> None:
    assert peak_flops(name, bf16=True) == tflops * 1e12


@pytest.mark.parametrize("name", ["cpu", "mps", "Tesla V100-SXM2-16GB", "NVIDIA L400"])
def test_an_unknown_device_has_no_peak(name: str) -> None:
    assert peak_flops(name, bf16=True) is None


def test_float32_has_no_peak() -> None:
    assert peak_flops("NVIDIA H200", bf16=False) is None


def test_memory_of_this_process_is_counted_in_gigabytes() -> None:
    # A few hundred MB with PyTorch loaded; a wrong unit would be off by a factor of 1,000.
    assert 0.05 < memory_peak(torch.device("cpu")) < 100
    assert 0.05e9 < memory_in_use() <= 1.01e9 * memory_peak(torch.device("cpu"))
