"""A whole run: everything that stands around the loop.

    configuration -> tokenizer -> rows of tokens -> network -> (resume) -> loop
                  -> test -> export -> report

Each step can fail because of something that its user can mend, so the cheap ones come first: a
wrong flag is found before a file is read, a taken directory before text is tokenised, and the
directory is not written to before the first update is about to begin. What a mistake costs, in
the order of this file:

    what is wrong                                found after         left behind
    -----------------------------------------    ----------------    ---------------------------
    a flag, a number, two that exclude others    no time             nothing
    the device, W&B without its package          no time             nothing
    a directory that holds another run           no time             nothing
    the text, the tokenizer                      seconds to hours    the cache of packed text
    weights that do not fit                      the same            the cache
    the checkpoint to resume from                the same            the cache; nothing is loaded
    memory                                       the first update    a run without a checkpoint

With `--dry-run` the last line is found out too, and nothing is left behind but the cache: it does
all of this, two updates of one micro-batch on the weights in memory, and writes no file of a run.

The network of a run that is resumed is the one that it has: architecture flags that were left at
their defaults are taken from its checkpoint, so that `--resume` need not repeat them, and a run
that began with somebody's weights goes on with their architecture. A flag that says otherwise is
refused. The data are not treated so: flags say what is read, and must say the same again.

A run is fixed by its data, seed, batch, row length, masking and tokenizer. They are its *identity*,
kept in each checkpoint; a resume with another identity is refused, naming what differs, unless
`--allow-change` permits it. Learning rate, schedule and dropout may change: that is then said.

**Two halves**, with the directory between them. `_prepare` makes everything that a run is computed
with, and touches no directory; `_run` opens the directory, finds out where the run stands, and goes
on from there. A dry run is the first half with another end (`_rehearse`).

Under torchrun every process comes through here, each with a `World` that tells it apart. All of
them read the text and build the network, since weights are a function of the seed and need not be
sent; only rank 0 has a directory and a voice. What only one can know, all are told
(`World.first`), so that no `if` takes ranks different ways.

Next: `session.py` for resume, checkpoints, test and export; `tracking.py` for what is recorded;
`conversion/` for the way out to Hugging Face.
"""

import dataclasses
import logging
import time
import traceback
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from annotated_mpnet.config import ArchitectureConfig, ModelConfig, PretrainingConfig
from annotated_mpnet.config_file import to_toml
from annotated_mpnet.data.texts import Text, read_text
from annotated_mpnet.errors import CheckpointError, DataError
from annotated_mpnet.initial_weights import build_model, check_export
from annotated_mpnet.plan import plan
from annotated_mpnet.preparation import (
    Plateau,
    choose_attention,
    choose_device,
    identity_of,
    measure_plateau,
)
from annotated_mpnet.report import ReportFacts, write_report
from annotated_mpnet.session import Session
from annotated_mpnet.training.allocator import keep_memory
from annotated_mpnet.training.checkpoint import CONFIG, TrainState, read_model_config
from annotated_mpnet.training.compilation import compile_model
from annotated_mpnet.training.display import finish_line
from annotated_mpnet.training.distributed import SharedNetwork, World, open_world
from annotated_mpnet.training.manifest import library_versions
from annotated_mpnet.training.memory import is_out_of_memory, out_of_memory
from annotated_mpnet.training.optimizer import build_optimizer
from annotated_mpnet.training.plateau import watch_for
from annotated_mpnet.training.retention import newest_first
from annotated_mpnet.training.run_directory import (
    METRICS,
    RunDirectory,
    nothing_to_resume,
    refuse_taken_directory,
)
from annotated_mpnet.training.sinks import check_tracking, read_metrics
from annotated_mpnet.training.throughput import memory_peak
from annotated_mpnet.training.tracking import Tracker
from annotated_mpnet.training.trainer import Evaluation, Trainer

log = logging.getLogger(__name__)
"""For --debug. What a user is to know is the tracker's."""


@dataclass(frozen=True)
class RunResult:
    """What a run leaves behind.

    Attributes:
        directory: the run's.
        state: behind its last update.
        plateau: what guessing by frequency reaches on the validation text; None without one.
        test: the best model on the test text; None without one.
        export: the Hugging Face model; None if it was not wanted or cannot be represented.
    """

    directory: Path
    state: TrainState
    plateau: Plateau | None
    test: Evaluation | None
    export: Path | None


def run_pretraining(
    config: PretrainingConfig, console: Console | None = None, *, dry_run: bool = False
) -> RunResult | None:
    """Run a whole pretraining.

    Args:
        config: all settings.
        console: where to report; standard output if not given.
        dry_run: prepare everything, try one micro-batch, say what would be done, and write nothing
            but the cache of tokenised text.

    Returns:
        What the run left behind; None after a dry run.

    Raises:
        UserError: one of its kinds, with one line for the user.
        Stopped: a signal asked for it.
    """
    # What costs nothing to find out comes first: before anybody is waited for.
    config.validate()
    with open_world(config.machine.distributed_timeout) as world:
        log.debug("%s; libraries: %s", world, library_versions())
        spoken_to = console or Console() if world.is_first else Console(quiet=True)
        with explaining_memory(config, world):
            prepared = _prepare(config, world)
            # Closed before the world is, also if something goes wrong (`SharedNetwork.close`).
            with closing(prepared.network):
                if dry_run:
                    _rehearse(prepared, spoken_to)
                    return None
                return _run(prepared, spoken_to)


@contextmanager
def explaining_memory(config: PretrainingConfig, world: World) -> Iterator[None]:
    """Within the block, say which flags to try if something does not fit into memory.

    Wherever that happens: most of the time in the first update, but a network may not even come
    onto its device, and a dry run is made to find that out. Out of memory is a RuntimeError, as
    nearly all is that PyTorch raises; what is not recognised as that (`memory.py`) is somebody's
    bug, and goes on as it is.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        # The frames that it came through hold on to all that has filled the memory.
        traceback.clear_frames(error.__traceback__)
        device, _ = choose_device(config, world)
        raise out_of_memory(config, device, world.size) from error


@dataclass(frozen=True)
class _Prepared:
    """A run before its directory is written to.

    Attributes:
        config: all settings; the architecture that of the network, whoever decided it.
        world: the ranks.
        text: of the run; of a stream, this rank's share.
        network: on its device, shared out.
        optimizer: new. On a resume its means are put in later (`Session.beginning`).
        device: where this rank computes.
        bf16: whether matrix products run in bfloat16.
        notes: what was decided about the weights, in lines.
    """

    config: PretrainingConfig
    world: World
    text: Text
    network: SharedNetwork
    optimizer: torch.optim.Optimizer
    device: torch.device
    bf16: bool
    notes: list[str]

    def trainer(self, tracker: Tracker) -> Trainer:
        """Return the loop, which will speak through a tracker."""
        return Trainer(self.network, self.optimizer, self.config, self.bf16, tracker)

    def plan(self) -> list[str]:
        """Return the lines that say what is about to be done."""
        model = self.network.model
        lines = plan(self.config, self.text, model, self.device, self.bf16, self.world.size)
        return [*self.notes, *lines]


def _prepare(config: PretrainingConfig, world: World) -> _Prepared:
    """Make all that a run is computed with; write nothing but the cache of packed text.

    Raises:
        ConfigError, CheckpointError, DataError, WriteError: see the table of the chapter, whose
            order is the order of these lines.
    """
    check_tracking(config.tracking)
    device, bf16 = choose_device(config, world)
    world.first(lambda: refuse_taken_directory(*_where(config)))
    # The architecture must be known before there is a network, and thus long before the checkpoint
    # is verified. It is a page of JSON, read ahead; what is wrong with it is said later.
    saved = world.first(lambda: _saved_network(config))
    if saved is not None:
        config = _with_network(config, saved)
    # Minutes may pass here, with a large text that is not in the cache yet.
    log.debug("reading text and tokenizer, to compute on %s", device)
    text = read_text(config.data, config.run.seed, world.rank, world.size)
    log.debug("identity of the run: %s", identity_of(config, text, world.size))
    _refuse_different_text(config, text, world)
    model, notes = build_model(config, text)
    notes += check_export(config, text, model)
    # Four ways to compute the same numbers, to rounding: none of them is a part of the run, and a
    # resume may choose others.
    model.use_attention(choose_attention(config.machine.attention, device)[0])
    model.use_gradient_checkpointing(config.machine.gradient_checkpointing)
    if config.machine.compile:
        compile_model(model, device, lengths_vary=config.data.packing != "full")
    if device.type == "cpu":
        keep_memory()
    # In this order: the network goes to its device and is shared out, and only then there are the
    # parameters that the optimizer is to move.
    network = SharedNetwork(model, world, device, fsdp=config.machine.fsdp)
    optimizer = build_optimizer(model, config.optimization, device)
    log.debug("network and optimizer are made, for %s", model.config)
    return _Prepared(config, world, text, network, optimizer, device, bf16, notes)


def _run(prepared: _Prepared, console: Console) -> RunResult:
    """Open the directory, and run from where the run in it stands to the report."""
    config, world, started = prepared.config, prepared.world, time.perf_counter()
    # From here on the directory is locked, and written to.
    with _directory(config, world) as directory:
        path = config.run.checkpoint_dir
        tracker = Tracker.silent()
        if directory is not None:
            tracker = Tracker(path, directory.run_id, config, console)
        session = Session(config, prepared.text, directory, prepared.trainer(tracker))
        progress = session.beginning()
        if session.is_complete(progress.state):
            # Said, but not kept: a run that is complete is left as it is, to the byte. So a job
            # that is started once too often does no harm, and ends with 0.
            _print(
                console,
                f"the run in {path} is complete, with {progress.state.update} updates; a larger "
                "--total-updates would go on with it",
            )
            return RunResult(path, progress.state, None, None, None)
        planned = prepared.plan()
        for line in planned:
            tracker.say(line)
        # Only now: what changed since the run began was read off the former file.
        if directory is not None:
            directory.write("config.toml", to_toml(config))
        plateau = measure_plateau(prepared.text)
        if plateau is not None:
            tracker.say(
                f"unigram plateau on the validation text: {plateau.bits:.2f} bits, accuracy "
                f"{plateau.accuracy:.3f}: what guessing by frequency reaches"
            )
            if directory is not None:
                metrics = path / METRICS
                former = read_metrics(metrics) if metrics.exists() else []
                tracker.watch_plateau(watch_for(plateau.train_bits, config, former))
        with tracker:
            tracker.watch(prepared.network.model)
            state = session.train(progress)
        # Test before export: it puts the best model in place of the last, and that is exported.
        result = RunResult(path, state, plateau, session.test(), session.export())
        if directory is not None:
            facts = _facts(config, result, planned, session.text_read(), started)
            for file in write_report(path, facts, tracker.warn):
                tracker.say(f"report: {file}")
        return result


def _facts(
    config: PretrainingConfig,
    result: RunResult,
    planned: list[str],
    text_read: list[str],
    started: float,
) -> ReportFacts:
    """Return what the report is to say; numbers that stand in `metrics.jsonl` are not among it.

    Args:
        config: all settings.
        result: of the run.
        planned: lines of the plan.
        text_read: lines about the text, which at the end know more than the plan did.
        started: by the clock of `time.perf_counter`.
    """
    test, plateau = result.test, result.plateau
    return ReportFacts(
        config=config,
        state=result.state,
        # The plan speaks of the text too; once is enough.
        plan=[line for line in planned if line not in text_read],
        text_read=text_read,
        seconds=time.perf_counter() - started,
        plateau_bits=None if plateau is None else plateau.bits,
        train_plateau_bits=None if plateau is None else plateau.train_bits,
        test_bits=None if test is None else test.bits,
        test_accuracy=None if test is None else test.accuracy,
        export=result.export,
    )


def _refuse_different_text(config: PretrainingConfig, text: Text, world: World) -> None:
    """Raise a `DataError` if the ranks do not train on the same text: they read it on their own.

    On one machine it is the same file. On several, somebody has copied it, and a copy that is a day
    older makes other rows: each rank would take its batches out of another order, some rows would
    be trained on twice in an epoch and others never, and nothing would look wrong. The identity is
    at hand, and whatever else the ranks might disagree in, a seed or a tokenizer, is part of it.
    """
    identities = world.gather_objects(identity_of(config, text, world.size))
    for rank, identity in enumerate(identities):
        for name, value in identity.items():
            if value != identities[0][name]:
                raise DataError(
                    f"rank {rank} differs from rank 0 in {name}: {str(value)[:80]!r} and "
                    f"{str(identities[0][name])[:80]!r}; expected the same files on all machines"
                )


def _saved_network(config: PretrainingConfig) -> ModelConfig | None:
    """Return the network of the checkpoint that a resume would begin with, before it is verified.

    None without a resume, or if none can be read: `Session.beginning` says what is wrong then.
    The order is that in which a resume will try them. A damaged file may hide behind a readable
    `config.json`, and then an older one is loaded; but all of a run have the same architecture.

    Raises:
        CheckpointError: there is no checkpoint at all.
    """
    if not config.run.resuming:
        return None
    wanted = config.run.resume_checkpoint
    candidates = newest_first(config.run.checkpoint_dir) if wanted is None else [wanted]
    if not candidates:
        # At once: not when the text has been packed, and a directory made where there was none.
        raise nothing_to_resume(config.run.checkpoint_dir)
    for path in candidates:
        try:
            return read_model_config(path / CONFIG)
        except CheckpointError:
            continue
    return None


def _with_network(config: PretrainingConfig, saved: ModelConfig) -> PretrainingConfig:
    """Return a configuration whose architecture is a checkpoint's wherever no flag says otherwise.

    Dropout is not part of it: that of the flags holds.

    >>> adopted = _with_network(PretrainingConfig(), ModelConfig(encoder_layers=3, dropout=0.0))
    >>> adopted.model.encoder_layers, adopted.model.dropout
    (3, 0.1)

    A flag that says otherwise stays, so that the comparison that follows can refuse it:

    >>> six = PretrainingConfig(model=ArchitectureConfig(encoder_layers=6))
    >>> _with_network(six, ModelConfig(encoder_layers=3)).model.encoder_layers
    6

    A flag that repeats the default cannot be told from one that was left out, and gives way.
    """
    usual = ArchitectureConfig()
    adopted = {
        each.name: vars(saved)[each.name]
        for each in dataclasses.fields(usual)
        if not each.name.endswith("dropout")
        and vars(config.model)[each.name] == vars(usual)[each.name]
    }
    data = config.data
    if data.max_positions is None:
        data = dataclasses.replace(data, max_positions=saved.max_positions)
    model = dataclasses.replace(config.model, **adopted)
    return dataclasses.replace(config, model=model, data=data)


def _rehearse(prepared: _Prepared, console: Console) -> None:
    """Try one micro-batch, and say what the run would be like; no file of a run is written.

    The plan is an estimate; this is measured. An update of several micro-batches (--update-freq)
    takes as many times as long, and the memory of one of them.
    """
    tracker = Tracker.silent()
    trainer = prepared.trainer(tracker)
    session = Session(prepared.config, prepared.text, None, trainer)
    micro_batches, *_ = next(session.source().updates(0, 1))
    # The first time memory is asked for and kernels are looked for, or compiled; so the second
    # counts. The optimizer's step is made too, for its memory; its weights go with this process.
    trainer.update(0, micro_batches)
    trainer.catch_up()
    started = time.perf_counter()
    result = trainer.update(1, micro_batches)
    trainer.catch_up()
    seconds = time.perf_counter() - started

    optimization = prepared.config.optimization
    lines = [
        *prepared.plan(),
        f"tried: one micro-batch of {optimization.batch_size} rows and a step took "
        f"{seconds:.2g} s, {result.num_tokens / seconds:,.0f} tokens/s",
        f"tried: at most {memory_peak(prepared.device):.2g} GB of memory",
        finish_line(optimization.total_updates, seconds * optimization.update_freq),
        "dry run: nothing was trained, and no run was begun",
    ]
    for line in lines:
        _print(console, line)


def _print(console: Console, line: str) -> None:
    # As the tracker does, but into no log: on a terminal broken between words, else whole.
    console.print(line, markup=False, highlight=False, soft_wrap=not console.is_terminal)


def _where(config: PretrainingConfig) -> tuple[Path, bool, bool]:
    """Return what `RunDirectory`, and the look ahead at it, ask for: path, resume, overwrite."""
    return config.run.checkpoint_dir, _resumes_here(config), config.run.overwrite


@contextmanager
def _directory(config: PretrainingConfig, world: World) -> Iterator[RunDirectory | None]:
    """Open the run's directory on rank 0, before any other rank goes on.

    Entering can fail (the directory is taken, or locked), and then nobody may begin. So the others
    wait for a word of rank 0, which it can say only from inside: both lines `world.first` below are
    the two sides of one exchange.
    """
    if not world.is_first:
        world.first(lambda: None)
        yield None
        return
    with RunDirectory(*_where(config)) as directory:
        world.first(lambda: None)
        yield directory


def _resumes_here(config: PretrainingConfig) -> bool:
    """Tell whether the run in the directory is gone on with.

    A checkpoint that lies elsewhere begins a run of its own here, which must not take over another.

    >>> from annotated_mpnet.config import RunConfig
    >>> def resumes_here(**run):
    ...     run = RunConfig(checkpoint_dir=Path("runs/b"), **run)
    ...     return _resumes_here(PretrainingConfig(run=run))
    >>> resumes_here(), resumes_here(resume=True)
    (False, True)
    >>> resumes_here(resume_checkpoint=Path("runs/b/checkpoint500"))
    True
    >>> resumes_here(resume_checkpoint=Path("runs/a/checkpoint500"))
    False
    """
    run = config.run
    if run.resume_checkpoint is None or not run.resuming:
        return run.resuming
    return run.resume_checkpoint.resolve().parent == run.checkpoint_dir.resolve()
