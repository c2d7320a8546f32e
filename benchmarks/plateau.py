"""What attention looks at on the loss plateau, and what ends the plateau.

    python benchmarks/plateau.py [--updates 0 50 250] [--json FILE] [-- FLAGS OF pretrain-mpnet ...]

Trains the preset `demo` with two starts of the relative position bias: `normal`, N(0, 0.02) as in
the paper, and `local` (`mpnet/local_start.py`). After the given numbers of updates it prints, for
the same batch of validation text,

    percent    where each head looks: the mean attention weight on the distances -4 to 4 (key -
               query), over all layers and all tokens of masked sentences
    values     the norm of the gradient of each head's values, times 1,000: how fast it learns what
               to take from a position
    table      the same of its column of the bias table: how fast it learns where to look
    bits       the loss per predicted token

Uniform attention over 64 tokens puts 1.6 percent on each distance.
"""

import argparse
import math
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import datasets
import torch

from annotated_mpnet.mpnet.attention import RelativeMultiHeadAttention, attend_blocks
from annotated_mpnet.mpnet.batch import Batch
from annotated_mpnet.mpnet.config import RelativeBiasInit
from annotated_mpnet.runs.texts import read_text
from annotated_mpnet.settings.parsing import parse_pretrain
from annotated_mpnet.training.loader import evaluation_batches, prefetch
from common import machine, parse_with_run_flags, write_json
from data_parts import prepare
from learners import CPU, METRIC_SEED, Ours, collator_of

STARTS: tuple[RelativeBiasInit, ...] = ("normal", "local")
NEAR = 4
"""Distances shown on each side."""

CONVENTION = (
    "percent: mean attention weight by distance (key - query), over layers and tokens; gradients "
    "of the mean loss in nats, Euclidean norm for each head; bits per predicted token"
)


def main() -> None:
    arguments = parse()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder), arguments)
    print(machine(CPU))
    for row in results:
        print(f"\n{row['start']} start, update {row['update']}: {row['bits']:.2f} bits")
        distances = "".join(f"{distance:>+5}" for distance in range(-NEAR, NEAR + 1))
        print(f"  percent on{distances.replace('+0', ' 0')}    values    table")
        for head, (weights, values, table) in enumerate(
            zip(row["percent"], row["values_gradient"], row["table_gradient"], strict=True)
        ):
            cells = "".join(f"{weight:5.0f}" for weight in weights)
            print(f"  head {head}    {cells}   {1000 * values:7.2f}  {1000 * table:7.2f}")
    write_json("plateau", arguments, CPU, CONVENTION, results)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, nargs="+", default=[0, 50, 250])
    parser.add_argument("--json", type=Path)
    parser.set_defaults(preset="demo")
    return parse_with_run_flags(parser)


def measure(folder: Path, arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Train with each start, and inspect each run after the given numbers of updates."""
    novels, tokenizer = prepare(folder, None, None)
    flags = ["--preset", "demo", "--train-dir", str(novels), "--tokenizer-name", tokenizer]
    flags += ["--valid-file", str(novels.parent / "valid.txt"), "--test-file", "None"]
    config = parse_pretrain([*flags, *arguments.flags]).settings
    text = read_text(config.data, config.run.seed)
    assert text.valid is not None
    collator = collator_of(config.objective, config, text, METRIC_SEED)
    batch = next(evaluation_batches(text.valid, collator, config.optimization.batch_size))
    results = []
    for start in STARTS:
        learner = Ours(
            config, text, config.optimization.total_updates, config.objective.input_mode, start
        )
        batches = prefetch(learner.batches(), 2)
        for update in range(max(arguments.updates) + 1):
            if update in arguments.updates:
                results.append({"start": start, "update": update, **inspect(learner, batch)})
            learner.update(update, next(batches))
        batches.close()
    return results


def inspect(learner: Ours, batch: Batch) -> dict[str, object]:
    """Return the attention weights of a run's heads, their gradients, and the loss."""
    model = learner.model.eval()
    model.zero_grad(set_to_none=True)
    loss = model.loss_sum(batch, learner.config.objective.input_mode) / batch.num_predicted
    loss.backward()
    table = model.sentence_encoder.relative_attention_bias
    assert table is not None
    # From the stacked projections of all layers, the values' part for each head: (H, N).
    values = [each.in_proj_weight.grad.chunk(3)[2] for each in attentions(model)]
    values_HN = torch.cat(
        [each.unflatten(0, (table.embedding_dim, -1)).flatten(1) for each in values], 1
    )
    found = {
        "bits": loss.item() / math.log(2),
        "values_gradient": values_HN.norm(dim=1).tolist(),
        "table_gradient": table.weight.grad.norm(dim=0).tolist(),
        "percent": (100 * weights_by_distance(learner, batch)).tolist(),
    }
    model.zero_grad(set_to_none=True)
    return found


def attentions(model: torch.nn.Module) -> list[RelativeMultiHeadAttention]:
    """Return the attention module of each layer."""
    return [each for each in model.modules() if isinstance(each, RelativeMultiHeadAttention)]


@torch.no_grad()
def weights_by_distance(learner: Ours, batch: Batch) -> torch.Tensor:
    """Return each head's mean weight by distance: (H, 2 NEAR + 1).

    The mean leaves out queries near the ends of a sequence, which lack some of these neighbours.
    """
    found: list[torch.Tensor] = []
    model = learner.model.eval()
    layers = attentions(model)
    original = [layer.attend for layer in layers]
    for layer in layers:
        layer.attend = partial(attend_blocks, recording(found))
    model.encode(batch.input_ids, batch.attention_mask)
    for layer, attend in zip(layers, original, strict=True):
        layer.attend = attend
    return torch.stack(found).mean(dim=0)


def recording(found: list[torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return an attention function that records its mean weights by distance."""

    def attend(
        query_BHQK: torch.Tensor,
        key_BHMK: torch.Tensor,
        value_BHMK: torch.Tensor,
        bias: torch.Tensor | None,
        dropout: float,
    ) -> torch.Tensor:
        scores_BHQM = query_BHQK @ key_BHMK.transpose(2, 3) / math.sqrt(query_BHQK.shape[3])
        weights_BHQM = (scores_BHQM if bias is None else scores_BHQM + bias).softmax(dim=3)
        length = weights_BHQM.shape[3]
        middle = torch.arange(NEAR, length - NEAR)
        found.append(
            torch.stack(
                [
                    weights_BHQM[:, :, middle, middle + distance].mean(dim=(0, 2))
                    for distance in range(-NEAR, NEAR + 1)
                ],
                dim=1,
            )
        )
        return weights_BHQM @ value_BHMK

    return attend


if __name__ == "__main__":
    main()
