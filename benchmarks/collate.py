"""How many tokens a second the collator masks on one core.

    python benchmarks/collate.py [--tokens 512] [--batch-size 32] [--seconds 2] [--json FILE]

Rows of random words over a vocabulary of 30,527 pieces, of which a fifth continue a word: about the
share of running English in BERT's vocabulary. What the tokens mean makes no difference to masking,
how they form words does. Each measurement repeats whole batches for a while and the best of five is
reported: the others measure what else the machine was doing.

annotated-mpnet, whose whole-word masking is written in Cython, reaches 1.7 million tokens a second.
"""

import argparse
import json
import os
import time
from itertools import count
from pathlib import Path

# Before NumPy and PyTorch are loaded: one core means one thread.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch

from annotated_mpnet.config import ObjectiveConfig
from annotated_mpnet.data import DataCollatorForMaskedPermutedLanguageModeling, Row, Vocabulary

VOCAB_SIZE = 30527
SPECIAL_IDS = [0, 1, 2, 3, VOCAB_SIZE - 1]
CONTINUED_SHARE = 0.2
REPETITIONS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a row")
    parser.add_argument("--batch-size", type=int, default=32, help="rows of a batch")
    parser.add_argument("--seconds", type=float, default=2.0, help="time of one repetition")
    parser.add_argument("--json", type=Path, help="write the numbers to this file too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    results = {
        name: measure(
            objective, arguments.tokens, arguments.batch_size, arguments.seconds, documents
        )
        for name, objective, documents in (
            ("mpnet, whole words", ObjectiveConfig(), 1),
            ("mpnet, single tokens", ObjectiveConfig(whole_word_mask=False), 1),
            ("plm, whole words", ObjectiveConfig(input_mode="plm"), 1),
            ("mpnet, 8 documents", ObjectiveConfig(), 8),
        )
    }
    print(f"{'objective':<24}{'million tokens/s':>18}{'µs per row':>12}")
    for name, speed in results.items():
        print(f"{name:<24}{speed / 1e6:>18.2f}{arguments.tokens / speed * 1e6:>12.1f}")
    if arguments.json:
        settings = {"tokens": arguments.tokens, "batch_size": arguments.batch_size}
        report = {**settings, "tokens_per_second": results}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def measure(
    objective: ObjectiveConfig, tokens: int, batch_size: int, seconds: float, documents: int
) -> float:
    """Return the most tokens per second of several repetitions."""
    vocabulary = random_vocabulary()
    collator = DataCollatorForMaskedPermutedLanguageModeling(
        vocabulary, objective, tokens, seed=1, packing="full" if documents == 1 else "documents"
    )
    rows = random_rows(vocabulary, tokens, batch_size, documents)
    best = 0.0
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        for epoch in count():
            collator([Row(row, epoch, index) for index, row in enumerate(rows)])
            elapsed = time.perf_counter() - start
            if elapsed >= seconds / REPETITIONS:
                break
        best = max(best, (epoch + 1) * batch_size * tokens / elapsed)
    return best


def random_vocabulary() -> Vocabulary:
    is_special_V = np.isin(np.arange(VOCAB_SIZE), SPECIAL_IDS)
    return Vocabulary(
        size=VOCAB_SIZE,
        pad_id=1,
        mask_id=VOCAB_SIZE - 1,
        cls_id=0,
        sep_id=2,
        unk_id=3,
        is_special_V=is_special_V,
        starts_word_V=np.random.default_rng(0).random(VOCAB_SIZE) >= CONTINUED_SHARE,
        random_ids=np.flatnonzero(~is_special_V),
    )


def random_rows(
    vocabulary: Vocabulary, tokens: int, batch_size: int, documents: int
) -> list[np.ndarray]:
    generator = np.random.default_rng(1)
    ids = generator.choice(vocabulary.random_ids, size=(batch_size, tokens)).astype(np.int32)
    starts = np.linspace(0, tokens, documents, endpoint=False, dtype=int)
    ids[:, starts], ids[:, starts - 1] = vocabulary.cls_id, vocabulary.sep_id
    return list(ids)


if __name__ == "__main__":
    main()
