"""The plan says what the run will do, and its memory estimate is close to the measured one."""

import dataclasses
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from annotated_mpnet.errors import ConfigError
from annotated_mpnet.fast.attention import ATTENTIONS, AttentionName
from annotated_mpnet.mpnet.batch import Batch
from annotated_mpnet.mpnet.config import InputMode, ModelConfig
from annotated_mpnet.mpnet.loop import add_gradient
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining
from annotated_mpnet.runs.initial_weights import build_model
from annotated_mpnet.runs.plan import plan
from annotated_mpnet.runs.preparation import choose_attention, choose_recording
from annotated_mpnet.runs.texts import Text, read_text
from annotated_mpnet.settings.config import PretrainingConfig
from annotated_mpnet.training.busy import STAT, busy_cores
from annotated_mpnet.training.memory_estimate import Workload
from tiny_run import TinyText, changed, tiny_config, write_text

CPU = torch.device("cpu")
FACTOR = 4 / 3
"""Stated in the docstring of `memory_estimate.py`."""


class PeakMemory(TorchDispatchMode):
    """Tracks the memory of all live tensors that were created in a `with` block."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._alive: dict[int, int] = {}

    def ignore(self, tensor: torch.Tensor) -> None:
        """Do not count a tensor, even if operations return it."""
        self._alive[tensor.untyped_storage()._cdata] = 0

    def __torch_dispatch__(
        self,
        operation: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._alive:
            self._alive[key] = storage.nbytes()
            self._now += storage.nbytes()
            self.peak = max(self.peak, self._now)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self._now -= self._alive.pop(key, 0)


def measured_peak(work: Workload) -> int:
    """Run one micro-batch forward and backward; return the peak in bytes, without weights."""
    model = MPNetForPretraining(work.model)
    model.use_attention(ATTENTIONS[work.attention])
    model.use_gradient_checkpointing(work.recompute)
    B, length, P = work.batch_size, work.length, work.num_predicted
    ids = torch.randint(5, work.model.vocab_size, (B, length))
    order = torch.stack([torch.randperm(length)[:P] for _ in range(B)])
    batch = Batch(ids, order, ids.gather(1, order), None, B * length, B * P)
    memory = PeakMemory()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
        memory.ignore(parameter)
        memory.ignore(parameter.grad)
    with memory:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=work.bf16):
            loss = model.loss_sum(batch, work.input_mode)
        loss.backward()
    return memory.peak


def workload(mode: InputMode, **changes: object) -> Workload:
    names = {field.name for field in dataclasses.fields(Workload)}
    model = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    model |= {name: value for name, value in changes.items() if name not in names}  # type: ignore[misc]
    sizes: dict[str, object] = {
        "vocab_size": 2000,
        "encoder_layers": 3,
        "encoder_embed_dim": 64,
        "encoder_ffn_dim": 256,
        "encoder_attention_heads": 4,
        "max_positions": 192,
    }
    work = Workload(ModelConfig(**{**sizes, **model}), mode, 4, 96, 14)  # type: ignore[arg-type]
    own = {name: value for name, value in changes.items() if name in names}
    return dataclasses.replace(work, **own)  # type: ignore[arg-type]


DROPOUT = {"dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1}


WORKLOADS = {
    "plain": workload("mpnet"),
    "dropout, many heads": workload("mpnet", encoder_attention_heads=16, **DROPOUT),
    "bf16": workload("mpnet", bf16=True),
    "recompute, bf16, dropout": workload("mpnet", recompute=True, bf16=True, **DROPOUT),
    "recompute, bf16, wide": workload(
        "mpnet", recompute=True, bf16=True, encoder_embed_dim=256, encoder_ffn_dim=1024
    ),
    "one long sequence": workload("mpnet", batch_size=1, length=192, num_predicted=29),
    "large vocabulary": workload("mpnet", vocab_size=20000),
    "mlm": workload("mlm", **DROPOUT),
    "plm": workload("plm", **DROPOUT),
}


@pytest.mark.parametrize("work", WORKLOADS.values(), ids=WORKLOADS)
def test_memory_is_estimated_within_a_factor(work: Workload) -> None:
    ratio = work.activation_bytes() / measured_peak(work)
    assert 1 / FACTOR < ratio < FACTOR


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_other_attention_implementations_take_what_is_estimated(attention: AttentionName) -> None:
    work = workload("mpnet", attention=attention, **DROPOUT)
    ratio = work.activation_bytes() / measured_peak(work)
    assert 1 / FACTOR < ratio < FACTOR


def test_each_way_to_save_memory_saves_some() -> None:
    plain = workload("mpnet", attention="sdpa", **DROPOUT)
    for change in (
        {"on_gpu": True},
        {"attention": "blocked"},
        {"attention": "triton"},
        {"bf16": True},
        {"recompute": True},
        {"batch_size": 2},
    ):
        smaller = dataclasses.replace(plain, **change)  # type: ignore[arg-type]
        assert smaller.activation_bytes() < plain.activation_bytes(), change


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyText:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def text(tiny: TinyText) -> Text:
    config = tiny_config(tiny, Path("unused"))
    return read_text(config.data, config.run.seed)


def lines_of(
    config: PretrainingConfig, text: Text, world_size: int = 1, device: torch.device = CPU
) -> dict[str, str]:
    """Return a plan's lines by their first words."""
    model, _ = build_model(config, text)
    attention = choose_attention(config.machine.attention, device)
    lines = list(plan(config, text, model, device, False, attention, None, world_size))
    return dict(line.split(": ", 1) if ": " in line else (line, "") for line in lines)


def test_plan_counts_sequences_of_all_processes_and_epochs(tiny: TinyText, text: Text) -> None:
    config = tiny_config(tiny, Path("unused"))
    sequences = len(text.train)  # type: ignore[arg-type]
    lines = lines_of(config, text, world_size=3)
    # 3 processes, 2 micro-batches, 4 sequences each.
    assert lines["update"] == "24 sequences (4 x 2 micro-batches x 3 processes), up to 768 tokens"
    assert (
        lines["training"]
        == f"8 updates, {8 * 24 / sequences:.2f} epochs of {sequences:,} sequences"
    )
    assert lines["processes"] == "3, each with all weights (DDP)"


@pytest.mark.parametrize(("busy", "said"), [(1.4, True), (0.1, False), (None, False)])
def test_plan_says_when_other_work_uses_the_cores(
    tiny: TinyText, text: Text, monkeypatch: pytest.MonkeyPatch, busy: float | None, said: bool
) -> None:
    monkeypatch.setattr("annotated_mpnet.runs.plan.busy_cores", lambda: busy)
    lines = lines_of(tiny_config(tiny, Path("unused")), text)
    assert any(line.startswith("other work uses 1.4 of ") for line in lines) is said


@pytest.mark.skipif(not STAT.exists(), reason="Linux only")
def test_cores_at_work_are_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert busy_cores(seconds=0.05) is None or busy_cores(seconds=0.05) >= 0
    stat = tmp_path / "stat"
    stat.write_text("cpu0 0 0 0 0 0\ncpu1 0 0 0 0 0\n")

    def meanwhile(_: float) -> None:
        stat.write_text("cpu0 30 0 0 70 0\ncpu1 100 0 0 0 0\n")

    monkeypatch.setattr("annotated_mpnet.training.busy.STAT", stat)
    monkeypatch.setattr("time.sleep", meanwhile)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    assert busy_cores() == pytest.approx(1.3)


def test_plan_says_why_this_device_and_this_attention(tiny: TinyText, text: Text) -> None:
    config = tiny_config(tiny, Path("unused"))
    anywhere = changed(config, device="auto")
    assert lines_of(anywhere, text)["device"].endswith(
        "(the best that PyTorch finds here), float32"
    )
    explicit = changed(config, device="cpu", attention="eager")
    lines = lines_of(explicit, text)
    assert lines["device"] == "cpu (asked for), float32"
    assert lines["attention"].startswith("eager")


def test_plan_without_cuda_says_what_that_means(tiny: TinyText, text: Text) -> None:
    lines = lines_of(tiny_config(tiny, Path("unused")), text)
    # 0.33 x 989 TFLOP/s / 358 GFLOP x 60 s, in sequences of 512 tokens.
    assert lines["no CUDA"].endswith("54,680 on an H200; no MFU")
    assert "in all, if a thread does 50 GFLOP/s (threads: " in lines["time"]


def test_sharded_weights_need_less_memory(tiny: TinyText, text: Text) -> None:
    config = tiny_config(tiny, Path("unused"))
    whole = lines_of(changed(config, encoder_embed_dim=256), text, world_size=4)
    shared = lines_of(changed(config, encoder_embed_dim=256, fsdp=True), text, world_size=4)

    def fixed(lines: dict[str, str]) -> float:
        return float(lines["weights, gradients and AdamW"].split()[0])

    assert fixed(shared) == pytest.approx(fixed(whole) / 4, rel=0.1)
    assert shared["processes"] == "4, each with its share of the weights (FSDP)"
    alone = lines_of(changed(config, fsdp=True), text)
    assert alone["processes"].startswith("1; --fsdp has no effect")


def test_a_run_that_does_not_fit_gets_a_warning_with_a_way_out(tiny: TinyText, text: Text) -> None:
    config = tiny_config(tiny, Path("unused"))
    assert "this may not fit" not in lines_of(config, text)
    # Only estimated, not allocated.
    lines = lines_of(changed(config, batch_size=10_000_000), text)
    assert "--update-freq" in lines["this may not fit"]


def test_lines_that_need_no_path_fit_into_eighty_columns(tiny: TinyText, text: Text) -> None:
    config = changed(tiny_config(tiny, Path("unused")), compile=True)
    model, _ = build_model(config, text)
    attention = "blocked", "auto: the fastest on a CPU"
    for line in plan(config, text, model, CPU, True, attention, "not recorded", 2):
        if not line.startswith(("training text", "validation text")):
            assert len(line) <= 80, line


def test_attention_on_a_gpu_repeats_to_the_bit_or_the_plan_says_that_it_does_not() -> None:
    cuda = torch.device("cuda")
    assert choose_attention("auto", cuda) == ("triton", "auto: the same bits each time")
    assert choose_attention("triton", cuda) == ("triton", "asked for")
    for wanted, fault in (("auto", "out of resource"), ("sdpa", None)):
        name, reason = choose_attention(wanted, cuda, fault)  # type: ignore[arg-type]
        assert name == "sdpa"
        assert "a resumed run is not byte-identical" in reason
    with pytest.raises(ConfigError, match=r"--attention triton .* \(out of resource\); leave it"):
        choose_attention("triton", cuda, "out of resource")


@pytest.mark.parametrize(
    ("changes", "world_size", "said"),
    [
        ({}, 1, "recorded as a CUDA graph"),
        ({"cuda_graph": False}, 1, "not recorded as a CUDA graph (--no-cuda-graph)"),
        ({}, 2, "not recorded as a CUDA graph (several processes)"),
        ({"wandb_watch": True}, 1, "not recorded as a CUDA graph (--wandb-watch)"),
        (
            {"packing": "none", "gradient_checkpointing": True},
            1,
            "not recorded as a CUDA graph (--packing none: shapes vary, --gradient-checkpointing)",
        ),
    ],
)
def test_plan_says_whether_micro_batches_are_recorded(
    tiny: TinyText, text: Text, changes: dict[str, object], world_size: int, said: str
) -> None:
    config = changed(tiny_config(tiny, Path("unused")), **changes)
    _, recording = choose_recording(config, torch.device("cuda"), world_size)
    model, _ = build_model(config, text)
    attention = choose_attention(config.machine.attention, CPU)
    lines = list(plan(config, text, model, CPU, False, attention, recording, world_size))
    assert f"micro-batches: {said}" in lines


def test_only_a_gpu_records(tiny: TinyText) -> None:
    assert choose_recording(tiny_config(tiny, Path("unused")), CPU, 1) == (add_gradient, None)
