"""Run the demo, and show what the model has learned.

A loss is hard to judge by itself. So the demo shows it beside two things that can be judged: the
unigram plateau, which is what guessing by frequency reaches on the same text, and masks filled in
by the network as it was before the first update and as it is in the end.

**Bits as choices.** A token that costs b bits is as hard to guess as one of 2^b that are equally
likely. At the plateau of Austen's novels, 9.2 bits, it is one of 600; at the 8.2 bits that a run of
two minutes reaches (`presets/demo.toml`), one of 300. Bits subtract where choices divide, so that
each bit below the plateau halves them:

>>> plateau, reached = 9.2, 8.2
>>> round(2**plateau, -2), round(2**reached, -2), 2 ** (plateau - reached)
(600.0, 300.0, 2.0)

**Masks.** In each passage one word is in brackets. The word becomes a mask, both networks are
asked, and their three likeliest tokens are shown. They are asked as Hugging Face's users will ask:
the whole sentence at once, no permutation, no second stream. What was trained by `two_stream.py` is
used as plain BERT.

The passages are chosen, and that should be known: a model of 1.7 million weights that has read four
novels learns grammar first, and what is missing here is mostly grammar. Of tokens that nobody
chose, in 200 paragraphs of the same novel, a model of the preset `tiny` filled in one of ten
(`docs/log.md`). A test is the loss on all of Persuasion, which the run reports.

This module has no part in training. It prepares text and calls `run_pretraining` like anybody, and
all that it shows it reads off the run's directory and its result.

Next: your own text: `README.md`, and `config.py` for all that can be set.

    B batch   L tokens of a sentence   V vocabulary
"""

import re
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerBase

from annotated_mpnet.config import PretrainingConfig
from annotated_mpnet.conversion.proof import quiet_transformers
from annotated_mpnet.data.texts import read_text
from annotated_mpnet.data.tokenizer_training import train_wordpiece
from annotated_mpnet.demo.corpus import DIRECTORY, TRAIN, unpack
from annotated_mpnet.initial_weights import build_model
from annotated_mpnet.run import RunResult, run_pretraining
from annotated_mpnet.training.run_directory import refuse_taken_directory

VOCAB_SIZE = 8000
"""Pieces of the demo's own tokenizer. MPNet's has 30,527, and most of them never occur in four
novels; a table of that size would be 85 % of this network's weights."""

PASSAGES = (
    "He spoke to her, and then turned away. The character of his manner was embarrassment. She "
    "[could] not have called it either cold or friendly, or anything so certainly as embarrassed.",
    "He had been most warmly attached to her, and had never seen a woman since whom he thought her "
    "equal; but, except from some natural sensation of curiosity, he [had] no desire of meeting "
    "her again. Her power with him was gone for ever.",
    '"No," replied Anne, "nor next week, nor next, nor next. I assure [you] that nothing of the '
    "sort you are thinking of will be settled any week. I am not going to marry Mr Elliot. I "
    'should like to know why you imagine I am?"',
    '"That is the woman I want," [said] he. "Something a little inferior I shall of course put up '
    "with, but it must not be much. If I am a fool, I shall be a fool indeed, for I have thought "
    'on the subject more than most men."',
    "With these supports, she hoped that the acquaintance between herself and the Crofts, which, "
    "with Lady Russell, still resident in Kellynch, and Mary fixed only three miles off, must "
    "[be] anticipated, need not involve any particular awkwardness.",
)
"""From Persuasion, which the model is never trained on; the word in brackets will be masked. Chosen
where a model of this size has a chance: at words of grammar, with a paragraph around them."""


def run_demo(
    config: PretrainingConfig, console: Console | None = None, *, dry_run: bool = False
) -> RunResult | None:
    """Run the demo: text and tokenizer, pretraining, and what came of it.

    All of it on the preset `demo`, or on what the user has put in place of its settings.

    Args:
        config: all settings.
        console: where to report; standard output if not given.
        dry_run: write text and tokenizer, without which there is nothing to plan with, but no run.

    Returns:
        What the run left behind; None after a dry run.
    """
    console = console or Console()
    started = time.perf_counter()
    run = config.run
    # Before anything is written. `run_pretraining` asks again, and would ask too late for that.
    refuse_taken_directory(run.checkpoint_dir, run.resuming, run.overwrite)
    prepare(config, console)
    result = run_pretraining(config, console, dry_run=dry_run)
    if result is not None:
        show(config, result, console)
        console.print(f"The whole demo took {time.perf_counter() - started:.0f} seconds.")
    return result


def prepare(config: PretrainingConfig, console: Console) -> None:
    """Write the novels and the tokenizer where the preset expects them.

    What the user names instead is left to the user. Both are the same bytes each time, so that the
    cache of packed text knows them, and a second demo does not tokenise again.
    """
    if config.data.train_dir == DIRECTORY / "train":
        unpack(DIRECTORY)
        say(console, f"six novels by Jane Austen: {DIRECTORY}")
    tokenizer_directory = DIRECTORY / "tokenizer"
    if config.data.tokenizer_name == str(tokenizer_directory):
        # From the training text only: what is evaluated on has no say in the vocabulary either.
        files = [DIRECTORY / "train" / f"{name}.txt" for name in TRAIN]
        tokenizer = train_wordpiece(files, VOCAB_SIZE)
        tokenizer.save_pretrained(tokenizer_directory)
        say(console, f"a tokenizer of {len(tokenizer):,} pieces, learned from them")


def show(config: PretrainingConfig, result: RunResult, console: Console) -> None:
    """Show the result beside the plateau, masks before and after, and how to go on.

    What there is no number for is left out: the comparison without a validation text, and the masks
    where Hugging Face cannot represent the network (`--normalize-before`, for instance).

    Args:
        config: of the run.
        result: of the run.
        console: where to show it.
    """
    if result.plateau is not None and result.state.best_valid_bits is not None:
        gain = result.plateau.bits - result.state.best_valid_bits
        say(
            console,
            "\nOn a novel that it has not read, the model needs "
            f"{result.state.best_valid_bits:.2f} bits per predicted token; guessing by frequency "
            f"needs {result.plateau.bits:.2f}. The {gain:.2f} bits between them come from the "
            f"context: it leaves {2**gain:.1f} times fewer words to choose from.\n",
        )
    if result.export is None:
        return
    console.print(masks_before_and_after(config, result.export))
    say(
        console,
        f"""
Everything is in {result.directory}: metrics.jsonl, log.txt, checkpoints,
and in {result.export} the Hugging Face model. To go on in Python:

    from transformers import pipeline
    fill = pipeline("fill-mask", "{result.export}")
    print(fill("It is a truth universally <mask>."))
""",
    )


def masks_before_and_after(config: PretrainingConfig, export: Path) -> Table:
    """Fill masks with the network before its first update, and with the export.

    The export is opened as its users will open it, by transformers and from the disk: what is shown
    here works elsewhere too.

    Args:
        config: of the run; the network before is made from it.
        export: directory of the Hugging Face model.

    Returns:
        A table of the passages, with the three likeliest tokens of either network.
    """
    tokenizer = AutoTokenizer.from_pretrained(export)
    with quiet_transformers():
        trained = AutoModelForMaskedLM.from_pretrained(export).eval()
    # Weights are a function of the seed, so that the network before the first update can be made
    # once more, where a copy would have to be kept all the time. (The text is read for the
    # frequencies in the head's bias, and comes from the cache.)
    untrained, _ = build_model(config, read_text(config.data, config.run.seed))
    untrained.eval()
    table = Table(title="Masks in Persuasion, filled", title_justify="left")
    for column in ("passage", "Austen", "before training", "after training"):
        table.add_column(column)
    for passage in PASSAGES:
        # "She [could] not" becomes "She ", "could" and " not". One mask stands for one token, and
        # so the words in brackets are such as are one piece.
        before, word, after = re.split(r"[\[\]]", passage)
        encoded = tokenizer(before + tokenizer.mask_token + after, return_tensors="pt")
        input_ids_BL = encoded["input_ids"]
        masked_L = input_ids_BL[0] == tokenizer.mask_token_id
        with torch.no_grad():
            # Of the logits (B, L, V), those of the only sentence, at its only mask.
            before_V = untrained.lm_head(untrained.encode(input_ids_BL))[0, masked_L][0]
            after_V = trained(**encoded).logits[0, masked_L][0]
        clause = " ".join(["...", *before.split()[-4:], "____", *after.split()[:4], "..."])
        guesses = [_likeliest(logits_V, tokenizer) for logits_V in (before_V, after_V)]
        table.add_row(*(escape(cell) for cell in (clause, word, *guesses)))
    return table


def say(console: Console, text: str) -> None:
    """Print plain text: brackets in it are brackets."""
    console.print(text, markup=False, highlight=False)


def _likeliest(logits_V: torch.Tensor, tokenizer: PreTrainedTokenizerBase, most: int = 3) -> str:
    """Return the tokens with the largest logits (V), the largest first.

    A softmax would not change their order. Pieces are shown as they are: `##ly` says that the model
    means to go on with the word before.

    >>> class Letters:
    ...     def convert_ids_to_tokens(self, ids):
    ...         return ["abcde"[each] for each in ids]
    >>> _likeliest(torch.tensor([0.1, 3.0, -1.0, 2.0, 0.5]), Letters())
    'b  d  e'
    """
    tokens = logits_V.topk(most).indices.tolist()
    return "  ".join(tokenizer.convert_ids_to_tokens(tokens))
