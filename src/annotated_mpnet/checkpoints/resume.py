"""Resuming: from which checkpoint, and whether it is still the same run.

*Which.* The newest checkpoint that is whole. If none is left, that is an error: a fresh start would
look like success, and would prune what could still be repaired.

    checkpoint300      another run's              skipped, with a warning
    checkpoint250      a bit has flipped          skipped, with a warning
    best_checkpoint    update 220, whole          the run resumes after update 220
    checkpoint200      whole                      not looked at

*Whether.* Batch k is a function of data, seed and k, and the checkpoint holds only k. So a resumed
run equals the uninterrupted one only if everything else that determines a batch is unchanged: the
checkpoint's *identity*. Nothing would crash without this check: with twice the batch size, update
1000 would start where update 2000 used to, and skip the text in between.

    must not change   text, seed, batch, length, masking, tokenizer    unless --allow-change says so
    not compared      learning rate, schedule, dropout, intervals
    an error          layers, widths, vocabulary, buckets, ...         it is another model
"""

import dataclasses
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from annotated_mpnet.checkpoints.checkpoint import Checkpoint, IdentityValue, load_checkpoint
from annotated_mpnet.checkpoints.manifest import read_manifest
from annotated_mpnet.checkpoints.retention import newest_first
from annotated_mpnet.errors import CheckpointError, ConfigError, shown
from annotated_mpnet.mpnet.config import ModelConfig


@dataclass(frozen=True)
class Resumable:
    """The newest valid checkpoint of a run, with a warning for each newer one that was skipped."""

    path: Path
    checkpoint: Checkpoint
    warnings: list[str]


def checkpoint_path(wanted: Path) -> Path:
    """Return the checkpoint that --resume-checkpoint means; annotated-mpnet's was a file NAME.pt.

    >>> checkpoint_path(Path("nowhere/checkpoint2500.pt"))
    PosixPath('nowhere/checkpoint2500')
    """
    return wanted if wanted.is_dir() else wanted.with_suffix("")


def newest_valid_checkpoint(directory: Path, run_id: str) -> Resumable | None:
    """Load the newest whole checkpoint of a run; None if there is no checkpoint at all.

    Raises:
        CheckpointError: there are checkpoints, but none of this run is whole.
    """
    problems: list[str] = []
    for path in newest_first(directory):
        try:
            owner = read_manifest(path).run_id
            if owner != run_id:
                raise CheckpointError(
                    f"{path} belongs to another run ({shown(owner)}, expected {shown(run_id)})"
                )
            checkpoint = load_checkpoint(path)
            return Resumable(path, checkpoint, [f"skipped: {problem}" for problem in problems])
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError(
            f"none of the {len(problems)} checkpoints in {directory} can be resumed; the newest: "
            f"{problems[0]}; repair it, or start again with --overwrite or another "
            "--checkpoint-dir"
        )
    return None


def compare_identity(
    saved: Mapping[str, IdentityValue],
    current: Mapping[str, IdentityValue],
    allowed: Sequence[str],
) -> list[str]:
    """Compare what must be the same on resume; return the differences that `allowed` permits.

    Raises:
        CheckpointError: names every other difference, with both values.
        ConfigError: `allowed` has a name that is never compared: a typo would allow nothing.
    """
    known = {*saved, *current}
    unknown = sorted(set(allowed) - known)
    if unknown:
        raise ConfigError(
            f"--allow-change is {shown(','.join(unknown))}; expected some of "
            f"{','.join(sorted(known))}"
        )
    differences = _differences(saved, current)
    refused = [name for name in differences if name not in allowed]
    if refused:
        raise CheckpointError(
            f"this run differs from the one to resume: "
            f"{'; '.join(differences[name] for name in refused)}. Restore the previous values, or "
            f"resume anyway with --allow-change {','.join(sorted({*refused, *allowed}))}"
        )
    return list(differences.values())


def compare_model_config(saved: ModelConfig, current: ModelConfig) -> list[str]:
    """Compare two models; return the differences in dropout, which may change on resume.

    Raises:
        CheckpointError: names every other difference, with both values.
    """
    differences = _differences(dataclasses.asdict(saved), dataclasses.asdict(current))
    fixed = [text for name, text in differences.items() if not name.endswith("dropout")]
    if fixed:
        raise CheckpointError(
            f"the checkpoint holds another model: {'; '.join(fixed)}. Restore the previous "
            "values, or train the new model in another --checkpoint-dir"
        )
    return list(differences.values())


def _differences(
    saved: Mapping[str, IdentityValue], current: Mapping[str, IdentityValue]
) -> dict[str, str]:
    return {
        name: f"{name} was {shown(saved.get(name))} and is {shown(current.get(name))}"
        + (" (--batch-size x --update-freq x processes)" if name == "batch" else "")
        for name in sorted({*saved, *current})
        if saved.get(name) != current.get(name)
    }


def changed_settings(path: Path, now: str, defaults: str) -> Iterator[str]:
    """Yield the changed settings that decide an update and may change.

    A setting without a line in the old file was unset, or did not exist yet; its default is then
    not a change.

    Args:
        path: the `config.toml` of the previous start.
        now: what the present one will be.
        defaults: the same with no setting given.

    Raises:
        ValueError: the file is damaged.
        OSError: it cannot be read.
    """
    new, default = tomllib.loads(now), tomllib.loads(defaults)
    try:
        old = tomllib.loads(path.read_text(encoding="utf-8"))
        tables = {group: dict(old[group]) for group in ("objective", "optimization")}
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"no tables of settings: {error!r}") from error
    for group, before in tables.items():
        for name in sorted(before.keys() | new[group].keys()):
            was, will_be = before.get(name), new[group].get(name)
            if was == will_be or (was is None and will_be == default[group].get(name)):
                continue
            is_start = name in ("head_bias", "relative_bias_init")
            effect = ": no effect, the weights are loaded" if is_start else ""
            yield f"{name} was {str(was)[:80]} and is {will_be}{effect}"
