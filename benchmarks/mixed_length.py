"""Documents of mixed length: packed full rows, or a padded row for each document.

    python benchmarks/mixed_length.py [--shape base4|demo] [--lengths 128 512] [--batch 16]
            [--dropout 0.1] [--precision fp32|bf16] [--rounds 5] [--text PATH] [--json FILE]

What a network learns from are predicted tokens. Here it gets them out of the same documents in
several ways, in turn:

    packed      ours: rows filled across the ends of documents, 15 % of each predicted
    padded      a row for each document, padded to the batch's longest, P = 15 % of its *shortest*
                for all of them, so that all have the same shape; in the permuted form
                (`permuted_form.py`). annotated-mpnet does so
    64+         the same, but documents of less than 64 characters are left out, as its flag
                --min-text-length does with streams
    ..., ours   the same two, computed by our step, with an attention mask: what is lost by the rows
                alone
    own P       our step, and each row predicts 15 % of its own length

In a batch of sixteen there is nearly always a short document. Then fifteen others predict as little
as it does, and the computation of the rest is spent on what nobody asks about: of three documents
of 20, 200 and 500 tokens,

>>> from common import num_predicted
>>> lengths = [20, 200, 500]
>>> 3 * num_predicted(min(lengths)), sum(num_predicted(each) for each in lengths)
(9, 108)

tokens are predicted, 9 in a padded batch of 3 x 500 places.

Documents longer than a row are cut off at its end, where ours go on in the next row. (To read the
tokens that are cut off would need further rows, and is not counted against the padded ways.) All of
them have the memory that ours keeps (`fast/allocator.py`).

Convention: a step is forward, backward and AdamW; predicted tokens are those with a target; ratio:
predicted tokens/s of packed over the other's, in the same round, the median of all rounds.
"""

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
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
    "predicted tokens/s of packed over the other's, median over rounds; packed, own P and those "
    "that say ours are computed by our step, the others in the permuted form"
)

MIN_CHARACTERS = 64
"""Of a document: annotated-mpnet's and our default for --min-text-length."""

Collator = DataCollatorForMaskedPermutedLanguageModeling


@dataclass(frozen=True)
class Way:
    """How documents become steps.

    Attributes:
        packed: whether they share rows.
        as_the_shortest: whether all rows predict what the shortest may.
        min_characters: shorter documents are left out.
        permuted: the form that computes it.
    """

    packed: bool = False
    as_the_shortest: bool = False
    min_characters: int = 1
    permuted: bool = False


WAYS = {
    "packed": Way(packed=True),
    "padded": Way(as_the_shortest=True, permuted=True),
    "padded, ours": Way(as_the_shortest=True),
    "64+": Way(as_the_shortest=True, min_characters=MIN_CHARACTERS, permuted=True),
    "64+, ours": Way(as_the_shortest=True, min_characters=MIN_CHARACTERS),
    "own P": Way(),
}


@dataclass(frozen=True)
class Documents:
    """The tokens of a text's documents, and how many characters each has."""

    tokens: list[list[int]]
    characters: list[int]

    @classmethod
    def read(cls, text: Path, tokenizer: PreTrainedTokenizerFast) -> "Documents":
        """Return all documents in which there is something to predict."""
        texts = list(LocalFiles.find(text, "--text").documents(Counts()))
        is_special_V = vocabulary_of(tokenizer).is_special_V
        tokens = tokenizer(texts, add_special_tokens=False)["input_ids"]
        kept = [i for i, each in enumerate(tokens) if not is_special_V[each].all()]
        return cls([tokens[i] for i in kept], [len(texts[i]) for i in kept])

    def of_at_least(self, characters: int) -> list[list[int]]:
        """Return the tokens of those that are long enough."""
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
    print(f"{len(lengths):,} documents: median {middle} tokens, nine of ten have {low} to {high}")
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
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512], help="of a row")
    parser.add_argument("--rounds", type=int, default=5, help="batches of each way")
    parser.add_argument("--text", type=Path, help="a file or a directory; else the demo's novels")
    parser.add_argument("--tokenizer", help="a directory or a Hub name; else learned from the text")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def rows_of(way: Way, documents: Documents, collator: Collator) -> list[np.ndarray]:
    """Return the rows of a way: full ones, or one for each document, cut off at the end."""
    special_ids = collator.vocabulary.cls_id, collator.vocabulary.sep_id
    length = collator.max_tokens
    kept = documents.of_at_least(way.min_characters)
    if way.packed:
        windows = cut_sequences([Ragged.of(kept)], "full", length, *special_ids)
        return [row for window in windows for row in window if len(row) == length]
    return list(framed(Ragged.of([each[: length - 2] for each in kept]), *special_ids))


def batches_of(
    way: Way, documents: Documents, collator: Collator, batch_size: int
) -> Iterator[Batch]:
    """Yield batches of a way's rows in a random order, the same each time, without end."""
    rows = rows_of(way, documents, collator)
    places = cycle(np.random.default_rng(1).permutation(len(rows)).tolist())
    while True:
        batch = collator(
            [NumberedSequence(rows[i], 0, i) for i in (next(places) for _ in range(batch_size))]
        )
        yield as_the_shortest(batch) if way.as_the_shortest else batch


def as_the_shortest(batch: Batch) -> Batch:
    """Return a batch of which each row predicts 15 % of what the shortest row may, at least 1.

    The first of those that it would have predicted; what stands in place of the others stays, and
    is not asked for.
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
    """Train on batches of all ways in turn, print what each got done, and return it."""
    device = setting.device
    batches = {
        name: batches_of(way, documents, collator, setting.shape.batch)
        for name, way in WAYS.items()
    }
    model = our_model(setting)
    current = Current(model, PermutedForm(model))
    step = training_step(model, current.loss, setting)
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    seen: dict[str, list[Batch]] = {name: [] for name in WAYS}
    for number in range(rounds + 1):
        for name, way in WAYS.items():
            batch = next(batches[name])
            current.batch, current.permuted = batch.to(device), way.permuted
            took = timed(step, device)
            if number > 0:  # the first round is for warming up
                seconds[name].append(took)
                seen[name].append(batch)
    return table(collator.max_tokens, seconds, seen)


class Current:
    """The batch of the next step, and the form in which its loss is computed."""

    def __init__(self, model: MPNetForPretraining, form: PermutedForm) -> None:
        self.batch: Batch | None = None
        self.permuted = False
        self._model = model
        self._form = form

    def loss(self) -> torch.Tensor:
        """Return the mean loss of the batch."""
        assert self.batch is not None
        computes = self._form if self.permuted else self._model
        return computes.loss_sum(self.batch) / max(self.batch.num_predicted, 1)


def table(
    length: int, seconds: dict[str, list[float]], seen: dict[str, list[Batch]]
) -> dict[str, object]:
    """Print and return what each way got done in its rounds."""
    print(
        f"\n{f'rows of {length}':<14}{'s/step':>9}{'places':>9}{'filled':>8}{'predicted':>11}"
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
        places = sum(batch.input_ids.numel() for batch in batches)
        tokens = sum(batch.num_tokens for batch in batches)
        predicted = sum(batch.num_predicted for batch in batches)
        ratio = statistics.median(a / b for a, b in zip(first, speeds[name], strict=True))
        print(
            f"{name:<14}{total / rounds:>9.3f}{places / rounds:>9,.0f}{tokens / places:>8.1%}"
            f"{predicted / rounds:>11,.1f}{tokens / total:>10,.0f}{predicted / total:>13,.1f}"
            f"{ratio:>11.1f}x"
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
