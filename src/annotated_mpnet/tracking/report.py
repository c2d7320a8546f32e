"""The end of a run: `report.md`, one page about the whole run, and `loss.png`, its curves.

The numbers come from `metrics.jsonl`, which a resumed run continues; so they cover the whole run,
however often it was interrupted. The table of losses shows together what has to be compared:

    guessing by frequency       needs no network at all
    training, first and last    means over some updates; with dropout, on text that may have been
                                seen before
    validation, first and last  without dropout, with the same masks each time
    validation, best            the best of several, and so a little too good
    test, the best model        measured once, on text that nothing was chosen by: the number to
                                report

How to read the curves:

    far above the plateau        nothing is learned yet, not even frequencies
    flat, on the plateau         frequencies, but no context: small runs get stuck here
    below it, both falling       the network uses the context
    training falls while         it memorises its text: more text, more dropout, or stop; the
    validation rises             best checkpoint is the one at the lowest point
    a sudden rise of both        the learning rate is too high, unless they come back

Nothing here can harm a finished run: what goes wrong is a warning.
"""

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from annotated_mpnet.checkpoints.checkpoint import BEST, TrainState
from annotated_mpnet.checkpoints.retention import is_checkpoint_name
from annotated_mpnet.checkpoints.run_directory import GUESSES, METRICS
from annotated_mpnet.errors import without_password
from annotated_mpnet.files.atomic import write_file
from annotated_mpnet.settings.config import PretrainingConfig, non_defaults
from annotated_mpnet.tracking.display import duration
from annotated_mpnet.tracking.guesses import guess_table, read_guesses
from annotated_mpnet.tracking.plateau import MARGIN_BITS, left_at
from annotated_mpnet.tracking.sinks import read_metrics, setting_text

REPORT, PICTURE = "report.md", "loss.png"

Records = Sequence[dict[str, float]]
"""Lines of metrics, each with its update under `step`."""

SPEED: dict[str, tuple[str, Callable[[Sequence[float]], float], str]] = {
    # The median, because a mean is pulled down by the minute in which a backup ran.
    "perf/tokens_per_second": ("tokens per second (median)", statistics.median, "{:,.0f}"),
    "perf/predicted_per_second": ("predicted per second", statistics.median, "{:,.0f}"),
    "perf/mfu": ("MFU, of the dense bfloat16 peak", statistics.median, "{:.1%}"),
    "perf/data_wait": ("share of time waiting for text", statistics.median, "{:.1%}"),
    "memory/peak_gb": ("most memory", max, "{:.2f} GB"),
}


@dataclass(frozen=True)
class ReportFacts:
    """What a report says besides the metrics.

    Attributes:
        config: of the run.
        state: after the last update.
        plan: the lines of the plan.
        text_read: what of the text was read and what was skipped, in lines.
        seconds: how long the last start of the run took.
        plateau_bits: the unigram plateau of the validation text, if it is known.
        train_plateau_bits: that of the training text.
        test_bits: the best model's loss on the test text, if there is one.
        test_accuracy: its accuracy there.
        export: the Hugging Face model, if there is one.
    """

    config: PretrainingConfig
    state: TrainState
    plan: Sequence[str]
    text_read: Sequence[str]
    seconds: float
    plateau_bits: float | None = None
    train_plateau_bits: float | None = None
    test_bits: float | None = None
    test_accuracy: float | None = None
    export: Path | None = None


def write_report(directory: Path, facts: ReportFacts, warn: Callable[[str], None]) -> list[Path]:
    """Write page and picture into a run's directory; return the files that were written.

    Args:
        directory: of the run, with its `metrics.jsonl`.
        facts: everything else.
        warn: is told what went wrong; nothing is raised.
    """
    written = []
    try:
        records = read_metrics(directory / METRICS)
        train_bits = facts.train_plateau_bits
        left = None if train_bits is None else left_at(records, train_bits)
        picture = f"![training and validation loss, tokens per second]({PICTURE})"
        try:
            _draw(directory, records, facts.plateau_bits, left)
            written.append(directory / PICTURE)
        except ImportError:
            picture = "(No picture: `pip install 'annotated-mpnet[plot]'` installs matplotlib.)"
        # The disk, a font, a version of numpy: whatever is wrong, the page has the numbers.
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            picture = f"(No picture: {reason})"
            warn(f"could not draw {PICTURE}: {reason}")
        page = _page(directory, facts, records, left, picture)
        write_file(directory / REPORT, page.encode(errors="backslashreplace"))
        written.append(directory / REPORT)
    # Whatever was read from `metrics.jsonl`, the run is finished.
    except Exception as error:
        warn(f"could not write {REPORT}: {' '.join(str(error).split())[:200]}")
    return written


def _page(
    directory: Path, facts: ReportFacts, records: Records, left: int | None, picture: str
) -> str:
    """Return the page, results first."""
    state = facts.state
    return f"""\
# {directory.resolve().name}: training report

{state.update:,} updates over {state.tokens_seen:,} tokens, of which {state.predicted_seen:,} were \
predicted. The last start took {duration(facts.seconds)}.

## Loss

{picture}

| | update | bits per predicted token | accuracy |
|---|---:|---:|---:|
{_lines(_losses(facts, records))}

{_lines(_meaning(facts, left))}
{_lines(_guesses(directory))}
## Speed and memory

| | |
|---|---:|
{_lines(_speed(records))}

## Run

{_lines(f"- {line}" for line in facts.plan)}

Settings that differ from the defaults (`config.toml` has all):

{_lines(_settings(facts.config))}

## Text

{_lines(f"- {line}" for line in facts.text_read or ["not known"])}

## Files

{_lines(_checkpoints(directory))}
- `{METRICS}`: all numbers; `{GUESSES}`: all guesses; `log.txt`: all messages; `config.toml`: \
all settings
{_export(facts.export)}
"""


def _lines(lines: Iterable[str]) -> str:
    return "\n".join(lines)


def _losses(facts: ReportFacts, records: Records) -> Iterator[str]:
    if facts.plateau_bits is not None:
        yield f"| guessing by frequency (unigram plateau) | | {facts.plateau_bits:.3f} | |"
    train = [record for record in records if "train/bits" in record]
    valid = [record for record in records if "valid/bits" in record]
    for name, found in (
        ("training, first", train[:1]),
        ("training, last", train[-1:]),
        ("validation, first", valid[:1]),
        ("validation, last", valid[-1:]),
        ("validation, best", sorted(valid, key=lambda each: each["valid/bits"])[:1]),
    ):
        for record in found:
            bits = record["train/bits" if name.startswith("training") else "valid/bits"]
            accuracy = f"{record['valid/accuracy']:.3f}" if "valid/accuracy" in record else ""
            yield f"| {name} | {record['step']:,} | {bits:.3f} | {accuracy} |"
    if facts.test_bits is not None:
        accuracy = "" if facts.test_accuracy is None else f"{facts.test_accuracy:.3f}"
        yield f"| test, the best model | | {facts.test_bits:.3f} | {accuracy} |"


def _meaning(facts: ReportFacts, left: int | None) -> Iterator[str]:
    plateau, best = facts.plateau_bits, facts.state.best_valid_bits
    gain = 0.0 if plateau is None or best is None else plateau - best
    if gain > 0:
        yield (
            f"The context is worth {gain:.2f} bits: it leaves {2**gain:.1f} times fewer tokens to "
            "choose from than their frequencies alone."
        )
    elif gain < 0:
        yield f"The context is worth nothing yet: {-gain:.2f} bits above the plateau."
    if left is not None:
        yield f"Training left the plateau at update {left:,}: it was {MARGIN_BITS:g} bit below it."


def _guesses(directory: Path) -> Iterator[str]:
    path = directory / GUESSES
    table = list(guess_table(read_guesses(path))) if path.exists() else []
    if table:
        yield "\n## Masked words\n"
        yield "Words of the validation text and the model's guesses after each evaluation.\n"
        yield from table
        yield ""


def _speed(records: Records) -> Iterator[str]:
    for key, (name, summary, form) in SPEED.items():
        if values := [record[key] for record in records if key in record]:
            yield f"| {name} | {form.format(summary(values))} |"


def _settings(config: PretrainingConfig) -> Iterator[str]:
    for _, each, value in non_defaults(config):
        yield f"    {each.name} = {without_password(setting_text(value))}"


def _checkpoints(directory: Path) -> Iterator[str]:
    names = [path.name for path in directory.iterdir() if is_checkpoint_name(path.name)]
    # By length first: checkpoint500 before checkpoint1000.
    for name in sorted(names, key=lambda name: (len(name), name)):
        yield f"- `{name}/`{': the lowest validation loss' if name == BEST else ''}"


def _export(export: Path | None) -> str:
    if export is None:
        return "- no Hugging Face model; `convert-to-hf` makes one from a checkpoint"
    return f'''- `{export}`: the Hugging Face model

```python
from transformers import pipeline
fill = pipeline("fill-mask", "{export}")
print(fill("It is a truth universally <mask>."))

from sentence_transformers import SentenceTransformer
model = SentenceTransformer("{export}")  # fine-tune it on pairs of sentences first
print(model.encode(["a sentence"]).shape)
```'''


def _draw(directory: Path, records: Records, plateau_bits: float | None, left: int | None) -> None:
    """Draw the picture. It has no date in it: the same metrics give the same file."""
    # Not pyplot, which looks for a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def curve(key: str) -> tuple[list[float], list[float]]:
        found = [record for record in records if key in record]
        return [record["step"] for record in found], [record[key] for record in found]

    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    loss, speed = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    loss.plot(*curve("train/bits"), label="training", linewidth=0.8)
    updates, bits = curve("valid/bits")
    loss.plot(updates, bits, label="validation", marker="o", markersize=3)
    if bits:
        best = bits.index(min(bits))
        label = f"best: {bits[best]:.2f} bits, update {updates[best]:,}"
        loss.plot(updates[best], bits[best], "*", color="tab:red", markersize=12, label=label)
    # A name may have a $ in it, which is not the beginning of a formula.
    loss.set_title(directory.resolve().name, parse_math=False)
    if plateau_bits is not None:
        loss.axhline(plateau_bits, linestyle="--", color="gray", label="plateau (validation)")
    if left is not None:
        label = f"left the plateau, update {left:,}"
        loss.axvline(left, linestyle=":", color="tab:green", label=label)
    loss.set_ylabel("bits per predicted token")
    loss.legend()
    speed.plot(*curve("perf/tokens_per_second"), linewidth=0.8)
    # From zero: half the speed should look like half.
    speed.set_ylim(bottom=0)
    speed.set_ylabel("tokens per second")
    speed.yaxis.set_major_formatter("{x:,.0f}")
    speed.set_xlabel("updates")
    for axes in (loss, speed):
        axes.grid(alpha=0.3)
    figure.savefig(directory / PICTURE, dpi=120, metadata={"Software": None})
