"""The measurements of `data.py`: one function per table, each called in a new process."""

import json
import resource
import sys
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import datasets
import numpy as np
import torch
from rich.console import Console

from annotated_mpnet.demo.corpus import unpack
from annotated_mpnet.demo.show import VOCAB_SIZE
from annotated_mpnet.mpnet.collator import (
    DataCollatorForMaskedPermutedLanguageModeling,
    NumberedSequence,
    Vocabulary,
)
from annotated_mpnet.mpnet.config import (
    ArchitectureConfig,
    ObjectiveConfig,
    OptimizationConfig,
    Packing,
)
from annotated_mpnet.runs.run import run_pretraining
from annotated_mpnet.settings.config import DataConfig, PretrainingConfig, RunConfig, TrackingConfig
from annotated_mpnet.text.cutting import cut_sequences
from annotated_mpnet.text.learn_tokenizer import train_tokenizer
from annotated_mpnet.text.packing import PACKED_AT_ONCE, pack_sequences
from annotated_mpnet.text.sources import Counts, LocalFiles, find_text_files
from annotated_mpnet.text.tokenization import count_tokens, tokenise, windows_of, write_text
from annotated_mpnet.text.tokenizer import load_tokenizer, vocabulary_of
from annotated_mpnet.training.loader import BatchLoader
from common import SHAPES
from contestants import memory_now

CPU = torch.device("cpu")

PACKINGS: tuple[Packing, ...] = ("full", "none", "documents")

# Name -> the objective, and the documents per sequence.
OBJECTIVES = {
    "mpnet, whole words": (ObjectiveConfig(), 1),
    "mpnet, single tokens": (ObjectiveConfig(whole_word_mask=False), 1),
    "plm, whole words": (ObjectiveConfig(input_mode="plm"), 1),
    "mpnet, 8 documents": (ObjectiveConfig(), 8),
}

COLLATED_VOCABULARY = 30527
SPECIAL_IDS = (0, 1, 2, 3, COLLATED_VOCABULARY - 1)
CONTINUED_SHARE = 0.2
REPETITIONS = 5
"""The fastest one counts: the others were slowed down by other work on the machine."""


def prepare(folder: Path, text: Path | None, tokenizer: str | None) -> tuple[Path, str]:
    """Return text and tokenizer; where not given, make them in the folder."""
    if text is None:
        unpack(folder / "novels")
        text = folder / "novels" / "train"
    if tokenizer is None:
        train_tokenizer(find_text_files(text, "--text"), VOCAB_SIZE).save_pretrained(
            folder / "tokenizer"
        )
        tokenizer = str(folder / "tokenizer")
    return text, tokenizer


def write_one_line(text: Path, target: Path) -> Path:
    """Write a text's documents as a single one, on one line."""
    documents = LocalFiles.find(text, "--text").documents(Counts())
    target.write_text(" ".join(" ".join(documents).split("\n")) + "\n", encoding="utf-8")
    return target


def parts(text: Path, tokenizer_name: str, tokens: int, folder: Path) -> dict[str, float]:
    """Return the seconds of reading, tokenising and cutting, and the number of tokens."""
    datasets.disable_progress_bars()
    tokenizer = load_tokenizer(tokenizer_name)
    vocabulary = vocabulary_of(tokenizer)
    found: dict[str, float] = {}
    start = time.perf_counter()
    write_text(LocalFiles.find(text, "--text").documents(Counts()), folder / "text.arrow")
    found["reading"] = time.perf_counter() - start
    start = time.perf_counter()
    table, _ = tokenise(folder / "text.arrow", folder / "tokens.arrow", tokenizer, num_workers=1)
    found["tokenising"] = time.perf_counter() - start
    for packing in PACKINGS:
        start = time.perf_counter()
        windows = windows_of(table, PACKED_AT_ONCE)
        for _ in cut_sequences(windows, packing, tokens, vocabulary.cls_id, vocabulary.sep_id):
            pass
        found[f"cutting, {packing}"] = time.perf_counter() - start
    return found | {"tokens": count_tokens(table)}


def first_batch(
    text: Path, tokenizer_name: str, tokens: int, packing: Packing, workers: int
) -> dict[str, float]:
    """Return the time and memory that the first batch takes."""
    datasets.disable_progress_bars()
    start = time.perf_counter()
    tokenizer = load_tokenizer(tokenizer_name)
    source = LocalFiles.find(text, "--text")
    sequences = pack_sequences(source, tokenizer, tokens, packing=packing, num_workers=workers)
    collator = DataCollatorForMaskedPermutedLanguageModeling(
        vocabulary_of(tokenizer), ObjectiveConfig(), tokens, seed=1, packing=packing
    )
    BatchLoader(sequences, collator, batch_size=16, seed=1).batch(0)
    seconds = time.perf_counter() - start
    # Peak memory of this process, and of the largest tokenising process.
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    used = memory_now(CPU, "VmHWM"), children * (1 if sys.platform == "darwin" else 2**10) / 1e9
    report = sequences.report
    return {
        "seconds": seconds,
        "tokens": report.tokens,
        "fill": report.fill,
        "sequences": report.rows,
        "megabytes": max(used) * 1e3,
    }


def collate(name: str, tokens: int, batch_size: int, seconds: float) -> float:
    """Return the tokens per second of an objective, the best of several repetitions."""
    torch.set_num_threads(1)
    objective, documents = OBJECTIVES[name]
    vocabulary = random_vocabulary()
    collator = DataCollatorForMaskedPermutedLanguageModeling(
        vocabulary, objective, tokens, seed=1, packing="full" if documents == 1 else "documents"
    )
    sequences = random_sequences(vocabulary, tokens, batch_size, documents)
    best = 0.0
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        for epoch in count():
            collator([NumberedSequence(ids, epoch, index) for index, ids in enumerate(sequences)])
            elapsed = time.perf_counter() - start
            if elapsed >= seconds / REPETITIONS:
                break
        best = max(best, (epoch + 1) * batch_size * tokens / elapsed)
    return best


def random_vocabulary() -> Vocabulary:
    """Return a vocabulary of meaningless tokens that form words of English length."""
    is_special_V = np.isin(np.arange(COLLATED_VOCABULARY), SPECIAL_IDS)
    starts_word_V = np.random.default_rng(0).random(COLLATED_VOCABULARY) >= CONTINUED_SHARE
    return Vocabulary(
        size=COLLATED_VOCABULARY,
        pad_id=1,
        mask_id=COLLATED_VOCABULARY - 1,
        cls_id=0,
        sep_id=2,
        unk_id=3,
        is_special_V=is_special_V,
        starts_word_V=starts_word_V,
        ends_word_V=np.zeros(COLLATED_VOCABULARY, dtype=np.bool_),
        random_ids=np.flatnonzero(~is_special_V),
    )


def random_sequences(
    vocabulary: Vocabulary, tokens: int, batch_size: int, documents: int
) -> list[np.ndarray]:
    """Return full sequences of random tokens, with this many documents each."""
    generator = np.random.default_rng(1)
    ids = generator.choice(vocabulary.random_ids, size=(batch_size, tokens)).astype(np.int32)
    starts = np.linspace(0, tokens, documents, endpoint=False, dtype=int)
    ids[:, starts], ids[:, starts - 1] = vocabulary.cls_id, vocabulary.sep_id
    return list(ids)


def wait(
    text: Path, tokenizer_name: str, shape_name: str, updates: int, folder: Path
) -> dict[str, float]:
    """Return the share of time that the loop of a short run waits for batches.

    The vocabulary is the tokenizer's, not the shape's. A smaller one makes updates shorter, and so
    the share larger.
    """
    datasets.disable_progress_bars()
    directory = folder / f"run-{shape_name}"
    config = waiting_config(text, tokenizer_name, shape_name, updates, directory)
    run_pretraining(config, Console(quiet=True))
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    shape = SHAPES[shape_name]
    return waiting_of([json.loads(line) for line in lines], shape.batch * shape.length)


def waiting_config(
    text: Path, tokenizer_name: str, shape_name: str, updates: int, directory: Path
) -> PretrainingConfig:
    """Configure a short run that logs four times and saves only at the end."""
    shape = SHAPES[shape_name]
    dropout = 0.0 if shape_name == "demo" else 0.1
    return PretrainingConfig(
        model=ArchitectureConfig(
            encoder_layers=shape.layers,
            encoder_embed_dim=shape.width,
            encoder_ffn_dim=shape.ffn,
            encoder_attention_heads=shape.heads,
            dropout=dropout,
            attention_dropout=dropout,
            activation_dropout=0.0,
        ),
        data=DataConfig(train_dir=text, tokenizer_name=tokenizer_name, max_tokens=shape.length),
        optimization=OptimizationConfig(
            batch_size=shape.batch, update_freq=1, total_updates=updates
        ),
        run=RunConfig(checkpoint_dir=directory, save_optimizer_state=False, export_hf=False),
        tracking=TrackingConfig(logging_steps=max(1, updates // 4)),
    )


def waiting_of(lines: Sequence[dict[str, float]], update_tokens: int) -> dict[str, float]:
    """Return the share for the first line of metrics, and the mean of the others by time.

    Of two later lines, one at half the speed of the other, the slow one counts twice:

    >>> def line(step, speed, wait):
    ...     return {"step": step, "perf/tokens_per_second": speed, "perf/data_wait": wait}
    >>> lines = [line(10, 100.0, 0.5), line(20, 100.0, 0.04), line(30, 50.0, 0.01)]
    >>> found = waiting_of(lines, update_tokens=100)
    >>> found["first_quarter"], round(found["then"], 3), found["seconds_per_update"]
    (0.5, 0.02, 1.5)

    Args:
        lines: of `metrics.jsonl`; those of evaluations are ignored.
        update_tokens: tokens per update.

    Returns:
        The two shares, and the seconds per update after the first line.
    """
    lines = [line for line in lines if "perf/data_wait" in line]
    updates = np.diff([0, *(line["step"] for line in lines)])
    speeds = np.array([line["perf/tokens_per_second"] for line in lines])
    waits = np.array([line["perf/data_wait"] for line in lines])
    seconds = updates * update_tokens / speeds
    return {
        "first_quarter": float(waits[0]),
        "then": float((waits * seconds)[1:].sum() / seconds[1:].sum()),
        "seconds_per_update": float(seconds[1:].sum() / updates[1:].sum()),
    }
