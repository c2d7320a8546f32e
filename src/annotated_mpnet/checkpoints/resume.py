"""How a run goes on: from which checkpoint, and whether it is still the same run.

*Which.* The newest one that is whole. If that is damaged, the one before it, and a warning says so;
if none is left, an error. Never a fresh start in a directory that has checkpoints: it would look
like success, and prune what could still be repaired by hand.

    checkpoint300      another run's              skipped: warned
    checkpoint250      a bit has flipped          skipped: warned
    best_checkpoint    update 220, whole          the run goes on with update 220
    checkpoint200      whole                      is not looked at

What is lost by falling back is time. The updates 220..249 are done again, on the same batches with
the same masks and dropout, and end in the same weights; the damaged `checkpoint250` steps aside for
the one that replaces it.

*Whether.* Batch k is a function of data, seed and k, and the checkpoint holds only k (of a streamed
data set also where the stream stands). So a resumed run equals the uninterrupted one exactly as
long as everything else that decides a batch is what it was: text, seed, batch, length, masking,
tokenizer. The checkpoint carries these as its *identity*; a difference stops the run and is named
with both values. Whoever means it says so with `--allow-change`, and is told what changed.

Nothing would crash without it. With twice the batch size, update 1000 of a resumed run would begin
at the row of the text where update 2000 used to begin: as much text as the run has seen would be
skipped, and the loss would look like any other. With another vocabulary of the same size all shapes
fit, and every word is another one.

    may not change    text, seed, batch, length, masking, tokenizer    what an update sees
    is not compared   learning rate, schedule, dropout                 what it does with it
                      how often to save, log, evaluate                 who looks on
    is an error       layers, widths, vocabulary, buckets, ...         it would be another network

HF: the Trainer resumes on other data without a word. fairseq: takes the flags it is given.

Next: `mpnet/loop.py`, which calls this.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from annotated_mpnet.checkpoints.checkpoint import Checkpoint, IdentityValue, load_checkpoint
from annotated_mpnet.checkpoints.manifest import read_manifest
from annotated_mpnet.checkpoints.retention import newest_first
from annotated_mpnet.checkpoints.strict_json import short
from annotated_mpnet.errors import CheckpointError, ConfigError
from annotated_mpnet.mpnet.config import ModelConfig

EXPLANATIONS = {"batch": " (--batch-size x --update-freq x processes)"}
"""What is said behind a difference whose name is not enough to mend it."""


@dataclass(frozen=True)
class Resumable:
    """The newest valid checkpoint of a run, where it lies, and what was skipped to reach it.

    Attributes:
        path: its directory.
        checkpoint: what is in it, verified, on the CPU.
        warnings: a line for each newer one: which, and what is wrong with it.
    """

    path: Path
    checkpoint: Checkpoint
    warnings: list[str]


def newest_valid_checkpoint(directory: Path, run_id: str) -> Resumable | None:
    """Load the newest checkpoint of a run that is whole; None if there is no checkpoint at all.

    `best_checkpoint` is a checkpoint like any other and takes its place by its update.

    Args:
        directory: the run's; read only, so that the lock need not be held.
        run_id: whose checkpoints count.

    Raises:
        CheckpointError: there are checkpoints, and none of them is a valid one of this run.
    """
    warnings: list[str] = []
    for path in newest_first(directory):
        try:
            # Whose it is comes first: another run's gigabytes need not be hashed.
            owner = read_manifest(path).run_id
            if owner != run_id:
                raise CheckpointError(
                    f"{path} belongs to another run ({short(owner)}, expected {short(run_id)})"
                )
            return Resumable(path, load_checkpoint(path), warnings)
        except CheckpointError as error:
            warnings.append(f"skipped: {error}")
    # No checkpoint at all and none that is whole are two things: the first is a run that was
    # killed before it saved, and may be started anew.
    if warnings:
        raise CheckpointError(
            f"none of the {len(warnings)} checkpoints in {directory} can be resumed; the newest: "
            f"{warnings[0].removeprefix('skipped: ')}; repair it, or start anew with --overwrite "
            "or another --checkpoint-dir"
        )
    return None


def compare_identity(
    saved: Mapping[str, IdentityValue],
    current: Mapping[str, IdentityValue],
    allowed: Sequence[str],
) -> list[str]:
    """Compare what must be the same on resume; return the differences that `allowed` permits.

    A plain comparison of names and values: what belongs to the identity is decided where it is put
    together. All differences are named at once, with the flag that would allow them.

    >>> compare_identity({"seed": 1, "batch": 64}, {"seed": 2, "batch": 64}, allowed=["seed"])
    ['seed was 1 and is 2']

    Raises:
        CheckpointError: names every other difference, with both values.
        ConfigError: `allowed` names something that is never compared.
    """
    # A misspelt name would allow nothing, and say nothing either.
    unknown = sorted(set(allowed) - set(saved) - set(current))
    if unknown:
        raise ConfigError(
            f"--allow-change is {short(','.join(unknown))}; expected some of "
            f"{','.join(sorted(set(saved) | set(current)))}"
        )
    differences = _differences(saved, current)
    refused = [name for name in differences if name not in allowed]
    if refused:
        raise CheckpointError(
            f"this run differs from the one to resume: "
            f"{'; '.join(differences[name] for name in refused)}. Restore the former values, or "
            f"go on all the same with --allow-change {','.join(sorted({*refused, *allowed}))}"
        )
    return list(differences.values())


def compare_model_config(saved: ModelConfig, current: ModelConfig) -> list[str]:
    """Compare two networks; return the differences in dropout, which a resume may change.

    Dropout has no weights: a network with another one has the same tensors and can go on. Of all
    the other numbers, some would not load; but those without a tensor, such as the activation, the
    heads or the eps, would load and be another network.

    >>> compare_model_config(ModelConfig(), ModelConfig(dropout=0.0))
    ['dropout was 0.1 and is 0.0']

    Raises:
        CheckpointError: names every other difference, with both values: that is another network.
    """
    differences = _differences(dataclasses.asdict(saved), dataclasses.asdict(current))
    fixed = [text for name, text in differences.items() if not name.endswith("dropout")]
    if fixed:
        raise CheckpointError(
            f"the checkpoint holds another network: {'; '.join(fixed)}. Give the former values, "
            "or train the new network in another --checkpoint-dir"
        )
    return list(differences.values())


def _differences(
    saved: Mapping[str, IdentityValue], current: Mapping[str, IdentityValue]
) -> dict[str, str]:
    """Return name -> sentence for what differs; what one side lacks is None there.

    >>> _differences({"seed": 1, "batch": 64}, {"seed": 2, "batch": 64, "length": 512})
    {'length': 'length was None and is 512', 'seed': 'seed was 1 and is 2'}
    """
    return {
        name: f"{name} was {short(saved.get(name))} and is {short(current.get(name))}"
        + EXPLANATIONS.get(name, "")
        for name in sorted(set(saved) | set(current))
        if saved.get(name) != current.get(name)
    }
