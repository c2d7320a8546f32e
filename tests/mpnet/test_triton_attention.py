"""The Triton kernels equal the formula in values and all gradients, including the bias table's.

Without a GPU they run in Triton's interpreter, in small tiles: every loop runs several times, and
the last tiles are only partly filled.
"""

import dataclasses
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from samples import (
    GOLDEN_NAMES,
    GRADIENT_TOLERANCE,
    LOGIT_TOLERANCE,
    LOSS_TOLERANCE,
    TINY,
    load_golden,
    logits_of,
    random_batch,
    random_model,
    relative_difference,
    without_prefix,
)

from annotated_mpnet.fast import triton_attention
from annotated_mpnet.fast.attention import ATTENTIONS
from annotated_mpnet.fast.kernel_check import kernel_fault
from annotated_mpnet.fast.triton_attention import Launch, attend_triton, bias_rule, bias_steps
from annotated_mpnet.mpnet.attention import (
    Attention,
    BiasedBlock,
    attend_blocks,
    attend_eager,
    bias_matrix,
)
from annotated_mpnet.mpnet.config import InputMode, ModelConfig
from annotated_mpnet.mpnet.dropout import scale, threshold
from annotated_mpnet.mpnet.positions import RelativePositionBias, relative_position_bucket
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining, cross_entropy_sum
from annotated_mpnet.mpnet.two_stream import Block, Entries, mpnet_entries, plm_entries
from interpreted import DEVICE, triton_runs
from waiting import HUNG

pytestmark = [
    triton_runs,
    pytest.mark.interpreted,
    # From the interpreter of Triton 3.6.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]

B, H, K, L, P = 2, 2, 8, 40, 6
CONFIG = ModelConfig(
    encoder_attention_heads=H,
    encoder_embed_dim=H * K,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=12,
)


@pytest.fixture(autouse=True)
def small_tiles() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_attention, "USUAL", Launch(16, 32))
        yield


def entries_of(mode: InputMode, documents: bool = False) -> Entries:
    lengths = [L, L - 7] if documents else [L, L]
    batch = random_batch(3, lengths, [P, P - 2], input_mode=mode)
    mask = batch.attention_mask
    if documents:
        assert mask is not None
        mask = mask * torch.where(torch.arange(L) < L // 3, 1, 2)
    tensors = batch.input_ids, batch.predicted_positions, batch.predicted_ids, mask
    return plm_entries(*tensors, mask_token_id=4) if mode == "plm" else mpnet_entries(*tensors)


def on_device(block: Block) -> Block:
    def moved(value: object) -> object:
        if isinstance(value, torch.Tensor):
            return value.to(DEVICE)
        if isinstance(value, tuple):
            return tuple(moved(each) for each in value)
        if hasattr(value, "__dataclass_fields__"):
            return type(value)(**{name: moved(each) for name, each in vars(value).items()})
        return value

    return moved(block)  # type: ignore[return-value]


BLOCKS = {
    "sentence": lambda: entries_of("mpnet").blocks[0],
    "staircase": lambda: entries_of("mpnet").blocks[1],
    "last layer": lambda: entries_of("mpnet").last_block,
    "sentence, documents and padding": lambda: entries_of("mpnet", documents=True).blocks[0],
    "staircase, documents and padding": lambda: entries_of("mpnet", documents=True).blocks[1],
    "plm, documents and padding": lambda: entries_of("plm", documents=True).blocks[0],
}


class Case:
    """Queries, keys, values of a block, a table, and both forms of the bias."""

    def __init__(
        self, block: Block, config: ModelConfig = CONFIG, dtype: torch.dtype = torch.float32
    ) -> None:
        torch.manual_seed(1)
        block = on_device(block)
        head_dim = config.encoder_embed_dim // config.encoder_attention_heads
        heads = config.encoder_attention_heads
        Q, M = block.query_positions.shape[1], block.key_positions.shape[1]
        # As in the network: heads next to each other, keys and values halves of one tensor.
        query = torch.randn(B, Q + 3, heads * head_dim, device=DEVICE)[:, 2 : 2 + Q]
        both = torch.randn(B, M, 2 * heads * head_dim, device=DEVICE)
        halves = query, *both.chunk(2, dim=2)
        self.inputs = [each.to(dtype).detach().requires_grad_() for each in halves]
        self.heads = [each.unflatten(2, (heads, -1)).transpose(1, 2) for each in self.inputs]
        self.table: RelativePositionBias | None = None
        if config.relative_attention_num_buckets:
            self.table = RelativePositionBias(config).to(DEVICE)
            self.inputs.append(self.table.weight)
        self.rule = bias_rule(block, self.table, query)
        bias = bias_matrix(block, self.table, query)
        assert bias is not None
        self.bias = bias
        self.wanted = torch.randn(B, heads, Q, head_dim, device=DEVICE)

    def attend(self, dropout: float = 0.0) -> torch.Tensor:
        sizes = (each.shape[2] for each in self.heads[:2])
        block = BiasedBlock(*sizes, self.rule)
        return attend_triton(*self.heads, (block,), dropout).transpose(1, 2)

    def gradients(self, attended: torch.Tensor) -> list[torch.Tensor]:
        loss = (attended.float() * self.wanted).sum()
        return list(torch.autograd.grad(loss, self.inputs, retain_graph=True))


def test_the_last_tiles_of_queries_and_keys_are_partly_filled() -> None:
    for name in ("staircase", "plm, documents and padding"):
        block = BLOCKS[name]()
        assert block.query_positions.shape[1] % 16 != 0
        assert block.key_positions.shape[1] % 32 != 0
        assert block.key_positions.shape[1] > 32


@pytest.mark.parametrize("name", BLOCKS)
def test_values_and_gradients_equal_the_formula(name: str) -> None:
    case = Case(BLOCKS[name]())
    wanted = attend_eager(*case.heads, case.bias, dropout=0.0)
    found = case.attend()
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=2e-5)
    assert len(case.inputs) == 4
    for one, other in zip(case.gradients(found), case.gradients(wanted), strict=True):
        assert relative_difference(one, other) < 2e-6


def test_a_tile_far_from_the_diagonal_has_one_bias() -> None:
    # With 40 tokens and a maximal distance of 12, some tiles of 16 x 32 lie beyond it.
    block = BLOCKS["sentence"]()
    far = CONFIG.relative_attention_max_distance
    place_Q, place_M = block.query_positions[0, :16], block.key_positions[0, 32:]
    assert place_M.min() - place_Q.max() >= far


@pytest.mark.parametrize(("buckets", "max_distance"), [(4, 2), (8, 12), (32, 128), (64, 500)])
def test_steps_are_the_buckets_in_the_order_of_distance(buckets: int, max_distance: int) -> None:
    steps = bias_steps(buckets, max_distance, torch.device("cpu"))
    distances = torch.arange(-2 * max_distance, 2 * max_distance + 1)
    step = torch.searchsorted(steps.end, distances.int(), right=True)
    wanted = relative_position_bucket(distances, buckets, max_distance)
    assert torch.equal(steps.bucket_S[step], wanted)
    assert torch.equal(steps.step_W, step[max_distance : 3 * max_distance + 1])


@pytest.mark.parametrize("buckets", [0, 4, 32])
def test_any_number_of_buckets_and_any_size_of_heads(buckets: int) -> None:
    config = ModelConfig(
        encoder_attention_heads=3, encoder_embed_dim=15, relative_attention_num_buckets=buckets
    )
    case = Case(BLOCKS["staircase"](), config)
    wanted = attend_eager(*case.heads, case.bias, dropout=0.0)
    found = case.attend()
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=2e-5)
    for one, other in zip(case.gradients(found), case.gradients(wanted), strict=True):
        assert relative_difference(one, other) < 2e-6


def kept_of(seeds_BH2: torch.Tensor, num_queries: int, num_keys: int, p: float) -> torch.Tensor:
    """Return what the kernels' hash keeps, (B, H, Q, M), computed in 64-bit integers."""
    word = 2**32 - 1
    seed, salt = (seeds_BH2[..., i, None, None].long() for i in range(2))
    bits = torch.arange(num_queries * num_keys, device=seeds_BH2.device).view(num_queries, num_keys)
    bits = (bits & word) ^ seed
    bits = ((bits ^ bits >> 16) * 0x7FEB352D) & word
    bits = ((bits ^ bits >> 15) * 0x846CA68B) & word
    bits = ((bits ^ bits >> 16 ^ salt) * 0x9E3779B1) & word
    return bits >> 16 >= threshold(p)


@pytest.mark.parametrize("name", ["sentence", "staircase"])
def test_dropout_drops_weights_and_has_the_gradients_of_the_formula(name: str) -> None:
    case, p = Case(BLOCKS[name]()), 0.3
    torch.manual_seed(5)
    found = case.attend(p)
    torch.manual_seed(5)
    (seeds,) = torch.randint(2**31 - 1, (1, B, H, 2), dtype=torch.int32, device=DEVICE)
    query, key, value = case.heads
    kept = kept_of(seeds, query.shape[2], key.shape[2], p)
    scores = query @ key.transpose(2, 3) / math.sqrt(K) + case.bias
    wanted = (scores.softmax(3) * kept * scale(p)) @ value
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=2e-5)
    for one, other in zip(case.gradients(found), case.gradients(wanted), strict=True):
        assert relative_difference(one, other) < 2e-6


def test_the_hash_drops_evenly_and_differently_in_each_head() -> None:
    seeds = torch.randint(
        2**31 - 1, (4, 8, 2), dtype=torch.int32, generator=torch.Generator().manual_seed(0)
    )
    kept = kept_of(seeds, 256, 300, 0.1).float()
    n = kept[0, 0].numel()
    # Within five standard deviations for each head, query and key.
    for mean, count in ((kept.mean((2, 3)), n), (kept.mean((0, 1, 3)), 32 * 300)):
        assert (mean - 0.9).abs().max() < 5 * math.sqrt(0.09 / count)
    # Two heads, queries or keys are nearly independent.
    heads = kept.flatten(0, 1).flatten(1)
    queries, keys = kept[0, 0], kept[0, 0].T
    for each in (heads, queries, keys):
        correlation = torch.corrcoef(each) - torch.eye(len(each))
        assert correlation.abs().max() < 6 / math.sqrt(each.shape[1])


def test_no_dropout_draws_nothing() -> None:
    case = Case(BLOCKS["staircase"]())
    before = torch.get_rng_state()
    case.attend()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_gradient_of_the_table_is_the_same_to_the_last_bit() -> None:
    case = Case(BLOCKS["staircase"]())
    found = case.attend()
    first, second = case.gradients(found)[-1], case.gradients(found)[-1]
    assert torch.equal(first, second)


def test_half_precision_is_as_exact_as_the_formula() -> None:
    # The interpreter (Triton 3.9) multiplies the bit patterns of bfloat16 as if they were integers;
    # float16 takes the same path through the kernels.
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    exact = Case(BLOCKS["staircase"]())
    rounded = Case(BLOCKS["staircase"](), dtype=dtype)
    truth = exact.gradients(attend_eager(*exact.heads, exact.bias, dropout=0.0))
    bias = rounded.bias.to(dtype)

    def error(attended: torch.Tensor) -> float:
        gradients = rounded.gradients(attended)
        return sum(map(relative_difference, gradients, truth))

    ours = error(rounded.attend())
    formulas = error(attend_eager(*rounded.heads, bias, dropout=0.0))
    assert ours < 1.5 * formulas


def test_the_operators_match_their_declarations() -> None:
    case = Case(BLOCKS["staircase"]())
    rule, table = case.rule, case.rule.table
    assert table is not None
    by_step_HS = table.by_step_HS.detach().requires_grad_()
    heads = [each.transpose(1, 2).detach().requires_grad_() for each in case.heads]
    arguments = (
        *heads, by_step_HS, table.end_of_step, table.far, [table.strip], [rule.query_facts],
        [rule.key_facts], [rule.keys_before], [rule.natural, rule.hides, rule.documents], None, 0,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.annotated_mpnet.attend.default, arguments)


def test_a_recomputed_layer_has_the_same_dropout() -> None:
    config = dataclasses.replace(TINY, encoder_layers=1, dropout=0.1, attention_dropout=0.2)
    batch = random_batch(1, [18, 12], [3, 2]).to(torch.device(DEVICE))
    gradients = []
    for recompute in (False, True):
        model = random_model(config).to(DEVICE).train()
        model.use_attention(ATTENTIONS["triton"])
        model.use_gradient_checkpointing(recompute)
        torch.manual_seed(4)
        model.loss_sum(batch).backward()  # type: ignore[no-untyped-call]
        gradients.append([p.grad for p in model.parameters()])
    for kept, again in zip(*gradients, strict=True):
        assert kept is not None
        assert again is not None
        assert torch.equal(kept, again)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_logits_loss_and_every_gradient_are_the_originals(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_attention, "USUAL", Launch())
    golden = load_golden(name)
    model = MPNetForPretraining(golden.config)
    model.load_state_dict(without_prefix(golden.weights))
    model.to(DEVICE).use_attention(ATTENTIONS["triton"])
    batch = golden.batch.to(torch.device(DEVICE))
    logits_BPV = logits_of(model, batch, golden.input_mode)
    assert (logits_BPV.cpu() - golden.logits).abs().max() < LOGIT_TOLERANCE
    loss_sum = cross_entropy_sum(logits_BPV, batch.predicted_ids)
    assert abs(loss_sum.item() - golden.loss_sum) < LOSS_TOLERANCE
    loss_sum.backward()  # type: ignore[no-untyped-call]
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        wanted = golden.gradients[f"decoder.{key}"]
        assert relative_difference(parameter.grad.cpu(), wanted) < GRADIENT_TOLERANCE, key


def test_the_kernels_compile_for_tensor_cores_and_fit_into_shared_memory(tmp_path: Path) -> None:
    # The interpreter accepts code that the compiler rejects. Compiling needs no GPU, but a process
    # without the interpreter.
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=HUNG
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 18
    for name, _, tensor_cores, shared, there in lines:
        assert int(tensor_cores) > 0, name
        assert int(shared) < int(there), name


@pytest.mark.parametrize("bf16", [False, True] if DEVICE == "cuda" else [False])
def test_a_run_finds_no_fault_in_the_kernels(bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_attention, "USUAL", Launch())
    before = torch.get_rng_state()
    assert kernel_fault(ModelConfig(), torch.device(DEVICE), bf16) is None
    assert torch.equal(torch.get_rng_state(), before)


def attend_with_a_hole(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, dropout: float
) -> torch.Tensor:
    # As if a compiler had lost a tile of keys.
    value = torch.cat([value[:, :, :64], torch.zeros_like(value[:, :, 64:])], dim=2)
    return attend_eager(query, key, value, bias, dropout)


def attend_without_room(*_: object, **__: object) -> torch.Tensor:
    raise RuntimeError("out of resource: shared memory, Required: 114688")


@pytest.mark.parametrize(
    ("attend", "said"),
    [(attend_with_a_hole, "is wrong by"), (attend_without_room, "out of resource: shared memory")],
)
def test_a_run_finds_a_fault_in_the_kernels(
    attend: Callable[..., torch.Tensor], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ATTENTIONS, "triton", Attention(partial(attend_blocks, attend)))
    fault = kernel_fault(ModelConfig(), torch.device(DEVICE), bf16=False)
    assert fault is not None
    assert said in fault
