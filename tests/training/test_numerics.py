"""NaN and infinite losses, updates without a prediction, and resumed runs.

"The same" means the same bytes of weights, AdamW's moments, and the state.
"""

import itertools
import json
import os
import re
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import pytest
import torch
from safetensors.torch import load_file
from test_distributed import batch, trainer_of

from annotated_mpnet.checkpoints.checkpoint import load_checkpoint
from annotated_mpnet.checkpoints.manifest import verify_checkpoint
from annotated_mpnet.checkpoints.optimizer_state import load_optimizer_tensors, optimizer_tensors
from annotated_mpnet.errors import CheckpointError, DivergedError
from annotated_mpnet.mpnet.batch import NOT_PREDICTED, Batch
from annotated_mpnet.mpnet.config import OptimizationConfig
from annotated_mpnet.mpnet.optimizer import build_optimizer, learning_rate
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining
from annotated_mpnet.settings.config import PretrainingConfig
from annotated_mpnet.signals import Stopped
from annotated_mpnet.text.learn_tokenizer import train_tokenizer
from annotated_mpnet.text.packing import pack_sequences
from annotated_mpnet.text.tokenizer import load_tokenizer
from annotated_mpnet.training.distributed import World
from annotated_mpnet.training.trainer import Trainer
from folders import checkpoint_tree, tree
from processes import forked
from ranks import environment, open_store
from tiny_run import TinyText, bare_runs, changed, run, tiny_config, write_text
from waiting import HUNG

UPDATES = 12
EPOCH = 6
"""Updates per epoch of this file's text: 48 sequences, 8 per update."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TinyText:
    """Write a text whose epochs end with an update, and a short validation text."""
    text = write_text(tmp_path_factory.mktemp("text"))
    words = (text.train_dir / "a.txt").read_text().split()
    shutil.rmtree(text.train_dir)
    text.train_dir.mkdir()
    tokenizer = load_tokenizer(str(text.tokenizer))
    documents: list[str] = []
    tokens = 0
    # One token separates documents, and 30 of a sequence's 32 tokens are text (`text/cutting.py`).
    while tokens <= 30 * (8 * EPOCH - 1):
        documents.append(" ".join(words[5 * len(documents) :][:5]))
        tokens += 1 + len(tokenizer(documents[-1], add_special_tokens=False)["input_ids"])
    file = text.train_dir / "a.txt"
    file.write_text("\n".join(documents))
    assert len(pack_sequences([file], tokenizer, 32)) == 8 * EPOCH
    text.valid_file.write_text(" ".join(words[-100:]))
    return text


@pytest.fixture(scope="module", autouse=True)
def bare() -> Iterator[None]:
    with bare_runs():
        yield


def stop_in(update: int, patch: pytest.MonkeyPatch) -> None:
    """Send SIGTERM in the middle of an update (counted from 1) of the next run."""

    def rate_with_signal(number: int, optimization: OptimizationConfig) -> float:
        if number == update - 1:
            signal.raise_signal(signal.SIGTERM)
        return learning_rate(number, optimization)

    # The loop calls it between the gradient of an update and its step.
    patch.setattr("annotated_mpnet.mpnet.loop.learning_rate", rate_with_signal)


def run_until(update: int, config: PretrainingConfig) -> None:
    """Run until a signal comes in the middle of an update."""
    with pytest.MonkeyPatch.context() as patch:
        stop_in(update, patch)
        with pytest.raises(Stopped):
            run(config)
    assert (config.run.checkpoint_dir / f"checkpoint{update}").exists()


def files_of(config: PretrainingConfig, update: int = UPDATES) -> dict[str, bytes]:
    """Return the files of the checkpoint of an update, except the manifest."""
    return checkpoint_tree(config.run.checkpoint_dir / f"checkpoint{update}")


POINTS = {"mid-epoch": 4, "epoch boundary": EPOCH, "last update": UPDATES - 1}
"""Updates that are finished when a run is interrupted."""

EVALUATIONS = {"aligned": 1, "not aligned": 5}
"""Updates between evaluations: one at each of those points, or at none."""


@dataclass(frozen=True)
class Setting:
    """Settings that an interrupted and an uninterrupted run share."""

    dropout: bool
    evaluation: str

    def config(self, text: TinyText, directory: Path) -> PretrainingConfig:
        config = changed(
            tiny_config(text, directory),
            total_updates=UPDATES,
            eval_interval_steps=EVALUATIONS[self.evaluation],
            test_file=None,
            export_hf=False,
        )
        if not self.dropout:
            return changed(config, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0)
        return config


SETTINGS = [Setting(*each) for each in itertools.product((True, False), EVALUATIONS)]


@pytest.fixture(scope="module")
def uninterrupted(
    text: TinyText, tmp_path_factory: pytest.TempPathFactory
) -> dict[Setting, dict[str, bytes]]:
    configs = {each: each.config(text, tmp_path_factory.mktemp("run")) for each in SETTINGS}
    for config in configs.values():
        run(config)
    return {setting: files_of(config) for setting, config in configs.items()}


@dataclass(frozen=True)
class Cell:
    """One combination of settings and interruption."""

    setting: Setting
    point: str
    workers: int

    @property
    def name(self) -> str:
        dropout = "dropout" if self.setting.dropout else "no dropout"
        return f"{dropout}, {self.setting.evaluation}, {self.point}, {self.workers} workers"


CELLS = [Cell(*each) for each in itertools.product(SETTINGS, POINTS, (0, 2))]


@pytest.fixture(params=CELLS, ids=[cell.name for cell in CELLS])
def resumed(
    request: pytest.FixtureRequest, text: TinyText, tmp_path: Path
) -> tuple[Setting, dict[str, bytes]]:
    """Interrupt and resume a run; in a fixture, to avoid the slow shape checker."""
    cell: Cell = request.param
    config = changed(cell.setting.config(text, tmp_path / "run"), num_workers=cell.workers)
    with pytest.MonkeyPatch.context() as patch:
        if cell.workers:
            # Its own cache, because another process may have cached the sequences already.
            patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        run_until(POINTS[cell.point], config)
        run(changed(config, resume=True))
    return cell.setting, files_of(config)


def test_resumed_run_equals_uninterrupted_run(
    resumed: tuple[Setting, dict[str, bytes]], uninterrupted: dict[Setting, dict[str, bytes]]
) -> None:
    setting, files = resumed
    assert files == uninterrupted[setting]


def test_evaluation_leaves_no_trace_in_the_weights_and_dropout_does(
    uninterrupted: dict[Setting, dict[str, bytes]],
) -> None:
    weights = [uninterrupted[each]["model.safetensors"] for each in SETTINGS]
    assert weights[0] == weights[1]
    assert weights[2] == weights[3]
    assert weights[0] != weights[2]


# Six cells cover each pair of values of any two of the four factors.
CELLS_ON_TWO_RANKS = [
    Cell(Setting(True, "aligned"), "mid-epoch", 0),
    Cell(Setting(False, "not aligned"), "mid-epoch", 2),
    Cell(Setting(True, "aligned"), "epoch boundary", 2),
    Cell(Setting(False, "not aligned"), "epoch boundary", 0),
    Cell(Setting(True, "not aligned"), "last update", 0),
    Cell(Setting(False, "aligned"), "last update", 2),
]
RUNS_ON_TWO_RANKS = len(SETTINGS) + 2 * len(CELLS_ON_TWO_RANKS)


def whole_and_interrupted(
    text: TinyText, directory: Path
) -> tuple[dict[Setting, PretrainingConfig], dict[Cell, PretrainingConfig]]:
    """Return the runs of two ranks, each with 4 of an update's 8 sequences."""
    whole, interrupted = {}, {}
    for number, setting in enumerate(SETTINGS):
        config = setting.config(text, directory / f"whole{number}")
        whole[setting] = changed(config, update_freq=1)
    for number, cell in enumerate(CELLS_ON_TWO_RANKS):
        config = cell.setting.config(text, directory / f"interrupted{number}")
        interrupted[cell] = changed(config, update_freq=1, num_workers=cell.workers)
    return whole, interrupted


def run_matrix(
    rank: int, text: TinyText, directory: Path, environments: Iterator[dict[str, str]]
) -> None:
    """Make one rank's part of all those runs, each in a new process group."""
    whole, interrupted = whole_and_interrupted(text, directory)
    for config in whole.values():
        os.environ |= next(environments)
        run(config)
    for cell, config in interrupted.items():
        with pytest.MonkeyPatch.context() as patch:
            cache = directory / f"cache{cell.workers}"
            patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
            os.environ |= next(environments)
            with patch.context() as signals:
                # Only one rank receives it, and both stop.
                if rank == 1:
                    stop_in(POINTS[cell.point], signals)
                with pytest.raises(Stopped):
                    run(config)
            os.environ |= next(environments)
            run(changed(config, resume=True))


def in_process(
    rank: int, text: TinyText, directory: Path, environments: Iterator[dict[str, str]]
) -> None:
    try:
        with bare_runs():
            run_matrix(rank, text, directory, environments)
    except BaseException:
        (directory / f"failed{rank}").write_text(traceback.format_exc())
        raise


def test_resumed_run_equals_uninterrupted_run_on_two_ranks_too(
    text: TinyText, tmp_path: Path
) -> None:
    # A store for each run: it keeps what its processes have agreed on.
    stores = [open_store() for _ in range(RUNS_ON_TWO_RANKS)]
    processes = [
        forked(
            in_process,
            rank,
            text,
            tmp_path,
            iter([environment(rank, 2, each.port) for each in stores]),
        )
        for rank in range(2)
    ]
    for process in processes:
        process.join(HUNG)
    said = [path.read_text() for path in tmp_path.glob("failed*")]
    assert [process.exitcode for process in processes] == [0, 0], said
    whole, interrupted = whole_and_interrupted(text, tmp_path)
    for cell, config in interrupted.items():
        assert (config.run.checkpoint_dir / f"checkpoint{POINTS[cell.point]}").exists()
        assert files_of(config) == files_of(whole[cell.setting]), cell.name


@pytest.fixture(scope="module")
def compiled(text: TinyText, tmp_path_factory: pytest.TempPathFactory) -> PretrainingConfig:
    """Run compiled, once uninterrupted and once interrupted; return the latter's configuration.

    In a fixture, because the shape checker would look at each call of the compiler; with a single
    layer, because each kind of layer takes seconds to compile.
    """
    directory = tmp_path_factory.mktemp("compiled")
    config = Setting(True, "not aligned").config(text, directory / "whole")
    whole = changed(config, encoder_layers=1, total_updates=4, compile=True)
    run(whole)
    interrupted = changed(whole, checkpoint_dir=directory / "interrupted")
    run_until(2, interrupted)
    torch.compiler.reset()
    run(changed(interrupted, resume=True))
    return interrupted


def needs_compiler(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that compiles, as in ../mpnet/test_compile.py."""
    for mark in (
        pytest.mark.skipif(
            shutil.which("g++") is None and shutil.which("clang++") is None,
            reason="no C++ compiler here, which torch.compile needs on a CPU",
        ),
        pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),
        pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor.*:UserWarning"),
    ):
        test = mark(test)
    return test


@needs_compiler
def test_compiled_run_resumed_equals_the_compiled_run(compiled: PretrainingConfig) -> None:
    whole = changed(compiled, checkpoint_dir=compiled.run.checkpoint_dir.parent / "whole")
    assert files_of(compiled, 4) == files_of(whole, 4)


@needs_compiler
def test_compiled_run_resumes_uncompiled_under_the_same_names(
    compiled: PretrainingConfig, tmp_path: Path
) -> None:
    ours = tmp_path / "run"
    shutil.copytree(compiled.run.checkpoint_dir, ours)
    shutil.rmtree(ours / "checkpoint4")
    plain = changed(compiled, checkpoint_dir=ours, compile=False)
    run(changed(plain, resume_checkpoint=ours / "checkpoint2"))
    for name in ("model.safetensors", "optimizer.safetensors"):
        files = [each / "checkpoint4" / name for each in (ours, compiled.run.checkpoint_dir)]
        one, other = (load_file(each) for each in files)
        assert one.keys() == other.keys()
        for key in one:
            torch.testing.assert_close(one[key], other[key], atol=1e-5, rtol=1e-4, msg=key)


def test_resumed_three_times_it_is_the_same_run(
    text: TinyText, tmp_path: Path, uninterrupted: dict[Setting, dict[str, bytes]]
) -> None:
    setting = SETTINGS[0]
    config = setting.config(text, tmp_path / "run")
    run_until(1, config)
    for update in (4, 5):
        run_until(update, changed(config, resume=True))
    run(changed(config, resume=True))
    assert files_of(config) == uninterrupted[setting]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines if "train/loss" in line]
    assert steps == [2, 4, 6, 8, 10, 12]


def spoil_loss(value: float, update: int, patch: pytest.MonkeyPatch) -> None:
    """Replace the loss of an update's second micro-batch; updates count from 1."""
    loss_sum, calls = MPNetForPretraining.loss_sum, itertools.count(1)

    def spoilt(self: MPNetForPretraining, *arguments: Batch) -> torch.Tensor:
        loss = loss_sum(self, *arguments)
        return loss * value if next(calls) == 2 * update else loss

    patch.setattr(MPNetForPretraining, "loss_sum", spoilt)


def spoil_gradient(value: float, update: int, patch: pytest.MonkeyPatch) -> None:
    """Replace one value in a gradient of that micro-batch."""
    train, calls = Trainer.train, itertools.count(1)

    def spoilt(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        if next(calls) == 2 * update:
            gradient[3] = value
        return gradient

    def hooked(self: Trainer, *arguments: object) -> object:
        self.model.lm_head.dense.bias.register_hook(spoilt)
        return train(self, *arguments)  # type: ignore[arg-type]

    patch.setattr(Trainer, "train", hooked)


@pytest.mark.parametrize(
    ("spoil", "value", "update"),
    [
        (spoil_loss, "nan", 5),
        (spoil_loss, "inf", 6),
        (spoil_gradient, "nan", 6),
        (spoil_gradient, "inf", 5),
    ],
)
def test_a_nan_or_infinite_loss_or_gradient_ends_the_run_before_the_update(
    text: TinyText,
    tmp_path: Path,
    uninterrupted: dict[Setting, dict[str, bytes]],
    spoil: Callable[[float, int, pytest.MonkeyPatch], None],
    value: str,
    update: int,
) -> None:
    # Update 6 is one that is logged, update 5 is not.
    setting = SETTINGS[1]
    config = changed(setting.config(text, tmp_path / "run"), checkpoint_interval=1)
    with pytest.MonkeyPatch.context() as patch:
        spoil(float(value), update, patch)
        with pytest.raises(DivergedError, match=f"of update {update} is (nan|inf)") as caught:
            run(config)
    assert caught.value.exit_code == 5
    numbers = {path.name for path in (tmp_path / "run").glob("checkpoint*")}
    assert numbers == {f"checkpoint{number}" for number in range(1, update)}
    records = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in records
    assert "Infinity" not in records
    # The checkpoints are intact: the resumed run ends in the same bytes.
    run(changed(config, resume=True))
    assert files_of(config) == uninterrupted[setting]


def test_weights_that_overflow_end_the_run(
    text: TinyText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No flag allows such a rate, but an allowed one that is too high has the same effect.
    monkeypatch.setattr(
        "annotated_mpnet.mpnet.loop.learning_rate",
        lambda number, _: 1e20 if number == 4 else 1e-3,
    )
    # With the paper's start no weight is large; the local start has -13 at large distances.
    config = SETTINGS[0].config(text, tmp_path / "run")
    config = changed(config, checkpoint_interval=4, relative_bias_init="normal")
    with pytest.raises(DivergedError, match="update 6"):
        run(config)
    (saved,) = (tmp_path / "run").glob("checkpoint*")
    tensors = load_checkpoint(saved).model_tensors
    assert saved.name == "checkpoint4"
    assert max(tensor.abs().max() for tensor in tensors.values()) < 10


def nothing_to_predict() -> Batch:
    """Return a batch with empty slots only, as from sequences of unknown words."""
    full = batch(99, 3)
    empty_BP = torch.full_like(full.predicted_ids, NOT_PREDICTED)
    return Batch(full.input_ids, full.predicted_positions, empty_BP, None, full.num_tokens, 0)


def everything(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return copies of weights, moments and step counts."""
    found = trainer.model.state_dict() | optimizer_tensors(trainer.optimizer, trainer.model)
    return {name: tensor.clone() for name, tensor in found.items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_update_without_a_token_to_predict_changes_nothing() -> None:
    trainer = trainer_of(World(), fsdp=False)
    trainer.update(0, [batch(1, 3)])
    before = everything(trainer)
    # Even with zero gradients, decay and momentum would change the weights.
    result = trainer.update(1, [nothing_to_predict()] * 2)
    assert_same(everything(trainer), before)
    assert (result.loss_sum, result.num_predicted, result.num_tokens) == (0, 0, 80)


def test_micro_batch_without_a_token_to_predict_contributes_nothing() -> None:
    without, among = (trainer_of(World(), fsdp=False) for _ in range(2))
    batches = [batch(1, 3), batch(2, 5)]
    results = [
        without.update(0, batches),
        among.update(0, [batches[0], nothing_to_predict(), batches[1]]),
    ]
    assert_same(everything(among), everything(without))
    assert results[0].loss_sum == results[1].loss_sum
    assert results[0].num_predicted == results[1].num_predicted


def test_settings_that_may_change_do_change_and_the_log_shows_old_and_new(
    text: TinyText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SETTINGS[0].config(text, tmp_path / "run")
    run_until(4, config)
    trainers: list[Trainer] = []
    train = Trainer.train

    def remember(self: Trainer, *arguments: object) -> object:
        trainers.append(self)
        return train(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "train", remember)
    new = changed(
        config, lr=5e-4, weight_decay=0.1, beta2=0.9, warmup_updates=6, total_updates=14, dropout=0
    )
    _, said = run(changed(new, resume=True))
    log = (tmp_path / "run" / "log.txt").read_text()
    for change in (
        "lr was 0.001 and is 0.0005",
        "weight_decay was 0.01 and is 0.1",
        "beta2 was 0.98 and is 0.9",
        "warmup_updates was 2 and is 6",
        "total_updates was 12 and is 14",
        "dropout was 0.1 and is 0",
    ):
        assert f"changed since the run began: {change}\n" in said
        assert f"changed since the run began: {change}\n" in log

    groups = trainers[0].optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0]
    assert [group["betas"] for group in groups] == [(0.9, 0.9)] * 2
    assert load_checkpoint(tmp_path / "run" / "checkpoint14").model_config.dropout == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines if "train/loss" in line]
    rates = {record["step"]: record["train/learning_rate"] for record in records}
    optimizations = {step: (config if step <= 4 else new).optimization for step in rates}
    assert rates == {step: learning_rate(step - 1, each) for step, each in optimizations.items()}
    assert max(rates) == 14


def test_a_changed_initialisation_is_said_to_have_no_effect_on_resume(
    text: TinyText, tmp_path: Path
) -> None:
    config = SETTINGS[0].config(text, tmp_path / "run")
    run_until(4, config)
    _, said = run(changed(config, resume=True, relative_bias_init="normal"))
    assert "relative_bias_init was auto and is normal: no effect, the weights are loaded" in said
    file = tmp_path / "run" / "config.toml"
    # As in an older run, from before this setting.
    file.write_text(re.sub(r"(?m)^relative_bias_init.*\n", "", file.read_text()))
    _, said = run(changed(config, resume=True, total_updates=14))
    assert "total_updates was 12 and is 14" in said
    assert "relative_bias_init" not in said


def test_a_resume_without_the_optimizer_is_refused(text: TinyText, tmp_path: Path) -> None:
    config = changed(SETTINGS[0].config(text, tmp_path / "run"), valid_file=None)
    run_until(4, changed(config, save_optimizer_state=False))
    with pytest.raises(CheckpointError, match="--no-save-optimizer-state"):
        run(changed(config, resume=True))
    (saved,) = (tmp_path / "run").glob("checkpoint*")
    shutil.rmtree(tmp_path / "run")
    run_until(4, config)
    (saved / "optimizer.safetensors").unlink()
    before = tree(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors") as caught:
        run(changed(config, resume=True))
    assert caught.value.exit_code == 4
    assert tree(tmp_path / "run") == before


GOLDEN = Path(__file__).parent.parent / "golden" / "checkpoint"
"""Saved after update 4 of the run below, by the first version with checkpoints."""

RECORDED = GOLDEN.with_name("checkpoint.json")

SENTENCES = (
    "the sea was calm and the boat lay still",
    "she was calm , and still he lay awake",
    "a boat was seen at sea , and lost again",
    "he was lost , and all the sea was still",
)


def golden_config(directory: Path, tokenizer: Path) -> PretrainingConfig:
    """Return the configuration of the stored checkpoint: one layer, 8 wide, four sentences."""
    train_dir = directory / "text"
    train_dir.mkdir(exist_ok=True)
    (train_dir / "a.txt").write_text("\n".join(SENTENCES * 5))
    text = TinyText(train_dir, train_dir / "a.txt", train_dir / "a.txt", tokenizer)
    return changed(
        tiny_config(text, directory / "run"),
        encoder_layers=1,
        encoder_embed_dim=8,
        encoder_ffn_dim=16,
        max_tokens=16,
        total_updates=6,
        # The first version had no other start.
        relative_bias_init="normal",
        valid_file=None,
        test_file=None,
        export_hf=False,
    )


def golden_numbers(checkpoint: Path) -> dict[str, object]:
    """Return a checkpoint's tokens of a sentence, and logits of three of them."""
    loaded = load_checkpoint(checkpoint)
    model = MPNetForPretraining(loaded.model_config).eval()
    model.load_state_dict(dict(loaded.model_tensors))
    optimizer = build_optimizer(model, OptimizationConfig(), torch.device("cpu"))
    assert loaded.optimizer_tensors is not None
    load_optimizer_tensors(optimizer, model, loaded.optimizer_tensors)
    assert_same(optimizer_tensors(optimizer, model), dict(loaded.optimizer_tensors))
    tokenizer = load_tokenizer(str(checkpoint / "tokenizer"))
    ids_BL = tokenizer(SENTENCES[:1], return_tensors="pt")["input_ids"]
    positions_BP = torch.tensor([[4, 1, 2]])
    with torch.no_grad():
        logits_BPV = model(ids_BL, positions_BP, ids_BL.gather(1, positions_BP))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    return {
        "format_version": manifest["content"]["format_version"],
        "update": loaded.state.update,
        "input_ids": ids_BL[0].tolist(),
        "logits": logits_BPV[0, :, :8].tolist(),
    }


def write_golden() -> None:
    """Write the stored checkpoint again: see ../golden/README.md."""
    with TemporaryDirectory() as folder:
        write_golden_from(Path(folder))


def write_golden_from(directory: Path) -> None:
    (directory / "words.txt").write_text("\n".join(SENTENCES))
    tokenizer = directory / "tokenizer"
    train_tokenizer([directory / "words.txt"], vocab_size=80).save_pretrained(tokenizer)
    config = golden_config(directory, tokenizer)
    run_until(4, config)
    shutil.rmtree(GOLDEN, ignore_errors=True)
    shutil.copytree(config.run.checkpoint_dir / "checkpoint4", GOLDEN)
    lines = (f'"{key}": {json.dumps(each)}' for key, each in golden_numbers(GOLDEN).items())
    RECORDED.write_text("{" + ",\n ".join(lines) + "}\n")


def test_stored_checkpoint_of_the_first_version_still_means_what_it_meant() -> None:
    verify_checkpoint(GOLDEN)
    found, recorded = golden_numbers(GOLDEN), json.loads(RECORDED.read_text())
    logits = found.pop("logits"), recorded.pop("logits")
    assert found == recorded
    torch.testing.assert_close(*map(torch.tensor, logits), atol=1e-5, rtol=0)


def test_stored_checkpoint_of_the_first_version_still_resumes(tmp_path: Path) -> None:
    config = golden_config(tmp_path, GOLDEN / "tokenizer")
    # It cut the last words of masks at their end; today they are cut anywhere.
    with pytest.raises(CheckpointError, match="masking"):
        run(changed(config, resume_checkpoint=GOLDEN))
    _, said = run(changed(config, resume_checkpoint=GOLDEN, allow_change="masking"))
    assert "after update 4" in said
    run(changed(config, checkpoint_dir=tmp_path / "whole"))
    resumed, whole = (load_checkpoint(tmp_path / name / "checkpoint6") for name in ("run", "whole"))
    # Only up to rounding: other library versions sum in another order.
    for name, tensor in whole.model_tensors.items():
        torch.testing.assert_close(resumed.model_tensors[name], tensor, atol=1e-4, rtol=0, msg=name)
