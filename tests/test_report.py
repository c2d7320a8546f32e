"""The report covers the whole run, and cannot harm a finished one."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from annotated_mpnet.checkpoints.checkpoint import TrainState
from annotated_mpnet.mpnet.config import OptimizationConfig
from annotated_mpnet.settings.config import PretrainingConfig
from annotated_mpnet.tracking.guesses import Guess, lines_of
from annotated_mpnet.tracking.report import ReportFacts, write_report
from annotated_mpnet.tracking.sinks import drop_metrics_after, read_metrics

FACTS = ReportFacts(
    config=PretrainingConfig(optimization=OptimizationConfig(lr=0.003)),
    state=TrainState(
        update=40, tokens_seen=81920, predicted_seen=11520, best_valid_bits=8.2, identity={}
    ),
    plan=["device: cpu (asked for), float32", "update: 32 sequences"],
    text_read=["100 documents in 2 files; 3 blank lines skipped"],
    seconds=725.0,
    plateau_bits=9.2,
    test_bits=8.3,
    test_accuracy=0.171,
    export=Path("checkpoints/run/hf"),
)
LINES = [
    {"step": 20, "train/bits": 9.1, "perf/tokens_per_second": 1000.0, "perf/mfu": 0.4},
    {"step": 20, "valid/bits": 8.2, "valid/accuracy": 0.12},
    {"step": 30, "train/bits": 8.6, "perf/tokens_per_second": 3000.0, "memory/peak_gb": 1.25},
    {"step": 40, "train/bits": 8.1, "perf/tokens_per_second": 2000.0, "memory/peak_gb": 1.5},
    {"step": 40, "valid/bits": 8.4, "valid/accuracy": 0.11},
]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    run = tmp_path / "my_run"
    for name in ("checkpoint5", "checkpoint40", "best_checkpoint", "hf"):
        (run / name).mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return run


def report_of(directory: Path, facts: ReportFacts = FACTS) -> tuple[list[str], list[str]]:
    """Return the lines of the page, and the warnings."""
    warnings: list[str] = []
    write_report(directory, facts, warnings.append)
    return (directory / "report.md").read_text().splitlines(), warnings


def test_report_and_picture_are_written_and_named(directory: Path) -> None:
    written = write_report(directory, FACTS, pytest.fail)
    assert written == [directory / "loss.png", directory / "report.md"]
    assert (directory / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_names_the_run_and_marks_the_best_point(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import matplotlib.figure

    drawn: list[matplotlib.figure.Figure] = []
    save = matplotlib.figure.Figure.savefig

    def keep(figure: matplotlib.figure.Figure, *arguments: Any, **named: Any) -> None:
        drawn.append(figure)
        save(figure, *arguments, **named)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    # Matplotlib would read this as an incomplete formula.
    run = directory.rename(directory.with_name("my_$run"))
    write_report(run, FACTS, pytest.fail)
    axes = drawn[0].axes[0]
    assert axes.get_title() == "my_$run"
    assert "best: 8.20 bits, update 20" in axes.get_legend_handles_labels()[1]


def test_the_report_shows_the_guesses_of_each_evaluation(directory: Path) -> None:
    assert "## Masked words" not in report_of(directory)[0]
    guesses = [
        Guess("a | b", word, "is", 0.002, [("the", 0.5), (",", 0.1)]) for word in ("sea", "sky")
    ]
    lines = "".join(lines_of(step, guesses) for step in range(10, 410, 10))
    (directory / "guesses.jsonl").write_text(lines)
    page = report_of(directory)[0]
    start = page.index("## Masked words")
    assert page[start + 4] == "| update | ... a \\| b **sea** is ... | ... a \\| b **sky** is ... |"
    answer = 'the 50%, "," 10%; {} 0.2%'
    assert page[start + 6] == f"| 10 | {answer.format('sea')} | {answer.format('sky')} |"
    rows = [line for line in page[start:] if answer.format("sea") in line]
    assert len(rows) == 12
    assert rows[-1].startswith("| 400 |")


def test_the_same_metrics_give_the_same_picture(directory: Path) -> None:
    report_of(directory)
    first = (directory / "loss.png").read_bytes()
    report_of(directory)
    assert (directory / "loss.png").read_bytes() == first


def test_numbers_come_from_the_metrics(directory: Path) -> None:
    lines, _ = report_of(directory)
    for line in (
        "# my_run: training report",
        "![training and validation loss, tokens per second](loss.png)",
        "| guessing by frequency (unigram plateau) | | 9.200 | |",
        "| training, last | 40 | 8.100 |  |",
        "| validation, last | 40 | 8.400 | 0.110 |",
        "| validation, best | 20 | 8.200 | 0.120 |",
        "| test, the best model | | 8.300 | 0.171 |",
        "| tokens per second (median) | 2,000 |",
        "| MFU, of the dense bfloat16 peak | 40.0% |",
        "| most memory | 1.50 GB |",
    ):
        assert line in lines


def test_report_lists_settings_text_and_checkpoints(directory: Path) -> None:
    lines, _ = report_of(directory)
    page = "\n".join(lines)
    assert "40 updates over 81,920 tokens, of which 11,520 were predicted" in page
    assert "- device: cpu (asked for), float32" in lines
    assert "    lr = 0.003" in lines
    assert "- 100 documents in 2 files; 3 blank lines skipped" in lines
    checkpoints = [line for line in lines if "checkpoint" in line and "/`" in line]
    assert checkpoints == [
        "- `checkpoint5/`",
        "- `checkpoint40/`",
        "- `best_checkpoint/`: the lowest validation loss",
    ]
    assert 'SentenceTransformer("checkpoints/run/hf")' in page


def test_gain_over_the_plateau_is_put_into_words(directory: Path) -> None:
    page = "\n".join(report_of(directory)[0])
    assert "The context is worth 1.00 bits: it leaves 2.0 times fewer tokens" in page
    poor = dataclasses.replace(FACTS, plateau_bits=8.0)
    page = "\n".join(report_of(directory, poor)[0])
    assert "The context is worth nothing yet: 0.20 bits above the plateau." in page


def test_report_says_when_training_left_the_plateau(directory: Path) -> None:
    left = "Training left the plateau at update {}: it was 1 bit below it."
    for plateau, update in ((9.2, 40), (9.7, 30)):
        facts = dataclasses.replace(FACTS, train_plateau_bits=plateau)
        assert left.format(update) in report_of(directory, facts)[0]
    for plateau in (None, 8.0, 10.2):  # unknown; never left; below it from the start
        facts = dataclasses.replace(FACTS, train_plateau_bits=plateau)
        assert "left the plateau" not in "\n".join(report_of(directory, facts)[0])


def test_settings_in_the_report_hold_no_password(directory: Path) -> None:
    config = dataclasses.replace(
        FACTS.config,
        run=dataclasses.replace(FACTS.config.run, hf_model_path="https://me:hunter2@example.org/m"),
    )
    lines, _ = report_of(directory, dataclasses.replace(FACTS, config=config))
    assert "    hf_model_path = https://example.org/m" in lines


@pytest.mark.parametrize(
    "metrics", ["", '{"step": 20, "train/bi', '{"step": 5, "valid/bits": null}']
)
def test_a_run_with_hardly_any_metrics_has_a_report(directory: Path, metrics: str) -> None:
    (directory / "metrics.jsonl").write_text(metrics)
    facts = dataclasses.replace(
        FACTS, plateau_bits=None, test_bits=None, test_accuracy=None, export=None, text_read=[]
    )
    lines, warnings = report_of(directory, facts)
    assert not warnings
    assert not [line for line in lines if line.startswith("| validation")]
    assert "- no Hugging Face model; `convert-to-hf` makes one from a checkpoint" in lines


def test_without_matplotlib_the_page_says_how_to_get_the_picture(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert write_report(directory, FACTS, pytest.fail) == [directory / "report.md"]
    assert "pip install 'annotated-mpnet[plot]'" in (directory / "report.md").read_text()
    assert not (directory / "loss.png").exists()


def test_a_picture_that_cannot_be_drawn_costs_only_the_picture(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import matplotlib.figure

    def fail(*arguments: object, **named: object) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", fail)
    lines, warnings = report_of(directory)
    assert "(No picture: no font)" in lines
    assert "| validation, last | 40 | 8.400 | 0.110 |" in lines
    assert warnings == ["could not draw loss.png: no font"]


@pytest.mark.parametrize("name", ["report.md", "loss.png", "metrics.jsonl"])
def test_a_file_that_cannot_be_written_or_read_is_a_warning(directory: Path, name: str) -> None:
    (directory / name).unlink(missing_ok=True)
    (directory / name).mkdir()
    warnings: list[str] = []
    written = write_report(directory, FACTS, warnings.append)
    (warning,) = warnings
    assert warning.startswith("could not ")
    assert name in warning
    # Without the picture the page is still written.
    assert (directory / "report.md" in written) == (name == "loss.png")


@pytest.mark.parametrize(
    "line",
    [
        *('{"step": 1e999}', '{"step": 8, "train/bits": 1e999}', '{"step": 8, "valid/bits": NaN}'),
        *("[" * 100_000, '{"step": 8, "train/bits": ' + "9" * 400 + "}", '{"step": null}', "7"),
        *('{"step": 8, "valid/bits": {}}', '{"step": 8, "perf/mfu": [1]}', '{"step": "8"', "\xff"),
        *('{"step": -1e3}', '{"step": true}', '{"step": 8, "memory/peak_gb": "x"}'),
    ],
)
def test_a_strange_line_of_metrics_costs_at_most_the_report(directory: Path, line: str) -> None:
    with (directory / "metrics.jsonl").open("ab") as file:
        file.write(line.encode("latin-1") + b"\n")
    warnings: list[str] = []
    write_report(directory, FACTS, warnings.append)
    assert (directory / "report.md").exists() or warnings
    drop_metrics_after(4, directory / "metrics.jsonl")
    assert all(record["step"] <= 4 for record in read_metrics(directory / "metrics.jsonl"))
