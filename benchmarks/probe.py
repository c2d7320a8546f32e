"""What do a network's representations know? The same questions for any model that loads here.

    python benchmarks/probe.py MODEL [MODEL ...] [--stsb DIR] [--seeds 1 2 3] [--lr 5e-5]
            [--examples 2000] [--masked FILE] [--json FILE]

MODEL is a checkpoint, a run's directory, an export, a Hugging Face MPNet, a sentence-transformers
directory or a .pt file. A text is its mean hidden state, its modules (Dense, Normalize) aside. On
the CPU, without a network connection. The tasks:

    sts       STS-B, test split: Spearman's correlation of the cosine with people's scores
    tuned     the same after fine-tuning with sentence-transformers, for all models in the same way:
              MultipleNegativesRankingLoss, 4 epochs of the pairs of the training split with a score
              of 4 or more, batches of 32, 10 % warm-up, no dropout; a value for each seed
    novel     which of six novels is this paragraph from, names replaced by X? Accuracy of a linear
              classifier on frozen vectors; a value for each of five folds of chapters
    order     are these two adjacent sentences in their order, or swapped? In the same way
    masked    accuracy and bits per predicted token where words are masked as in plain MLM, of
              Northanger Abbey or of a text of your own; not of a model without an LM head

Guessing gets 0.17 of `novel` and 0.50 of `order`. The table's last line has no network: weighted
counts of words (TF-IDF). ± is half a 95 % interval of the mean, by Student's t over the values;
folds share training text, so there it is a guide, not a test. Bits can be compared between models
with the same tokenizer only. A model trained with `plm` has never read a mask.

STS-B is not part of the project; DIR holds the files en-train.csv and en-test.csv of
https://github.com/PhilipMay/stsb-multi-mt (licence CC BY-SA 4.0). `--examples` limits the number of
examples of each task, for a first look; `--seeds` without a number leaves out `tuned`.

The learning rate of `tuned` is one for base's size; small networks want more: the preset demo's got
0.36 with 5e-5, 0.43 with 2e-4 and 0.48 with 1e-3 (one seed).

What does continued pretraining do to a sentence encoder?

    pretrain-mpnet --preset continue --hf-model-path all-mpnet-base-v2 --train-dir my_text
        --max-tokens 128 --batch-size 8 --update-freq 1 --total-updates 200
    python benchmarks/probe.py all-mpnet-base-v2 checkpoints/continue/hf --stsb DIR
"""

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Before a library of Hugging Face is imported, which reads it once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import numpy as np
from scipy import stats
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import RidgeClassifier, RidgeClassifierCV
from sklearn.model_selection import StratifiedGroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from annotated_mpnet.conversion import load_any
from annotated_mpnet.demo.corpus import VALID
from annotated_mpnet.errors import CheckpointError, UserError
from annotated_mpnet.streams.eval_samples import Samples
from annotated_mpnet.text.sources import LocalFiles
from annotated_mpnet.text.tokenizer import load_tokenizer
from common import machine, write_json
from learners import CPU, judge
from probe_encoder import (
    Masked,
    build_encoder,
    fine_tune,
    similarity,
    spearman,
    vectors_of,
)
from probe_tasks import (
    Examples,
    Similarity,
    alike,
    novel_examples,
    order_examples,
    read_novel,
    read_similarity,
)

FOLDS = 5
ALPHAS = np.logspace(-1, 5, 13)
"""Strengths of the classifier's penalty, of which it takes the best on its training folds."""

TASKS = ("sts", "tuned", "novel", "order", "masked", "bits")
CONVENTION = (
    "sts, tuned: Spearman on the test split of STS-B, tuned one value for each seed; novel, order: "
    "accuracy, one value for each fold of chapters; masked, bits: accuracy and bits per predicted "
    "token, whole words masked; intervals: 95 %, Student's t"
)

WORDS = "counts of words"

Scores = dict[str, list[float]]
"""Task -> its values: one, or one for each seed or fold. A task that was not asked is missing."""


class Tasks(NamedTuple):
    """Everything that models are asked, read once.

    Attributes:
        pairs: test split of STS-B, or None.
        training: pairs to fine-tune on.
        examples: of `novel` and `order`.
        text: documents in which words are masked.
    """

    pairs: Similarity | None
    training: tuple[list[str], list[str]]
    examples: dict[str, Examples]
    text: LocalFiles | Samples


def main() -> None:
    arguments = parse()
    datasets.disable_progress_bars()
    try:
        tasks = read_tasks(arguments.stsb, arguments.examples, arguments.masked)
        # Of all, before the first takes its time: a mistyped path is found at once.
        for model in arguments.models:
            load_any(model)
        print(machine(CPU))
        print(f"{'':<28}" + "".join(f"{task:>12}" for task in TASKS))
        results: list[dict[str, Any]] = []
        for name in [*arguments.models, None]:
            scores = (
                probe_words(tasks)
                if name is None
                else probe(name, tasks, arguments.seeds, arguments.lr)
            )
            results.append({"model": name or WORDS, **summary(scores)})
            print(line(name or WORDS, scores), flush=True)
    except UserError as error:
        print(f"probe.py: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    write_json("probe", arguments, CPU, CONVENTION, results)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="MODEL")
    add_flags(parser)
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3], help="of `tuned`")
    parser.add_argument("--lr", type=float, default=5e-5, help="of `tuned`")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    check_flags(parser, arguments)
    return arguments


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `objectives.py` has as well."""
    parser.add_argument("--stsb", type=Path, metavar="DIR", help="default: without STS-B")
    parser.add_argument("--examples", type=int, default=2000, help="of a task, at most")
    parser.add_argument("--masked", type=Path, help="text to mask; default: Northanger Abbey")


def check_flags(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if arguments.examples < 100:
        parser.error(f"--examples is {arguments.examples}; expected at least 100")


def read_tasks(stsb: Path | None, limit: int, masked: Path | None) -> Tasks:
    """Read what models are asked.

    Raises:
        ConfigError, DataError: files that are missing or hold something else.
    """
    pairs, training = None, ([], [])
    if stsb is not None:
        pairs = read_similarity(stsb, "test", limit)
        training = alike(read_similarity(stsb, "train", sys.maxsize), limit)
    text = (
        # A paragraph is a document, as in the demo.
        Samples(tuple(read_novel(VALID)[:limit]))
        if masked is None
        else LocalFiles.find(masked, "--masked")
    )
    examples = {"novel": novel_examples(limit), "order": order_examples(limit)}
    return Tasks(pairs, training, examples, text)


def probe(model: str, tasks: Tasks, seeds: Sequence[int], lr: float) -> Scores:
    """Ask a model everything.

    Raises:
        CheckpointError: it cannot be loaded, or comes without a tokenizer.
    """
    loaded = load_any(model)
    if loaded.tokenizer is None:
        raise CheckpointError(f"{model!r} comes without a tokenizer; export it with one first")
    tokenizer = load_tokenizer(loaded.tokenizer)
    found: Scores = {}
    encoder = build_encoder(loaded, tokenizer)
    if tasks.pairs is not None:
        found["sts"] = [similarity(encoder, tasks.pairs)]
        for seed in seeds:
            tuned = build_encoder(loaded, tokenizer)
            fine_tune(tuned, tasks.training, seed, lr)
            found.setdefault("tuned", []).append(similarity(tuned, tasks.pairs))
    for task, examples in tasks.examples.items():
        classifier = make_pipeline(StandardScaler(), RidgeClassifierCV(ALPHAS))
        found[task] = accuracies(classifier, vectors_of(encoder, examples.texts), examples)
    if not loaded.fresh_head:
        bits, accuracy = judge(Masked(loaded, tokenizer, tasks.text), "words")
        found |= {"masked": [accuracy], "bits": [bits]}
    return found


def probe_words(tasks: Tasks) -> Scores:
    """Ask what counting words can answer."""
    found: Scores = {}
    if tasks.pairs is not None:
        first, second = tasks.pairs.first, tasks.pairs.second
        # Its vectors have length one.
        words = TfidfVectorizer().fit([*first, *second])
        product = words.transform(first).multiply(words.transform(second)).sum(axis=1)
        found["sts"] = [spearman(np.asarray(product).ravel(), tasks.pairs)]
    for task, examples in tasks.examples.items():
        classifier = make_pipeline(TfidfVectorizer(), RidgeClassifier())
        found[task] = accuracies(classifier, examples.texts, examples)
    return found


def accuracies(classifier: Any, inputs: Any, examples: Examples) -> list[float]:
    """Return the accuracy on each fold of chapters, by a classifier trained on the others."""
    folds = StratifiedGroupKFold(FOLDS)
    scores = cross_val_score(
        classifier, inputs, examples.labels, groups=examples.chapters, cv=folds
    )
    return [float(score) for score in scores]


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean, and half of its 95 % interval; None if there is a single value.

    >>> mean, half = interval([0.1, 0.2, 0.3])
    >>> f"{mean:.3f} {half:.3f}", interval([0.5])
    ('0.200 0.248', (0.5, None))
    """
    if len(values) < 2:
        return values[0], None
    error = statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), float(stats.t.ppf(0.975, len(values) - 1)) * error


def summary(scores: Scores) -> dict[str, Any]:
    """Return scores for JSON."""
    return {
        task: {"mean": mean, "interval": half, "values": values}
        for task, values in scores.items()
        for mean, half in [interval(values)]
    }


def line(name: str, scores: Scores) -> str:
    """Return a line of the table; a long path shows its end."""
    cells = ""
    for task in TASKS:
        mean, half = interval(scores[task]) if task in scores else (None, None)
        cell = "-" if mean is None else f"{mean:.3f}"
        cells += f"{cell:>7}{'' if half is None else f' ±{half:.2f}':5}"
    return f"{name if len(name) <= 28 else '...' + name[-25:]:<28}{cells}".rstrip()


if __name__ == "__main__":
    main()
