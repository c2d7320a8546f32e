"""Documents of mixed length: packed into full sequences, or one padded sequence per document.

    python benchmarks/mixed_length.py [--shape base4|demo] [--lengths 128 512] [--batch 16]
            [--dropout 0.1] [--precision fp32|bf16] [--rounds 5] [--text PATH] [--json FILE]

A network learns from its predicted tokens. This script compares how many of them per second each
strategy gets from the same documents:

    packed      ours: each sequence is filled with consecutive documents, 15 % of it predicted
    padded      one sequence per document, padded to the longest of the batch. P must be equal in
                a batch, so all predict 15 % of the *shortest*. In the permuted form
                (`permuted_form.py`). This is what annotated-mpnet does
    64+         the same without documents of fewer than 64 characters, like its --min-text-length
                for streams
    ..., ours   the same two with our step and an attention mask, to show what padding alone costs
    own P       our step; each sequence predicts 15 % of its own length

Nearly every batch of sixteen contains a short document, and then the others predict as few tokens
as it does. Three documents of 20, 200 and 500 tokens predict 9 tokens in a padded batch of 3 x 500,
instead of 108:

>>> from common import num_predicted
>>> lengths = [20, 200, 500]
>>> 3 * num_predicted(min(lengths)), sum(num_predicted(each) for each in lengths)
(9, 108)

Padding truncates documents that are longer than a sequence; packing continues them in the next one.
(The truncated tokens do not count against padding.) All strategies use our allocator setting
(`fast/allocator.py`).

Convention: a step is forward, backward and AdamW; predicted tokens are those with a target; a ratio
is predicted tokens/s of packed over the other's in the same round, and the median over rounds.
"""

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from annotated_mpnet.fast.allocator import keep_memory
from annotated_mpnet.mpnet.batch import Batch
from annotated_mpnet.mpnet.collator import (
    DataCollatorForMaskedPermutedLanguageModeling,
    NumberedSequence,
)
from annotated_mpnet.mpnet.config import ObjectiveConfig
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining
from annotated_mpnet.text.cutting import Ragged, cut_sequences, framed
from annotated_mpnet.text.sources import Counts, LocalFiles
from annotated_mpnet.text.tokenizer import load_tokenizer, vocabulary_of
from common import machine, write_json
from contestants import Setting, add_flags, our_model, timed, training_step
from data_parts import prepare
from permuted_form import PermutedForm

CONVENTION = (
    "a step is forward, backward and AdamW; predicted tokens are those with a target; ratio: "
    "predicted tokens/s of packed over the other's, median over rounds; packed, own P and the two "
    "marked ours are computed by our step, the others in the permuted form"
)

MIN_CHARACTERS = 64
"""The default of --min-text-length, annotated-mpnet's and ours."""

Collator = DataCollatorForMaskedPermutedLanguageModeling


@dataclass(frozen=True)
class Strategy:
    """How documents become batches.

    Attributes:
        packed: documents share sequences.
        equal_predictions: all sequences predict as many tokens as the shortest.
        min_characters: leave out shorter documents.
        permuted: train in the permuted form.
    """

    packed: bool = False
    equal_predictions: bool = False
    min_characters: int = 1
    permuted: bool = False


STRATEGIES = {
    "packed": Strategy(packed=True),
    "padded": Strategy(equal_predictions=True, permuted=True),
    "padded, ours": Strategy(equal_predictions=True),
    "64+": Strategy(equal_predictions=True, min_characters=MIN_CHARACTERS, permuted=True),
    "64+, ours": Strategy(equal_predictions=True, min_characters=MIN_CHARACTERS),
    "own P": Strategy(),
}


@dataclass(frozen=True)
class Documents:
    """The tokens of a text's documents, and the number of characters of each."""

    tokens: list[list[int]]
    characters: list[int]

    @classmethod
    def read(cls, text: Path, tokenizer: PreTrainedTokenizerFast) -> "Documents":
        """Return all documents that have tokens to predict."""
        texts = list(LocalFiles.find(text, "--text").documents(Counts()))
        is_special_V = vocabulary_of(tokenizer).is_special_V
        tokens = tokenizer(texts, add_special_tokens=False)["input_ids"]
        kept = [i for i, each in enumerate(tokens) if not is_special_V[each].all()]
        return cls([tokens[i] for i in kept], [len(texts[i]) for i in kept])

    def of_at_least(self, characters: int) -> list[list[int]]:
        """Return the tokens of documents that are long enough."""
        both = zip(self.tokens, self.characters, strict=True)
        return [tokens for tokens, length in both if length >= characters]


def main() -> None:
    arguments = parse()
    setting = Setting.of(arguments)
    if setting.device.type == "cpu":
        keep_memory()
    with tempfile.TemporaryDirectory() as folder:
        text, name = prepare(Path(folder), arguments.text, arguments.tokenizer)
        tokenizer = load_tokenizer(name)
        documents = Documents.read(text, tokenizer)
    lengths = [len(each) for each in documents.tokens]
    low, middle, high = np.quantile(lengths, (0.05, 0.5, 0.95)).astype(int)
    print(f"{len(lengths):,} documents: median {middle} tokens, nine in ten have {low} to {high}")
    print(f"{arguments.precision}, dropout {setting.dropout}")
    print(machine(setting.device))
    results = {}
    for length in arguments.lengths:
        arguments.length = length
        collator = Collator(vocabulary_of(tokenizer), ObjectiveConfig(), length, seed=1)
        results[str(length)] = compare(Setting.of(arguments), documents, collator, arguments.rounds)
    write_json("mixed_length", arguments, setting.device, CONVENTION, results)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser)
    parser.set_defaults(batch=16)
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[128, 512], help="tokens per sequence"
    )
    parser.add_argument("--rounds", type=int, default=5, help="batches of each strategy")
    parser.add_argument("--text", type=Path, help="a file or directory; default: the demo's novels")
    parser.add_argument("--tokenizer", help="a directory or Hub name; default: train one")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def sequences_of(strategy: Strategy, documents: Documents, collator: Collator) -> list[np.ndarray]:
    """Return full sequences, or one for each document, truncated if too long."""
    special_ids = collator.vocabulary.cls_id, collator.vocabulary.sep_id
    length = collator.max_tokens
    kept = documents.of_at_least(strategy.min_characters)
    if strategy.packed:
        windows = cut_sequences([Ragged.of(kept)], "full", length, *special_ids)
        return [each for window in windows for each in window if len(each) == length]
    return list(framed(Ragged.of([each[: length - 2] for each in kept]), *special_ids))


def batches_of(
    strategy: Strategy, documents: Documents, collator: Collator, batch_size: int
) -> Iterator[Batch]:
    """Yield batches in a fixed random order, without end."""
    sequences = sequences_of(strategy, documents, collator)
    order = cycle(np.random.default_rng(1).permutation(len(sequences)).tolist())
    while True:
        batch = collator([NumberedSequence(sequences[i], 0, i) for i in islice(order, batch_size)])
        yield with_equal_predictions(batch) if strategy.equal_predictions else batch


def with_equal_predictions(batch: Batch) -> Batch:
    """Return the batch with as many predictions per sequence as its shortest sequence has.

    Each sequence keeps its first predictions. The other masked tokens stay masked but are not
    predicted.
    """
    shortest = int((batch.predicted_ids >= 0).sum(dim=1).min())
    ids_BP = batch.predicted_ids[:, :shortest]
    return Batch(
        batch.input_ids,
        batch.predicted_positions[:, :shortest],
        ids_BP,
        batch.attention_mask,
        batch.num_tokens,
        ids_BP.numel(),
    )


def compare(
    setting: Setting, documents: Documents, collator: Collator, rounds: int
) -> dict[str, object]:
    """Train on batches of all strategies in turn; print and return their speeds."""
    device = setting.device
    batches = {
        name: batches_of(strategy, documents, collator, setting.shape.batch)
        for name, strategy in STRATEGIES.items()
    }
    model = our_model(setting)
    current = Current(model, PermutedForm(model))
    step = training_step(model, current.loss, setting)
    seconds: dict[str, list[float]] = {name: [] for name in STRATEGIES}
    seen: dict[str, list[Batch]] = {name: [] for name in STRATEGIES}
    for number in range(rounds + 1):
        for name, strategy in STRATEGIES.items():
            batch = next(batches[name])
            current.batch, current.permuted = batch.to(device), strategy.permuted
            took = timed(step, device)
            if number > 0:  # the first round is warm-up
                seconds[name].append(took)
                seen[name].append(batch)
    return table(collator.max_tokens, seconds, seen)


class Current:
    """The next step's batch, and the form that computes its loss."""

    def __init__(self, model: MPNetForPretraining, form: PermutedForm) -> None:
        self.batch: Batch | None = None
        self.permuted = False
        self._model = model
        self._permuted_form = form

    def loss(self) -> torch.Tensor:
        """Return the mean loss of the batch."""
        assert self.batch is not None
        form = self._permuted_form if self.permuted else self._model
        return form.loss_sum(self.batch) / max(self.batch.num_predicted, 1)


def table(
    length: int, seconds: dict[str, list[float]], seen: dict[str, list[Batch]]
) -> dict[str, object]:
    """Print and return the speed of each strategy."""
    print(
        f"\n{f'{length} tokens':<14}{'s/step':>9}{'positions':>11}{'filled':>8}{'predicted':>11}"
        f"{'tokens/s':>10}{'predicted/s':>13}{'packed is':>12}"
    )
    speeds = {
        name: [batch.num_predicted / took for batch, took in zip(seen[name], times, strict=True)]
        for name, times in seconds.items()
    }
    first = next(iter(speeds.values()))
    results: dict[str, object] = {}
    for name, batches in seen.items():
        total, rounds = sum(seconds[name]), len(batches)
        positions = sum(batch.input_ids.numel() for batch in batches)
        tokens = sum(batch.num_tokens for batch in batches)
        predicted = sum(batch.num_predicted for batch in batches)
        ratio = statistics.median(a / b for a, b in zip(first, speeds[name], strict=True))
        print(
            f"{name:<14}{total / rounds:>9.3f}{positions / rounds:>11,.0f}"
            f"{tokens / positions:>8.1%}{predicted / rounds:>11,.1f}{tokens / total:>10,.0f}"
            f"{predicted / total:>13,.1f}{ratio:>11.1f}x"
        )
        results[name] = {
            "seconds": seconds[name],
            "predicted": [batch.num_predicted for batch in batches],
            "slots": [batch.predicted_ids.shape[1] for batch in batches],
            "tokens": [batch.num_tokens for batch in batches],
            "places": [batch.input_ids.numel() for batch in batches],
            "predicted_per_second": predicted / total,
            "tokens_per_second": tokens / total,
            "packed_is_faster_by": ratio,
        }
    return results


if __name__ == "__main__":
    main()
