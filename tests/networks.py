"""Networks in which every number matters, and checkpoints of them."""

from collections.abc import Callable
from pathlib import Path

import torch

from annotated_mpnet.checkpoints.checkpoint import Checkpoint, TrainState, save_checkpoint
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining


def scrambled(model: MPNetForPretraining, seed: int = 0) -> MPNetForPretraining:
    """Make all weights random, also the biases and norms that would begin as zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Relative biases are added to scores, so large ones show in the logits.
            scale = 1.0 if "relative" in name else 0.2
            parameter.normal_(0.0, scale, generator=generator)
    return model


def save_network(
    run: Path,
    update: int,
    name: str,
    model: MPNetForPretraining,
    save_tokenizer: Callable[[Path], object],
) -> Path:
    """Save a checkpoint of a network alone, as if it were from an update of a run."""
    run.mkdir(exist_ok=True, parents=True)
    state = TrainState(
        update=update, tokens_seen=0, predicted_seen=0, best_valid_bits=None, identity={}
    )
    checkpoint = Checkpoint(
        run_id="a run",
        state=state,
        model_config=model.config,
        model_tensors=model.state_dict(),
        optimizer_tensors=None,
    )
    return save_checkpoint(run, name, checkpoint, save_tokenizer)
