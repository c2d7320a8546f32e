"""MPNet pretraining, from your own text to a verified Hugging Face model: exact, fast, readable.

    from annotated_mpnet import load_model
    hidden_BLD = load_model("checkpoints/mine").encode(input_ids, attention_mask)

The public names are imported on first use: `pretrain-mpnet --help` should not wait for PyTorch.
"""

import importlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from annotated_mpnet.conversion import export_to_hugging_face
    from annotated_mpnet.mpnet.batch import Batch
    from annotated_mpnet.mpnet.collator import (
        DataCollatorForMaskedPermutedLanguageModeling,
        NumberedSequence,
    )
    from annotated_mpnet.mpnet.config import ModelConfig, ObjectiveConfig
    from annotated_mpnet.mpnet.pretraining import MPNetForPretraining
    from annotated_mpnet.text.tokenizer import load_tokenizer, vocabulary_of

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "DataCollatorForMaskedPermutedLanguageModeling",
    "MPNetForPretraining",
    "ModelConfig",
    "NumberedSequence",
    "ObjectiveConfig",
    "export_to_hugging_face",
    "load_model",
    "load_tokenizer",
    "vocabulary_of",
]

_HOME = {
    "Batch": "mpnet.batch",
    "DataCollatorForMaskedPermutedLanguageModeling": "mpnet.collator",
    "MPNetForPretraining": "mpnet.pretraining",
    "ModelConfig": "mpnet.config",
    "NumberedSequence": "mpnet.collator",
    "ObjectiveConfig": "mpnet.config",
    "export_to_hugging_face": "conversion",
    "load_tokenizer": "text.tokenizer",
    "vocabulary_of": "text.tokenizer",
}


def load_model(path: str | Path) -> "MPNetForPretraining":
    """Return a trained model, on the CPU and in eval mode.

    Args:
        path: a checkpoint, a run's directory (its best checkpoint, else its newest), a Hugging Face
            MPNet (directory or Hub name), or a `.pt` file of fairseq or annotated-mpnet.

    Raises:
        CheckpointError: it is none of these, or damaged.
    """
    from annotated_mpnet.conversion import load_any
    from annotated_mpnet.mpnet.pretraining import MPNetForPretraining

    loaded = load_any(str(path))
    for note in loaded.notes:
        logging.getLogger(__name__).warning(note)
    model = MPNetForPretraining(loaded.config)
    model.load_state_dict(loaded.tensors)
    return model.eval()


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
