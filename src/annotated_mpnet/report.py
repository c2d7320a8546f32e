"""The end of a run: `report.md`, a page to keep, and `loss.png`, its curves.

A run's directory answers any question about the run, to whoever reads files for an hour. The report
answers the first ones: what was run, how good has it become, against what, how fast was it, what of
the text was not used, what is there to go on with. Its numbers are read from `metrics.jsonl`, which
a resumed run goes on with; so it is a report of the whole run, however often that was interrupted.

**The table of losses** sets the numbers beside each other that say something only together:

    guessing by frequency       what needs no network at all
    training, first and last    means over the updates since the line before; with dropout, and on
                                text that may have been seen before
    validation, first and last  without dropout, with the same masks each time
    validation, best            the best of several, and so a little too good
    test, the best model        measured once, on text that nothing was chosen by: the number to
                                tell others

A gain over guessing is hard to imagine in bits. In words: each bit halves what is left to choose
from, so that 2 bits make a choice among 8000 tokens one among 2000.

>>> 8000 / 2**2
2000.0

**Speed** is the median over the lines of metrics: the mean would be pulled down by the minute in
which a backup ran, which nobody wants to know about. Of memory, the most is what counts.

The picture (`loss_picture.py`) needs an extra; without it the page says how to get it. And neither
of them may harm a run that is done: what goes wrong here is a warning.

(HF: the Trainer writes a model card with hyperparameters and final metrics, on request.)

Next: `demo/show.py`, for what the loss means in words that the network fills in.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from annotated_mpnet.config import PretrainingConfig, fields_of
from annotated_mpnet.loss_picture import Records, draw
from annotated_mpnet.training.checkpoint import BEST, TrainState
from annotated_mpnet.training.display import duration
from annotated_mpnet.training.plateau import MARGIN_BITS, left_at
from annotated_mpnet.training.retention import is_checkpoint_name
from annotated_mpnet.training.run_directory import METRICS
from annotated_mpnet.training.sinks import read_metrics, without_password

REPORT, PICTURE = "report.md", "loss.png"


@dataclass(frozen=True)
class ReportFacts:
    """What a report says that no line of metrics does.

    Attributes:
        config: all settings.
        state: behind the last update.
        plan: the lines that were said before the first update.
        text_read: what of the text was read and what was not used, in lines.
        seconds: how long this start of the run took, on the clock on the wall.
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
    """Write page and picture into a run's directory.

    Args:
        directory: of the run; its `metrics.jsonl` is read.
        facts: whatever else is to be said.
        warn: is told what went wrong; nothing is raised for it.

    Returns:
        The files that were written.
    """
    written = []
    # What belongs to the disk is caught here, for picture and page alike: after days of training a
    # full disk must not be the last word, and the numbers are in `metrics.jsonl`.
    try:
        records = read_metrics(directory / METRICS)
        no_picture = draw(
            directory / PICTURE, records, facts.plateau_bits, _left_plateau_at(facts, records)
        )
        if no_picture is None:
            written.append(directory / PICTURE)
        lines = _page(directory, facts, records, no_picture)
        text = "\n".join(lines) + "\n"
        (directory / REPORT).write_text(text, encoding="utf-8", errors="backslashreplace")
        written.append(directory / REPORT)
    except OSError as error:
        warn(f"no {REPORT}, which tells the run in one page: {error}")
    return written


def _page(
    directory: Path, facts: ReportFacts, records: Records, no_picture: str | None
) -> Iterator[str]:
    """Yield the lines of the page.

    Markdown, because it reads well as it is, and is shown with its picture wherever code is kept.
    Results first: whoever opens it wants to know how the run ended, and only then how it began.
    """
    state = facts.state
    yield f"# {directory.resolve().name}: what became of it"
    yield ""
    yield (
        f"{state.update:,} updates over {state.tokens_seen:,} tokens, of which "
        f"{state.predicted_seen:,} were predicted. The last start took {duration(facts.seconds)}."
    )
    yield from _section("Loss")
    yield no_picture or f"![training and validation loss, tokens per second]({PICTURE})"
    yield ""
    yield from _loss_table(facts, records)
    yield from _section("Speed and memory")
    yield from _speed_table(records)
    yield from _section("What was run")
    yield from (f"- {line}" for line in facts.plan)
    yield from ("", "Settings that are not the defaults (`config.toml` has all):", "")
    yield from (f"    {line}" for line in _settings(facts.config))
    yield from _section("What was read, and what was left out")
    yield from (f"- {line}" for line in facts.text_read or ["nothing is known about it"])
    yield from _section("What there is now")
    yield from _remains(directory, facts)


def _section(title: str) -> Iterator[str]:
    yield from ("", f"## {title}", "")


def _loss_table(facts: ReportFacts, records: Records) -> Iterator[str]:
    """Yield what is needed to judge the loss, worst first as a rule."""
    yield "| | update | bits per predicted token | accuracy |"
    yield "|---|---:|---:|---:|"
    if facts.plateau_bits is not None:
        yield f"| guessing by frequency (unigram plateau) | | {facts.plateau_bits:.3f} | |"
    for name, key in (("training", "train/bits"), ("validation", "valid/bits")):
        lines = [record for record in records if key in record]
        # Without validation text, and for a run of fewer updates than a line of metrics takes.
        if not lines:
            continue
        yield _loss_row(f"{name}, first", lines[0], key)
        yield _loss_row(f"{name}, last", lines[-1], key)
        if name == "validation":
            yield _loss_row("validation, best", min(lines, key=lambda line: line[key]), key)
    if facts.test_bits is not None:
        accuracy = "" if facts.test_accuracy is None else f"{facts.test_accuracy:.3f}"
        yield f"| test, the best model | | {facts.test_bits:.3f} | {accuracy} |"
    # From the state and not from the lines: the plateau is to be compared with the model that was
    # kept, and the state knows it even if `metrics.jsonl` could not be written.
    best = facts.state.best_valid_bits
    if best is not None and facts.plateau_bits is not None:
        gain = facts.plateau_bits - best
        yield ""
        yield (
            f"From the context come {gain:.2f} bits: it leaves {2**gain:.1f} times fewer tokens to "
            "choose from than their frequencies alone."
            if gain > 0
            else f"The context gives nothing yet: {-gain:.2f} bits above the plateau."
        )
    left = _left_plateau_at(facts, records)
    if left is not None:
        yield ""
        yield f"Training left the plateau at update {left:,}: it was {MARGIN_BITS:g} bit below it."


def _left_plateau_at(facts: ReportFacts, records: Records) -> int | None:
    bits = facts.train_plateau_bits
    return None if bits is None else left_at(records, bits)


def _loss_row(name: str, record: dict[str, float], key: str) -> str:
    """Return a row of the table.

    >>> _loss_row("validation, last", {"step": 1000, "valid/bits": 8.2202}, "valid/bits")
    '| validation, last | 1,000 | 8.220 |  |'
    """
    accuracy = f"{record['valid/accuracy']:.3f}" if "valid/accuracy" in record else ""
    return f"| {name} | {record['step']:,} | {record[key]:.3f} | {accuracy} |"


def _speed_table(records: Records) -> Iterator[str]:
    """Yield what a line of metrics said in the middle of all lines, and the most of the memory."""
    rows: list[tuple[str, str, Callable[[Sequence[float]], float], str]] = [
        ("tokens per second (median)", "perf/tokens_per_second", statistics.median, "{:,.0f}"),
        ("predicted per second", "perf/predicted_per_second", statistics.median, "{:,.0f}"),
        ("MFU, of the dense bfloat16 peak", "perf/mfu", statistics.median, "{:.1%}"),
        ("share of time waiting for text", "perf/data_wait", statistics.median, "{:.1%}"),
        ("memory, most", "memory/peak_gb", max, "{:.2f} GB"),
    ]
    yield "| | |"
    yield "|---|---:|"
    # A line is left out where nothing was measured: no MFU on a CPU.
    for name, key, summary, form in rows:
        values = [record[key] for record in records if key in record]
        if values:
            yield f"| {name} | {form.format(summary(values))} |"


def _settings(config: PretrainingConfig) -> Iterator[str]:
    """Yield the settings that differ from their defaults.

    >>> from annotated_mpnet.config import OptimizationConfig
    >>> list(_settings(PretrainingConfig(optimization=OptimizationConfig(lr=0.003))))
    ['lr = 0.003']
    """
    # The others are the same in every run, and a page of them hides the two that matter.
    for group, each in fields_of(config):
        value = vars(vars(config)[group])[each.name]
        if value != each.default:
            yield f"{each.name} = {without_password(str(value))}"


def _remains(directory: Path, facts: ReportFacts) -> Iterator[str]:
    """Yield the checkpoints and the export, and how to go on with them."""
    names = (path.name for path in directory.iterdir() if is_checkpoint_name(path.name))
    # By their length first, so that checkpoint500 comes before checkpoint1000.
    for name in sorted(names, key=lambda name: (len(name), name)):
        what = ": the lowest validation loss" if name == BEST else ""
        yield f"- `{name}/`{what}"
    yield f"- `{METRICS}`: all numbers; `log.txt`: what was said; `config.toml`: all settings"
    if facts.export is None:
        yield "- no Hugging Face model; `convert-to-hf` makes one of a checkpoint"
        return
    yield f"- `{facts.export}`: the Hugging Face model"
    yield from f'''
```python
from transformers import pipeline
fill = pipeline("fill-mask", "{facts.export}")
print(fill("It is a truth universally <mask>."))

from sentence_transformers import SentenceTransformer
model = SentenceTransformer("{facts.export}")  # an encoder, not yet trained to compare sentences
print(model.encode(["a sentence"]).shape)
```'''.split("\n")
