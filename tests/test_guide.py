"""The commands and code of docs/guide and the README, word for word, at small sizes.

Names on the Hub are directories here. Most commands are run with `--dry-run`, which prepares
everything and tries a micro-batch; those whose results a page uses later really train.
"""

import re
import shlex
import shutil
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformer
from torch.distributed.run import get_args_parser

from annotated_mpnet import cli
from annotated_mpnet.settings.parsing import parse_pretrain
from pages import run_section
from tiny_run import changed, run, tiny_config, write_dataset, write_text

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "guide"
README = "../../README.md"
PAGES = [*sorted(path.name for path in GUIDE.glob("*.md")), README]
TRAINED = {"checkpoints/tiny", "checkpoints/mine", "checkpoints/wsd", "checkpoints/wsd-longer"}
"""The runs that a page uses later."""

UPDATES = ("--total-updates", "--warmup-updates", "--decay-updates", "--checkpoint-interval")
NETWORK = """
    --encoder-layers 1 --encoder-embed-dim 16 --encoder-ffn-dim 32 --encoder-attention-heads 2
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a directory with all that the pages name."""
    here = tmp_path_factory.mktemp("guide")
    text = write_text(here / "text")
    for name in ("my_text", "wikipedia", "my_domain"):
        shutil.copytree(text.train_dir, here / name)
    (here / "valid.txt").write_text("\n".join(documents([text.valid_file])[:3]) + "\n")
    shutil.copytree(text.tokenizer, here / "my_tokenizer")
    write_dataset(text, here / "HuggingFaceFW" / "fineweb-edu", shards=1)
    config = tiny_config(text, here / "base")
    export = run(changed(config, total_updates=1, warmup_updates=0, test_file=None))[0].export
    assert export is not None
    shutil.copytree(export, here / "microsoft" / "mpnet-base")
    encoder = SentenceTransformer(str(export))
    encoder.save(str(here / "sentence-transformers" / "all-mpnet-base-v2"))
    shutil.copytree(ROOT / "examples", here / "examples")
    return here


def documents(files: Iterable[Path]) -> list[str]:
    return [line for file in sorted(files) for line in file.read_text().splitlines()]


def blocks(page: str, language: str) -> list[str]:
    text = (GUIDE / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def commands(page: str) -> list[list[str]]:
    source = "".join(blocks(page, "bash"))
    if page == README:
        part = (GUIDE / page).read_text(encoding="utf-8").partition("## Use it")[2]
        source = re.sub(r"^(?!    ).*\n|^    from .*\n", "", part.partition("\n## ")[0], flags=re.M)
    return [shlex.split(line) for line in source.replace("\\\n", " ").splitlines()]


def updates(written: str) -> str:
    return str(min(max(round(int(written) / 2500), 1), 8))


def small(words: list[str]) -> list[str]:
    """Make a pretraining small; flags that are not about its size stay as they are."""
    more = shlex.split("--batch-size 2 --update-freq 1 --device cpu")
    settings = parse_pretrain(words).settings
    if settings.run.hf_model_path is None:
        more += shlex.split(NETWORK)
    more += ["--max-tokens", "64" if settings.data.max_tokens > 512 else "32"]
    if settings.data.dataset_name:
        more += shlex.split("--eval-samples 5 --buffer-size 20 --min-text-length 20")
    elif settings.data.valid_fraction:
        more += ["--valid-fraction", "0.2"]
    written = dict(zip(UPDATES, ("4000", "1000"), strict=False))  # unless the page says more
    written |= {flag: words[words.index(flag) + 1] for flag in UPDATES if flag in words}
    for flag, number in written.items():
        more += [flag, updates(number)]
    if str(settings.run.checkpoint_dir) in TRAINED:
        more += shlex.split("--eval-interval-steps 100 --no-export-hf")
    else:
        more += ["--dry-run"]
    kept, keep = list[str](), True
    for word in words:
        keep = word not in more if word.startswith("--") else keep
        kept += [re.sub(r"checkpoint(\d+)$", at_update, word)] if keep else []
    return kept + more


def at_update(name: re.Match[str]) -> str:
    return "checkpoint" + updates(name[1])


def follow(program: str, words: list[str]) -> int:
    """Run a command as its reader would."""
    if ">" in words:
        with open(words[-1], "w") as file, redirect_stdout(file):
            return follow(program, words[:-2])
    if program == "sbatch":
        assert Path(words[0]).exists()
        return follow("pretrain-mpnet", words[1:])
    if program == "torchrun":
        launch = get_args_parser().parse_args(words)
        assert (launch.module, launch.training_script) == (True, "annotated_mpnet")
        return follow("pretrain-mpnet", launch.training_script_args)
    if program == "train-mpnet-tokenizer":
        if "--vocab-size" in words:
            words[words.index("--vocab-size") + 1] = "400"
        return cli._ending(program, cli._train_tokenizer, words)
    if program == "convert-to-hf":
        words = [re.sub(r"checkpoint(\d+)$", at_update, word) for word in words]
        return cli._ending(program, cli._convert, words)
    assert program == "pretrain-mpnet", f"nothing here runs {program}"
    parse_pretrain(words).settings.validate()
    shows = {"list", "--print-config"} & set(words)
    return cli._ending(program, cli._pretrain, words if shows else small(words))


# Trainers of other libraries warn of what they will change.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_all_commands_of_the_page_run(
    page: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Tested elsewhere, and half of the time of a tiny run.
    monkeypatch.setattr("annotated_mpnet.runs.plan.busy_cores", lambda: 0.0)
    monkeypatch.setattr("annotated_mpnet.tracking.report._draw", lambda *_: None)
    monkeypatch.chdir(here)
    shutil.rmtree("checkpoints", ignore_errors=True)
    for name in ("my_tokenizer", "my_bpe_tokenizer", "my_unigram_tokenizer"):
        if page in ("training.md", "tokenizer.md", README):
            shutil.rmtree(name, ignore_errors=True)
    for path in here.glob("my-mpnet*"):
        shutil.rmtree(path)
    for program, *words in commands(page):
        assert follow(program, words) == 0, (shlex.join([program, *words]), capsys.readouterr())
    names: dict[str, object] = {"__name__": "page"}
    for code in blocks(page, "python"):
        exec(compile(code, page, "exec"), names)


def test_examples_in_numbers_are_computed() -> None:
    run_section("guide/numbers.md", "Bits")


def test_the_book_answers_five_questions_in_words_that_a_search_finds() -> None:
    book = ROOT / "src" / "annotated_mpnet" / "mpnet"
    text = " ".join(" ".join(path.read_text().split()) for path in sorted(book.glob("*.py")))
    for words in (
        "masks for predicted tokens are also shown to later queries",
        "no query can see its own token",
        "position compensation adds over XLNet",
        "the last layer is cheaper",
        "the loss divided as it is",
    ):
        assert words in text, words
