"""A whole run, from settings to report.

    prepare -> open the directory -> resume -> train -> test -> export -> report

Cheap checks come first, and nothing is written to the run's directory before everything is ready:

    error                                        found after         left on disk
    -----------------------------------------    ----------------    ---------------------------
    a flag, the device, W&B without its package  no time             nothing
    a directory that holds another run           no time             nothing
    weights that cannot be read                  seconds             nothing
    the text, the tokenizer                      seconds to hours    the cache of packed text
    weights of another vocabulary                the same            the cache
    the checkpoint to resume from                the same            the cache
    memory                                       the first update    a run without a checkpoint

`--dry-run` finds the last one too: it makes two updates of one micro-batch in memory, and leaves
only the cache.

A resumed run takes its architecture from its checkpoint wherever the flags are at their defaults.
Its data, seed, batch, sequence length, masking and tokenizer are its *identity*. The checkpoint
records it, and another identity is refused unless `--allow-change` names the difference. Learning
rate, schedule and dropout may change; the log says so.

Under torchrun every rank executes this file. All of them read the text and build the model (the
weights are a function of the seed), but only rank 0 has a directory and a console.
`World.on_rank_0` runs something on rank 0 and tells the others the result.
"""

import dataclasses
import logging
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from annotated_mpnet import conversion
from annotated_mpnet.checkpoints.checkpoint import (
    CONFIG,
    TOKENIZER,
    TrainState,
    read_model_config,
)
from annotated_mpnet.checkpoints.manifest import library_versions, read_folder
from annotated_mpnet.checkpoints.resume import checkpoint_path
from annotated_mpnet.checkpoints.retention import newest_first
from annotated_mpnet.checkpoints.run_directory import (
    METRICS,
    RunDirectory,
    find_start,
    nothing_to_resume,
    refuse_taken_directory,
)
from annotated_mpnet.errors import CheckpointError, ConfigError, DataError, shown
from annotated_mpnet.fast.allocator import keep_memory
from annotated_mpnet.fast.attention import ATTENTIONS
from annotated_mpnet.fast.compilation import compile_model
from annotated_mpnet.fast.kernel_check import kernel_fault
from annotated_mpnet.fast.projection import padded_linear
from annotated_mpnet.files.atomic import REPLACED, directory_of
from annotated_mpnet.mpnet.collator import DataCollatorForMaskedPermutedLanguageModeling
from annotated_mpnet.mpnet.config import ArchitectureConfig, ModelConfig, flag
from annotated_mpnet.mpnet.loop import Evaluation
from annotated_mpnet.runs.card import card_facts
from annotated_mpnet.runs.initial_weights import build_model, check_export
from annotated_mpnet.runs.plan import plan
from annotated_mpnet.runs.preparation import (
    Plateau,
    choose_attention,
    choose_device,
    choose_recording,
    identity_of,
    measure_plateau,
)
from annotated_mpnet.runs.session import Session
from annotated_mpnet.runs.texts import read_text
from annotated_mpnet.settings.config import PretrainingConfig, RunConfig, fields_of
from annotated_mpnet.settings.config_file import to_toml
from annotated_mpnet.tracking.display import finish_line, size, took
from annotated_mpnet.tracking.plateau import watch_for
from annotated_mpnet.tracking.report import REPORT, ReportFacts, write_report
from annotated_mpnet.tracking.sinks import check_tracking, read_metrics
from annotated_mpnet.tracking.tracker import Tracker
from annotated_mpnet.training.distributed import SharedNetwork, World, open_world
from annotated_mpnet.training.memory import is_out_of_memory, out_of_memory
from annotated_mpnet.training.muon import choose_optimizer
from annotated_mpnet.training.throughput import memory_peak
from annotated_mpnet.training.trainer import Trainer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """What a run produced.

    `plateau` is the loss of guessing by frequency, and `test` the best model's loss; both are None
    without their text. `export` is None if it was not wanted or not possible.
    """

    directory: Path
    state: TrainState
    plateau: Plateau | None = None
    test: Evaluation | None = None
    export: Path | None = None


def run_pretraining(
    config: PretrainingConfig,
    console: Console | None = None,
    *,
    dry_run: bool = False,
    notes: Sequence[str] = (),
) -> RunResult | None:
    """Run a whole pretraining, or with `dry_run` only try one micro-batch and print the plan.

    Args:
        config: of the run.
        console: standard output if not given.
        dry_run: write nothing but the cache.
        notes: what to say with the plan.

    Raises:
        UserError: one of its kinds, with one line for the user.
        Stopped: a signal asked for it.
    """
    config.validate()
    with open_world(config.machine.distributed_timeout) as world, ExitStack() as stack:
        log.debug("%s; libraries: %s", world, library_versions())
        console = console or Console() if world.is_first else Console(quiet=True)
        check_tracking(config.tracking)
        _refuse_different_settings(config, world)
        device, bf16 = choose_device(config.machine, world)
        stack.enter_context(explaining_memory(config, device, world.size))

        # Before the text is read, which may take hours: is the directory free, is there something
        # to resume?
        path = config.run.checkpoint_dir
        start = "start"
        if config.run.autoresume:
            start = world.on_rank_0(lambda: find_start(path))
            _print(console, f"--autoresume: {AUTORESUME[start].format(path)}")
        run, ignored = config.run, list[str]()
        if start == "resume":
            run, ignored = _resumed(run)
            config = dataclasses.replace(config, run=run)
        here, anew = _resumes_here(run), run.overwrite or start == "restart"
        world.on_rank_0(lambda: refuse_taken_directory(path, here, anew))
        saved, tokenizer_files = world.on_rank_0(lambda: _saved(config.run))
        if saved is not None:
            config = _with_network(config, saved)
        source = config.run.initial_weights
        initial = None if source is None else conversion.load_any(source)

        log.debug("reading text and tokenizer, to compute on %s", device)
        tokenizer = config.data.tokenizer_name or (initial and initial.tokenizer)
        if tokenizer is None and tokenizer_files:
            tokenizer = stack.enter_context(directory_of(tokenizer_files))
        data = dataclasses.replace(config.data, tokenizer_name=tokenizer)
        text = read_text(data, config.run.seed, world.rank, world.size)
        identity = identity_of(config, text, world.size)
        _refuse_different_text(identity, world)

        model, said = build_model(config, text, initial)
        modules = initial.modules if initial else {}
        del initial  # the model has a copy of its weights
        if config.run.export_hf:
            said += check_export(text.vocabulary, model.config)
        fault = None
        if device.type == "cuda" and config.machine.attention in ("auto", "triton"):
            # One that any rank has: all compute the same way.
            faults = world.gather_objects(kernel_fault(model.config, device, bf16))
            fault = next((each for each in faults if each is not None), None)
        attention = choose_attention(config.machine.attention, device, fault)
        model.use_attention(ATTENTIONS[attention[0]])
        model.use_gradient_checkpointing(config.machine.gradient_checkpointing)
        if device.type == "cuda":
            model.lm_head.project = padded_linear
        if config.machine.compile:
            compile_model(model, device, lengths_vary=config.data.packing != "full")
        if device.type == "cpu":
            keep_memory()
        # First the device and the shards, then the optimizer: it needs the final parameters.
        network = SharedNetwork(model, world, device, fsdp=config.machine.fsdp)
        stack.callback(network.close)
        optimizer = choose_optimizer(model, config.optimization, device)
        log.debug("built model and optimizer: %s", model.config)

        directory, tracker = None, Tracker.silent()
        if world.is_first and not dry_run:
            directory = RunDirectory(path, here, run.overwrite, start == "restart")
            stack.enter_context(directory)
            tracker = Tracker(path, directory.run_id, config, console)
        # The other ranks wait here until rank 0 has the directory.
        world.on_rank_0(lambda: None)
        add_gradient, recording = choose_recording(config, device, world.size)
        trainer = Trainer(
            network,
            optimizer,
            config.optimization,
            config.objective.input_mode,
            config.run.seed,
            bf16,
            tracker,
            add_gradient,
        )
        collator = DataCollatorForMaskedPermutedLanguageModeling(
            text.vocabulary,
            config.objective,
            config.data.max_tokens,
            config.run.seed,
            packing=config.data.packing,
        )
        session = Session(
            config.run,
            identity,
            text,
            collator,
            directory,
            trainer,
            tracker,
            config.tracking.logging_steps,
            card_facts(config, source),
            modules,
        )
        planned = [
            *ignored,
            *said,
            *notes,
            *plan(config, text, model, device, bf16, attention, recording, world.size),
        ]
        if dry_run:
            _rehearse(session, device, planned, console)
            return None
        return _run(session, config, planned, console)


def _run(
    session: Session, config: PretrainingConfig, planned: Sequence[str], console: Console
) -> RunResult:
    """Resume or start, train, test, export, report."""
    started = time.perf_counter()
    directory, tracker = session.directory, session.tracker
    path, settings = config.run.checkpoint_dir, to_toml(config)
    state = session.restore(settings)
    if session.is_finished(state):
        # Printed but not logged: a finished run is not changed by a byte.
        _print(
            console,
            f"the run in {path} is complete, with {state.update} updates; to continue "
            "it, give a larger --total-updates",
        )
        return RunResult(path, state)
    for line in planned:
        tracker.say(line)
    if directory is not None:
        # Only now: `restore` compared the settings with those of the previous file.
        directory.write("config.toml", settings)
        # The last file of a finished run; without it, a resume makes what is missing.
        (path / REPORT).unlink(missing_ok=True)
    plateau = measure_plateau(session.text)
    if plateau is not None:
        session.facts = dataclasses.replace(
            session.facts, plateau_bits=plateau.bits, plateau_accuracy=plateau.accuracy
        )
        tracker.say(
            f"unigram plateau on the validation text: {plateau.bits:.2f} bits, accuracy "
            f"{plateau.accuracy:.3f}: what guessing by frequency reaches"
        )
        if directory is not None:
            metrics = path / METRICS
            earlier = read_metrics(metrics) if metrics.exists() else []
            tracker.watch_plateau(watch_for(plateau.train_bits, config, earlier))
    with tracker:
        tracker.watch(session.trainer.model)
        state = session.train()
    # The test loads the best model, which is then exported.
    test = session.test()
    export = session.export()
    if directory is not None:
        text_read = session.text_report()
        facts = ReportFacts(
            config=config,
            state=state,
            plan=[line for line in planned if line not in text_read],
            text_read=text_read,
            seconds=time.perf_counter() - started,
            plateau_bits=plateau.bits if plateau else None,
            train_plateau_bits=plateau.train_bits if plateau else None,
            test_bits=test.bits if test else None,
            test_accuracy=test.accuracy if test else None,
            export=export,
        )
        for file in write_report(path, facts, tracker.warn):
            tracker.say(f"report: {file}")
    return RunResult(path, state, plateau, test, export)


def _rehearse(
    session: Session, device: torch.device, planned: Sequence[str], console: Console
) -> None:
    """Measure one micro-batch, and print the plan with what was measured."""
    trainer, optimization = session.trainer, session.trainer.optimization
    micro_batches, *_ = next(session.source().updates(0, 1))
    # The first update allocates memory and compiles kernels, so the second one is timed.
    for update in range(2):
        started = time.perf_counter()
        result = trainer.update(update, micro_batches)
        trainer.catch_up()
        seconds = time.perf_counter() - started
    for line in (
        *planned,
        f"tried: one micro-batch of {optimization.batch_size} sequences and a step took "
        f"{took(seconds)}, {result.num_tokens / seconds:,.0f} tokens/s",
        f"tried: at most {size(memory_peak(device) * 1e9)} of memory",
        finish_line(optimization.total_updates, seconds * optimization.update_freq),
        "dry run: nothing was trained, and no run was started",
    ):
        _print(console, line)


def _print(console: Console, line: str) -> None:
    # Broken between words on a terminal, whole in a file.
    console.print(line, markup=False, highlight=False, soft_wrap=not console.is_terminal)


@contextmanager
def explaining_memory(
    config: PretrainingConfig, device: torch.device, world_size: int
) -> Iterator[None]:
    """Within the block, turn running out of memory into an error that says which flags to try."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        # The frames of the traceback still hold the tensors that filled the memory.
        traceback.clear_frames(error.__traceback__)
        raise out_of_memory(config, device, world_size) from error


MAY_DIFFER = frozenset(
    {
        *("train_dir", "valid_file", "test_file", "tokenizer_name", "hf_model_path"),
        *("checkpoint_dir", "resume_checkpoint", "tensorboard_log_dir"),
        *("num_workers", "distributed_timeout", "debug", "wandb_project", "wandb_name", "wandb_id"),
    }
)
"""Settings that may differ between machines: paths, and what has no effect on the numbers."""


def _refuse_different_settings(config: PretrainingConfig, world: World) -> None:
    """Raise a `ConfigError` if the ranks were not started by the same command.

    Each would apply its own learning rate to the sum of the gradients, and the networks would drift
    apart without any sign of it. Of what may differ, only whether it is given is compared.
    """
    settings = {
        each.name: value if each.name not in MAY_DIFFER else value is not None
        for group, each in fields_of(config)
        for value in [vars(vars(config)[group])[each.name]]
    }
    for rank, name, other, first in _differences(settings, world):
        raise ConfigError(
            f"rank {rank} and rank 0 differ in {flag(name)}: {str(other)[:80]} and "
            f"{str(first)[:80]}; expected the same command on all machines"
        )


def _refuse_different_text(identity: dict[str, str | int | float], world: World) -> None:
    """Raise a `DataError` if the ranks do not train on the same text with the same settings.

    On several machines each rank reads its own copy. With an older copy on one of them, some
    sequences would be trained on twice and others never, without any sign of it.
    """
    log.debug("identity of the run: %s", identity)
    for rank, name, other, first in _differences(identity, world):
        raise DataError(
            f"rank {rank} differs from rank 0 in {name}: {shown(str(other))} and "
            f"{shown(str(first))}; expected the same files on all machines"
        )


def _differences(
    values: Mapping[str, object], world: World
) -> Iterator[tuple[int, str, object, object]]:
    """Yield where a rank differs from rank 0: rank, name, its value, that of rank 0."""
    first, *others = world.gather_objects(values)
    for rank, other in enumerate(others, start=1):
        for name, value in other.items():
            if value != first[name]:
                yield rank, name, value, first[name]


def _saved(run: RunConfig) -> tuple[ModelConfig | None, dict[str, bytes]]:
    """Return architecture and tokenizer of the checkpoint to resume from; nothing without a resume.

    They are read before the checkpoint is verified. If none can be read, the result is nothing too,
    and `Session.restore` reports the error.

    Raises:
        CheckpointError: there is no checkpoint at all.
    """
    if not run.resuming:
        return None, {}
    wanted = run.resume_checkpoint
    # Killed while the only one was replaced, a run has it under another name for now (`recover`).
    replaced = run.checkpoint_dir.glob(f"{REPLACED}*")
    candidates = newest_first(run.checkpoint_dir) or list(replaced)
    if wanted is not None:
        candidates = [checkpoint_path(wanted)]
    if not candidates:
        raise nothing_to_resume(run.checkpoint_dir)
    for path in candidates:
        try:
            return read_model_config(path / CONFIG), read_folder(path, TOKENIZER)
        except CheckpointError:
            continue
    return None, {}


def _with_network(config: PretrainingConfig, saved: ModelConfig) -> PretrainingConfig:
    """Take the architecture from a checkpoint wherever a flag is at its default.

    Dropout is not part of the architecture. A flag with another value stays, and is refused later:

    >>> six = PretrainingConfig(model=ArchitectureConfig(encoder_layers=6))
    >>> saved = ModelConfig(encoder_layers=3, encoder_ffn_dim=99, dropout=0.0)
    >>> model = _with_network(six, saved).model
    >>> model.encoder_layers, model.encoder_ffn_dim, model.dropout
    (6, 99, 0.1)
    """
    default = vars(ArchitectureConfig())
    adopted = {
        name: vars(saved)[name]
        for name, value in vars(config.model).items()
        if not name.endswith("dropout") and value == default[name]
    }
    model, data = dataclasses.replace(config.model, **adopted), config.data
    if data.max_positions is None:
        data = dataclasses.replace(data, max_positions=saved.max_positions)
    return dataclasses.replace(config, model=model, data=data)


AUTORESUME = {
    "start": "no run in {} yet, so one is started",
    "restart": "the run in {} has no checkpoint yet, so it is started again from update 0",
    "resume": "there is a run in {}, which is resumed",
}


def _resumed(run: RunConfig) -> tuple[RunConfig, list[str]]:
    """Return the settings of a run that --autoresume has found, and notes.

    >>> run, notes = _resumed(RunConfig(autoresume=True, resume_checkpoint=Path("other")))
    >>> run.resuming, run.resume_checkpoint, notes
    (True, None, ['--resume-checkpoint other is ignored: the run itself is resumed'])
    """
    notes = []
    if run.resume_checkpoint is not None:
        notes.append(
            f"--resume-checkpoint {run.resume_checkpoint} is ignored: the run itself is resumed"
        )
    return dataclasses.replace(run, resume=True, resume_checkpoint=None), notes


def _resumes_here(run: RunConfig) -> bool:
    """Return whether to resume the run in `checkpoint_dir`.

    A checkpoint from another directory starts a new run here, which must not replace another one.

    >>> def resumes_here(**settings):
    ...     return _resumes_here(RunConfig(checkpoint_dir=Path("runs/b"), **settings))
    >>> resumes_here(), resumes_here(resume=True)
    (False, True)
    >>> resumes_here(resume_checkpoint=Path("runs/b/checkpoint500"))
    True
    >>> resumes_here(resume_checkpoint=Path("runs/a/checkpoint500"))
    False
    """
    if run.resume_checkpoint is None or not run.resuming:
        return run.resuming
    return run.resume_checkpoint.resolve().parent == run.checkpoint_dir.resolve()
