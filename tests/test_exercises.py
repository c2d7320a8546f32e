"""docs/exercises.md: each change, applied as written to a copy of the book, does what it says.

The book imports nothing but torch, numpy and itself. So a copy of its folder under another name
runs beside the original.
"""

import importlib
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import annotated_mpnet.mpnet

BOOK = Path(annotated_mpnet.mpnet.__path__[0])
PAGE = Path(__file__).parents[1] / "docs" / "exercises.md"


def sections() -> list[str]:
    return re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.M)[1:]


@dataclass(frozen=True)
class Book:
    """The book, as it is or changed: `book("loop").update`."""

    package: str

    def __call__(self, module: str) -> ModuleType:
        return importlib.import_module(f"{self.package}.{module}")


AS_IT_IS = Book("annotated_mpnet.mpnet")


@pytest.fixture
def changed(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Book]:
    """Return a copy of the book with the change of the exercise that the test is named after."""
    number = int(re.findall(r"test_(\d+)_", request.node.name)[0])
    section = sections()[number - 1]
    assert section.startswith(f"{number}. ")
    (file,) = re.findall(r"^In `(\w+\.py)`", section, re.M)
    ((removed, added),) = re.findall(r"^```diff\n((?:-.*\n)+)((?:\+.*\n)+)^```", section, re.M)
    old, new = (re.sub(r"^[-+]", "", lines, flags=re.M) for lines in (removed, added))
    name = f"exercise_{number}"
    (tmp_path / name).mkdir()
    for path in BOOK.glob("*.py"):
        source = path.read_text(encoding="utf-8")
        if path.name == file:
            assert source.count(old) == 1, f"{file} has no line {old!r}"
            source = source.replace(old, new)
        source = source.replace("annotated_mpnet.mpnet", name)
        (tmp_path / name / path.name).write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield Book(name)
    for module in [each for each in sys.modules if each.split(".")[0] == name]:
        del sys.modules[module]


def tiny_model(book: Book, **settings: object) -> torch.nn.Module:
    numbers = {
        "vocab_size": 37,
        "encoder_layers": 2,
        "encoder_embed_dim": 32,
        "encoder_ffn_dim": 32,
        "encoder_attention_heads": 2,
        "max_positions": 16,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
    }
    torch.manual_seed(1)
    model: torch.nn.Module = book("pretraining").MPNetForPretraining(
        book("config").ModelConfig(**{**numbers, **settings})
    )
    return model


def random_batch(
    book: Book, counts: list[int], seed: int = 0, length: int = 12, kinds: int = 32
) -> object:
    """Return sequences of random tokens, from 5, of which some are predicted."""
    rng, slots = np.random.default_rng(seed), max(counts)
    original = torch.from_numpy(rng.integers(5, 5 + kinds, (len(counts), length)))
    positions = torch.from_numpy(np.stack([rng.permutation(length)[:slots] for _ in counts]))
    ids = original.gather(1, positions)
    empty = torch.arange(slots)[None] >= torch.tensor(counts)[:, None]
    masked = original.clone()
    for row, count in enumerate(counts):
        masked[row, positions[row, :count]] = 4
    return book("batch").Batch(
        masked, positions, ids.masked_fill(empty, -100), None, original.numel(), sum(counts)
    )


def setup_of(book: Book, model: torch.nn.Module, **settings: object) -> object:
    optimization = book("config").OptimizationConfig(
        **{"lr": 1e-2, "warmup_updates": 0, "clip_grad_norm": 0.0, **settings}
    )
    device, loop = torch.device("cpu"), book("loop")
    optimizer = book("optimizer").build_optimizer(model, optimization, device)
    return loop.Setup(loop.Network(model, device), optimizer, optimization)


def flat(tensors: list[torch.Tensor | None]) -> torch.Tensor:
    return torch.cat([each.flatten() for each in tensors if each is not None])


def gradient(book: Book, micro_batches: list[object]) -> tuple[torch.Tensor, float]:
    """Return the gradient of an update, and its loss in nats."""
    model = tiny_model(book)
    result = book("loop").update(setup_of(book, model), 0, micro_batches)
    loss = float(result.loss_sum) / result.num_predicted
    return flat([each.grad for each in model.parameters()]), loss


def parts_of(book: Book, batch: object) -> list[object]:
    """Cut a batch into a micro-batch for each sequence."""
    tensors = (batch.input_ids, batch.predicted_positions, batch.predicted_ids)  # type: ignore[attr-defined]
    return [
        book("batch").Batch(
            *(each[i : i + 1] for each in tensors), None, 12, int((tensors[2][i] != -100).sum())
        )
        for i in range(len(tensors[0]))
    ]


def test_there_are_ten_and_each_has_a_test() -> None:
    assert [section.partition(".")[0] for section in sections()] == [str(n) for n in range(1, 11)]
    names = [name for name in globals() if re.match(r"test_\d+_", name)]
    assert sorted(int(name.split("_")[1]) for name in names) == list(range(1, 11))


def test_1_a_query_that_sees_its_token_copies_it(changed: Book) -> None:
    def bits(book: Book) -> float:
        shape = {"encoder_embed_dim": 64, "encoder_layers": 1, "encoder_attention_heads": 1}
        setup = setup_of(book, tiny_model(book, vocab_size=13, **shape))
        for number in range(30):
            batch = random_batch(book, [3] * 32, number, length=6, kinds=8)
            result = book("loop").update(setup, number, [batch])
        return float(result.loss_sum) / result.num_predicted / math.log(2)

    assert bits(AS_IT_IS) > 2.8
    assert bits(changed) < 1


def test_2_content_that_looks_ahead_leaks_through_two_layers(changed: Book) -> None:
    def leaking(book: Book, layers: int) -> list[int]:
        model = tiny_model(book, encoder_layers=layers).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        batch = random_batch(book, [4])
        found = []
        for j in range(4):
            other = batch.predicted_ids.clone()  # type: ignore[attr-defined]
            other[0, j] = 5 + (other[0, j] + 1) % 32
            with torch.no_grad():
                logits = [
                    model(batch.input_ids, batch.predicted_positions, ids)[0, j]  # type: ignore[attr-defined]
                    for ids in (batch.predicted_ids, other)  # type: ignore[attr-defined]
                ]
            found += [j + 1] if not torch.equal(*logits) else []
        return found

    assert [leaking(AS_IT_IS, layers) for layers in (1, 2, 3)] == [[], [], []]
    assert leaking(changed, 1) == []
    assert leaking(changed, 2) == [2, 3, 4]


def test_3_without_masks_a_query_sees_fewer_positions(changed: Book) -> None:
    def seen(book: Book) -> list[int]:
        order = torch.randperm(512)[None, :76]
        ids = torch.zeros(1, 512, dtype=torch.long)
        entries = book("two_stream").mpnet_entries(ids, order, order)
        counts: list[int] = entries.last_block.visibility.matrix()[0].sum(dim=1).tolist()
        return counts

    assert seen(AS_IT_IS) == [512] * 76
    assert seen(changed) == list(range(436, 512))


def test_4_a_whole_last_layer_computes_the_same_and_more(changed: Book) -> None:
    def logits_of(book: Book) -> torch.Tensor:
        batch = random_batch(book, [4] * 3)
        arguments = batch.input_ids, batch.predicted_positions, batch.predicted_ids  # type: ignore[attr-defined]
        with torch.no_grad():
            logits: torch.Tensor = tiny_model(book).eval()(*arguments)
        return logits

    def gflop(book: Book) -> float:
        with torch.device("meta"):
            model = book("pretraining").MPNetForPretraining(book("config").ModelConfig()).eval()
            ids = torch.zeros(1, 512, dtype=torch.long)
        # The bias, of which each score needs one addition, does not know autocast on "meta".
        model.use_attention(book("attention").EAGER._replace(make_bias=lambda *_: None))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(ids, ids[:, :76], ids[:, :76])
        return round(counter.get_total_flops() / 1e9, 1)

    torch.testing.assert_close(logits_of(AS_IT_IS), logits_of(changed))
    assert gflop(AS_IT_IS) == 119.4
    assert gflop(changed) == 127.3


def test_5_divided_by_slots_the_gradient_is_shorter(changed: Book) -> None:
    counts = [5, 1, 1, 1]
    right, loss = gradient(AS_IT_IS, [random_batch(AS_IT_IS, counts)])
    wrong, told = gradient(changed, [random_batch(changed, counts)])
    torch.testing.assert_close(wrong, 0.4 * right)
    assert told == pytest.approx(0.4 * loss)

    def weights(book: Book) -> torch.Tensor:
        model = tiny_model(book)
        book("loop").update(setup_of(book, model, lr=1e-3), 0, [random_batch(book, counts)])
        return flat(list(model.parameters()))

    before = flat(list(tiny_model(AS_IT_IS).parameters())).detach()
    moved = [(weights(book) - before).detach() for book in (AS_IT_IS, changed)]
    assert (moved[0] - moved[1]).norm() < 0.15 * moved[0].norm()


def test_6_a_mean_for_each_micro_batch_depends_on_the_cut(changed: Book) -> None:
    def cut_and_whole(book: Book, counts: list[int]) -> list[torch.Tensor]:
        batch = random_batch(book, counts)
        return [gradient(book, each)[0] for each in (parts_of(book, batch), [batch])]

    torch.testing.assert_close(*cut_and_whole(AS_IT_IS, [3] * 4), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(*cut_and_whole(AS_IT_IS, [5, 1, 1, 1]), rtol=1e-4, atol=1e-6)
    cut, whole = cut_and_whole(changed, [3] * 4)
    torch.testing.assert_close(cut, 4 * whole, rtol=1e-4, atol=1e-6)
    cut, whole = cut_and_whole(changed, [5, 1, 1, 1])
    assert (cut / 4 - whole).norm() > 0.1 * whole.norm()


def test_7_a_word_that_is_cut_loses_its_beginning(changed: Book) -> None:
    def predicted(book: Book) -> set[int]:
        masking = book("masking")
        word, document = np.zeros((1, 100), dtype=np.int64), np.ones((1, 100), dtype=np.int64)
        found: set[int] = set()
        for epoch in range(60):
            draws = masking.draw(1, "mask", epoch, 0, 100)[:, None]
            chosen = masking.choose_predicted(word, document, np.array([[0, 15]]), draws)
            found |= set(chosen[0].tolist())
        return found

    assert predicted(AS_IT_IS) == set(range(100))
    assert predicted(changed) == set(range(85, 100))


def test_8_weights_of_size_1_are_sure_and_wrong(changed: Book) -> None:
    def bits(book: Book) -> float:
        model = tiny_model(book, vocab_size=1024, encoder_layers=1, encoder_embed_dim=768)
        batch = random_batch(book, [4] * 8)
        with torch.no_grad():
            loss: torch.Tensor = model.eval().loss_sum(batch)  # type: ignore[operator]
        return loss.item() / 32 / math.log(2)

    assert 10.0 < bits(AS_IT_IS) < 10.4
    assert bits(changed) > 100


def test_9_without_directions_both_neighbours_share(changed: Book) -> None:
    def neighbours(book: Book) -> list[int]:
        distances = torch.arange(-32, 32)
        buckets = book("positions").relative_position_bucket(distances, 32, 128)
        bias = book("local_start").local_bias(32, 128, num_heads=4)[buckets, 0]
        weights = 100 * bias.softmax(dim=0)
        return [round(weights[32 + offset].item()) for offset in (-1, 1)]

    assert neighbours(AS_IT_IS) == [69, 3]
    assert neighbours(changed) == [27, 27]
    every = changed("positions").relative_position_bucket(torch.arange(-512, 513), 32, 128)
    assert set(every.tolist()) == set(range(16))


def test_10_without_seeds_a_resume_drops_other_units(changed: Book) -> None:
    def weights(book: Book, pauses: Callable[[int], bool]) -> torch.Tensor:
        model = tiny_model(book, dropout=0.1)
        setup = setup_of(book, model)
        for number in range(4):
            if pauses(number):
                torch.rand(7)  # what happens in between, or another process
            book("loop").update(setup, number, [random_batch(book, [4] * 8, number)])
        return flat(list(model.parameters()))

    for book, equal in ((AS_IT_IS, True), (changed, False)):
        in_one_go = weights(book, lambda number: False)
        interrupted = weights(book, lambda number: number == 2)
        assert torch.equal(in_one_go, interrupted) is equal
