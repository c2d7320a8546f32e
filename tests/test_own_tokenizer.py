"""The user's own tokenizer, from training it to opening an export."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from annotated_mpnet import cli
from annotated_mpnet.settings.commands import TokenizerModel
from annotated_mpnet.text.tokenizer import load_tokenizer, tokenizer_hash
from tiny_run import changed, run, tiny_config, write_text


def learn(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    """Run `train-mpnet-tokenizer` and return its output."""
    given = [str(each) for each in arguments]
    assert cli._ending("train-mpnet-tokenizer", cli._train_tokenizer, given) == code
    said = capsys.readouterr()
    return said.out if code == 0 else said.err


@pytest.mark.parametrize("model", ["bpe", "unigram"])
def test_a_run_with_any_kind_of_tokenizer_is_exported_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: TokenizerModel
) -> None:
    text = write_text(tmp_path)
    own = tmp_path / "own"
    learn(capsys, text.train_dir, "--model", model, "--vocab-size", 500, "--output", own)
    config = tiny_config(text, tmp_path / "run")
    result, said = run(changed(config, tokenizer_name=str(own), total_updates=2))
    assert result.export is not None
    assert "Hugging Face model" in said
    # transformers takes the class from the tokenizer's file, not from the model's.
    opened = AutoTokenizer.from_pretrained(result.export)
    assert opened.is_fast
    for directory in (result.export, result.directory / "best_checkpoint" / "tokenizer"):
        assert tokenizer_hash(load_tokenizer(str(directory))) == tokenizer_hash(
            load_tokenizer(str(own))
        )
    sentence = 'Anne said, "It is  हिन्दी 🐈."'
    assert opened.decode(opened(sentence).input_ids, skip_special_tokens=True) == sentence
    assert len(opened("Anne <mask>.").input_ids) == len(opened("Anne.").input_ids) + 1
    description = json.loads((result.export / "tokenizer_config.json").read_text())
    assert description["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_a_tokenizer_is_trained_on_the_beginning_of_a_dataset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.dumps({"body": f"sea shells {'abcdefghij'[n]}"}) for n in range(10)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join([*rows, json.dumps({"body": 3})]))
    source = ["--dataset-name", tmp_path / "data", "--text-field", "body", "--vocab-size", 64]
    said = learn(capsys, *source, "--dataset-documents", 4, "--output", tmp_path / "some")
    assert said.startswith("data@")
    assert "column body: 4 documents\n" in said
    pieces = load_tokenizer(str(tmp_path / "some")).get_vocab()
    assert "d" in pieces
    assert "j" not in pieces
    said = learn(capsys, *source, "--output", tmp_path / "all")
    assert "column body: 10 documents; 1 rows without text skipped\n" in said
    assert "j" in load_tokenizer(str(tmp_path / "all")).get_vocab()


def test_case_and_accents_come_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("École\n" * 9)
    for flags, expected in (
        ([], "ecole"),
        (["--no-lowercase"], "École"),
        (["--no-strip-accents"], "école"),
        (["--no-lowercase", "--strip-accents"], "Ecole"),
    ):
        out = tmp_path / "out"
        learn(
            capsys,
            tmp_path / "text.txt",
            "--vocab-size",
            64,
            "--output",
            out,
            *flags,
            "--overwrite",
        )
        assert load_tokenizer(str(out)).tokenize("École") == [expected]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "FILES is missing; expected text files or directories of them, or a --dataset-name"),
        (["a.txt", "--dataset-name", "b"], "FILES a.txt and --dataset-name b exclude each other"),
        (["a.txt", "--model", "spm"], "--model is 'spm'; expected one of wordpiece, bpe, unigram"),
        (["--dataset-name", "b", "--dataset-documents", "0"], "--dataset-documents is 0; expected"),
        (["--dataset-name", "b", "--vocab-size", "9"], "--vocab-size is 9; expected 64"),
        (["a.txt", "--model", "bpe", "--vocab-size", "99"], "with --model bpe, where 256 of them"),
    ],
)
def test_a_wrong_flag_is_one_line_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    error = learn(capsys, *arguments, "--output", tmp_path / "out", code=2)
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


GUIDE = Path(__file__).parents[1] / "docs" / "guide" / "tokenizer.md"
DOCUMENTED = [
    line for line in GUIDE.read_text().splitlines() if line.startswith("train-mpnet-tokenizer")
]


def test_the_documented_commands_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = write_text(tmp_path / "text")
    shutil.copytree(text.train_dir, tmp_path / "my_text")
    # A folder with the name of a Hub dataset.
    (tmp_path / "HuggingFaceFW" / "fineweb-edu").mkdir(parents=True)
    rows = [json.dumps({"text": line}) for line in text.valid_file.read_text().splitlines()]
    (tmp_path / "HuggingFaceFW" / "fineweb-edu" / "a.jsonl").write_text("\n".join(rows))
    monkeypatch.chdir(tmp_path)
    assert len(DOCUMENTED) == 3
    for line in DOCUMENTED:
        said = learn(capsys, *shlex.split(line)[1:])
        load_tokenizer(said.splitlines()[-1].split()[-1])
