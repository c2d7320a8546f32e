"""Run the demo, and show what the model has learned.

A loss by itself is hard to judge. So the demo compares it with the unigram plateau, which is what
guessing by frequency reaches on the same text, and shows words that the network guesses
(`masks.py`).

**Bits as choices.** A token that costs b bits is as hard to guess as one of 2^b equally likely
ones. At the plateau of Austen's novels, 9.2 bits, it is one of 600; at 6.2 bits, which a run of two
minutes reaches (`presets/demo.toml`), one of 75. Each bit below the plateau halves the choices:

>>> plateau, reached = 9.2, 6.2
>>> round(2**plateau, -2), round(2**reached), round(2 ** (plateau - reached))
(600.0, 74, 8)

    B batch   L tokens of a sentence   V vocabulary
"""

import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock
from rich.console import Console
from transformers import AutoModelForMaskedLM, AutoTokenizer

from annotated_mpnet.checkpoints.run_directory import refuse_taken_directory
from annotated_mpnet.conversion.proof import quiet_transformers
from annotated_mpnet.demo.corpus import DIRECTORY, TRAIN, unpack
from annotated_mpnet.demo.masks import find_gaps, guess, table_of
from annotated_mpnet.files.atomic import write_if_changed
from annotated_mpnet.files.output import write_errors
from annotated_mpnet.runs.initial_weights import build_model
from annotated_mpnet.runs.run import RunResult, run_pretraining
from annotated_mpnet.runs.texts import read_text
from annotated_mpnet.settings.config import PretrainingConfig
from annotated_mpnet.text.learn_tokenizer import train_tokenizer
from annotated_mpnet.text.tokenizer import write_tokenizer

VOCAB_SIZE = 8000
"""Of the demo's own tokenizer. MPNet's has 30,527 tokens, most of which never occur in four novels;
a table of that size would be 85 % of this network's weights."""


def run_demo(
    config: PretrainingConfig,
    console: Console | None = None,
    *,
    dry_run: bool = False,
    notes: Sequence[str] = (),
) -> RunResult | None:
    """Run the demo: text and tokenizer, pretraining, results.

    Args:
        config: of the preset `demo`, with the user's changes.
        console: standard output if not given.
        dry_run: write text and tokenizer, which the plan needs, but no run.
        notes: what to say before the plan.

    Returns:
        The run's result; None after a dry run.
    """
    console = console or Console()
    started = time.perf_counter()
    run = config.run
    # Before anything is written.
    refuse_taken_directory(run.checkpoint_dir, run.resuming or run.autoresume, run.overwrite)
    prepare(config, console)
    result = run_pretraining(config, console, dry_run=dry_run, notes=notes)
    if result is not None:
        show(config, result, console)
        console.print(f"The whole demo took {time.perf_counter() - started:.0f} seconds.")
    return result


def prepare(config: PretrainingConfig, console: Console) -> None:
    """Write the novels and the tokenizer where the preset expects them, unless the user named
    others.

    Both are the same bytes each time, so a second demo finds the packed text in the cache. Of
    several that start at once, one writes and the others wait.
    """
    own_text = config.data.train_dir == DIRECTORY / "train"
    own_tokenizer = config.data.tokenizer_name == str(DIRECTORY / "tokenizer")
    if own_text or own_tokenizer:
        with write_errors(DIRECTORY):
            DIRECTORY.mkdir(parents=True, exist_ok=True)
            with FileLock(DIRECTORY / ".lock"):
                _prepare(own_text, own_tokenizer, console)


def _prepare(own_text: bool, own_tokenizer: bool, console: Console) -> None:
    if own_text:
        unpack(DIRECTORY)
        say(console, f"six novels by Jane Austen: {DIRECTORY}")
    if own_tokenizer:
        # From the training text only: held-out text does not choose the vocabulary either.
        files = [DIRECTORY / "train" / f"{name}.txt" for name in TRAIN]
        tokenizer = train_tokenizer(files, VOCAB_SIZE)
        with TemporaryDirectory() as folder:
            write_tokenizer(tokenizer, Path(folder))
            (DIRECTORY / "tokenizer").mkdir(exist_ok=True)
            for file in sorted(Path(folder).iterdir()):
                write_if_changed(DIRECTORY / "tokenizer" / file.name, file.read_bytes())
        say(console, f"a tokenizer of {len(tokenizer):,} pieces, learned from them")


def show(config: PretrainingConfig, result: RunResult, console: Console) -> None:
    """Compare the result with the plateau, show guesses before and after, and say what to do next.

    Without a validation text there is no comparison, and without an export there are no guesses.
    """
    if result.plateau is not None and result.state.best_valid_bits is not None:
        gain = result.plateau.bits - result.state.best_valid_bits
        learned = (
            f"The {gain:.2f} bits between them come from the context: it leaves {2**gain:.1f} "
            "times fewer words to choose from."
            if gain > 0
            else "It does not use the context yet; train it longer."
        )
        say(
            console,
            "\nOn a novel that it has not read, the model needs "
            f"{result.state.best_valid_bits:.2f} bits per predicted token; guessing by frequency "
            f"needs {result.plateau.bits:.2f}. {learned}\n",
        )
    if result.export is None:
        return
    show_guesses(config, result.export, console)
    say(
        console,
        f"""
Everything is in {result.directory}: metrics.jsonl, log.txt, checkpoints,
and in {result.export} the Hugging Face model. To continue in Python:

    from transformers import pipeline
    fill = pipeline("fill-mask", "{result.export}")
    print(fill("It is a truth universally <mask>."))
""",
    )


def show_guesses(config: PretrainingConfig, export: Path, console: Console) -> None:
    """Let the network guess words before its first update and after training, and show both.

    The trained network is the export, opened by transformers. The untrained one is built again: its
    weights are a function of the seed.
    """
    tokenizer = AutoTokenizer.from_pretrained(export)
    with quiet_transformers():
        trained = AutoModelForMaskedLM.from_pretrained(export).eval()
    text = read_text(config.data, config.run.seed)
    untrained, _ = build_model(config, text)
    untrained.eval()
    if text.training_counts is None:
        return
    gaps = find_gaps(tokenizer, text.training_counts, config.data.max_tokens)
    if not gaps:
        return
    before = guess(
        lambda ids_BL, mask_BL: untrained.logits(untrained.encode(ids_BL, mask_BL)),
        tokenizer,
        gaps,
    )
    after = guess(
        lambda ids_BL, mask_BL: trained(input_ids=ids_BL, attention_mask=mask_BL).logits,
        tokenizer,
        gaps,
    )
    console.print(table_of(gaps, before, after, tokenizer))
    say(
        console,
        f"In {len(gaps):,} paragraphs the longest word was masked. Guessed at once: "
        f"{after.share_within(1):.1%} (before training {before.share_within(1):.1%}); among the "
        f"first ten guesses: {after.share_within(10):.1%} (before {before.share_within(10):.1%}).",
    )


def say(console: Console, text: str) -> None:
    """Print plain text: brackets in it are brackets."""
    console.print(text, markup=False, highlight=False)
