"""What a checkpoint keeps for its export besides the weights, in `export/`.

The model that a run started from may be gone when its export is made, and a checkpoint may be
converted on another machine. So each one has the facts for the model card and, of a sentence
encoder, the modules of sentence-transformers.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from annotated_mpnet.checkpoints.checkpoint import EXPORT_FILES, Checkpoint, TrainState
from annotated_mpnet.conversion.hugging_face import HUB_NAME
from annotated_mpnet.conversion.model_card import FACTS, CardFacts, place_name
from annotated_mpnet.conversion.sentence_modules import is_module_file
from annotated_mpnet.errors import CheckpointError, shown
from annotated_mpnet.files.records import reading, to_json


def base_facts(base: str) -> CardFacts:
    """Return the facts of a model that is converted, or that a run starts from."""
    on_hub = HUB_NAME.fullmatch(base) is not None and not os.path.lexists(base)
    return CardFacts(base=base if on_hub else place_name(base), base_on_hub=on_hub)


def to_export_files(facts: CardFacts, modules: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return what a checkpoint keeps for its export (`Checkpoint.export_files`)."""
    return {**modules, FACTS: to_json(facts).encode()}


def from_export_files(checkpoint: Checkpoint) -> tuple[dict[str, bytes], CardFacts]:
    """Return the modules of a checkpoint, and the facts for the model card.

    Raises:
        CheckpointError: they are not what this program writes.
    """
    files, state = dict(checkpoint.export_files), checkpoint.state
    with reading(Path(EXPORT_FILES, FACTS)):
        # Checkpoints of earlier versions have none.
        facts = msgspec.json.decode(files.pop(FACTS, b"{}"), type=CardFacts)
    if foreign := [name for name in files if not is_module_file(name)]:
        raise CheckpointError(
            f"the checkpoint's {EXPORT_FILES}/ holds {shown(foreign[0])}, which is no file of an "
            "export; it was not written by this program"
        )
    return files, with_progress(facts, state)


def with_progress(facts: CardFacts, state: TrainState) -> CardFacts:
    """Return the facts with how much a model was trained, and how."""
    identity = state.identity
    sequences = f"{identity.get('batch')} sequences of up to {identity.get('length')} tokens"
    return dataclasses.replace(
        facts,
        # Of a checkpoint without facts, its identity tells it in other words.
        objective=facts.objective or (str(identity["masking"]) if "masking" in identity else None),
        sequences=sequences if "batch" in identity else None,
        updates=state.update,
        tokens=state.tokens_seen,
        predicted=state.predicted_seen,
    )
