"""A hash of batches, for tests of what must never change."""

import hashlib

from annotated_mpnet.training.loader import BatchLoader


def hash_of_first_100(loader: BatchLoader) -> str:
    """Hash what the network reads and predicts in the first 100 batches."""
    digest = hashlib.sha256()
    for k in range(100):
        batch = loader.batch(k)
        for tensor in (batch.input_ids, batch.predicted_positions, batch.predicted_ids):
            digest.update(tensor.numpy().astype("<i8").tobytes())
    return digest.hexdigest()[:16]
