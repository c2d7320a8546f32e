"""A run that starts from a sentence encoder: what it takes over, keeps, and exports."""

import dataclasses
import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import AutoTokenizer, MPNetConfig, MPNetModel

from annotated_mpnet import cli
from annotated_mpnet.checkpoints.checkpoint import load_checkpoint
from annotated_mpnet.conversion import convert_checkpoint
from annotated_mpnet.conversion.kept import from_export_files
from annotated_mpnet.conversion.model_card import FACTS
from annotated_mpnet.conversion.proof import quiet_transformers
from annotated_mpnet.errors import CheckpointError
from annotated_mpnet.runs.run import RunResult
from annotated_mpnet.settings.config import PretrainingConfig
from folders import tree
from tiny_run import TinyText, changed, run, tiny_config

SENTENCES = ["She was persuaded to wait.", "He wrote a letter. " * 20]
LIMIT = 20


@dataclasses.dataclass
class Continued:
    """A run of one update, too small to change a weight, whose source has been deleted."""

    encoder: Path
    wanted: torch.Tensor
    config: PretrainingConfig
    result: RunResult
    said: str
    source: str


def vectors(directory: Path) -> torch.Tensor:
    with quiet_transformers():
        model = SentenceTransformer(str(directory), device="cpu")
    assert model.max_seq_length == LIMIT
    assert model.prompts["query"] == "said "
    return model.encode(
        SENTENCES, prompt_name="query", convert_to_tensor=True, show_progress_bar=False
    )


def write_encoder(text: TinyText, directory: Path) -> Path:
    torch.manual_seed(0)
    config = MPNetConfig(
        vocab_size=400,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=34,
        layer_norm_eps=1e-5,
    )
    with quiet_transformers():
        MPNetModel(config).save_pretrained(directory / "network")
        AutoTokenizer.from_pretrained(text.tokenizer).save_pretrained(directory / "network")
        transformer = Transformer(str(directory / "network"))
        transformer.tokenizer.model_max_length = LIMIT
        SentenceTransformer(
            modules=[transformer, Pooling(16, "cls"), Normalize()],
            device="cpu",
            prompts={"query": "said "},
        ).save(str(directory / "sentences"))
    return directory / "sentences"


@pytest.fixture(scope="module")
def continued(text: TinyText, tmp_path_factory: pytest.TempPathFactory) -> Continued:
    folder = tmp_path_factory.mktemp("continued")
    encoder = write_encoder(text, folder)
    wanted = vectors(encoder)
    config = changed(
        tiny_config(text, folder / "run"),
        hf_model_path=str(encoder),
        tokenizer_name=None,
        lr=1e-12,
        total_updates=1,
        warmup_updates=0,
        head_bias="auto",
    )
    result, said = run(config)
    kept = encoder.rename(folder / "elsewhere")
    return Continued(kept, wanted, config, result, said, str(encoder))


def test_export_of_a_run_is_the_sentence_encoder_that_it_started_from(
    continued: Continued, tmp_path: Path
) -> None:
    assert continued.result.export is not None
    assert (vectors(continued.result.export) - continued.wanted).abs().max() < 1e-5
    # So is a converted checkpoint, even if nothing else is left of the run.
    best = continued.config.run.checkpoint_dir / "best_checkpoint"
    shutil.copytree(best, tmp_path / "best_checkpoint")
    convert_checkpoint(
        tmp_path / "best_checkpoint",
        tmp_path / "hf",
        save_tokenizer=True,
        overwrite=False,
        pytorch_bin=False,
    )
    assert (vectors(tmp_path / "hf") - continued.wanted).abs().max() < 1e-5
    assert "texts are cut after 20 tokens" in continued.said


def test_a_model_brings_its_tokenizer_and_the_plan_says_so(
    continued: Continued, text: TinyText
) -> None:
    assert f"tokenizer: the model's own, {continued.source}" in continued.said
    own = AutoTokenizer.from_pretrained(continued.result.directory / "hf")
    assert own.get_vocab() == AutoTokenizer.from_pretrained(text.tokenizer).get_vocab()


def test_fresh_head_of_an_encoder_starts_at_the_plateau(continued: Continued) -> None:
    plateau, best = continued.result.plateau, continued.result.state.best_valid_bits
    assert plateau is not None
    assert best == pytest.approx(plateau.bits, abs=0.3)


def test_resumed_run_needs_nothing_of_its_start(continued: Continued, tmp_path: Path) -> None:
    assert not Path(continued.source).exists()
    shutil.copytree(continued.config.run.checkpoint_dir, tmp_path / "run")
    # The same command with --resume: its weights are ignored, its tokenizer is the checkpoint's.
    again = changed(continued.config, checkpoint_dir=tmp_path / "run", resume=True, total_updates=2)
    result, said = run(again)
    ignored = f"--hf-model-path {continued.source} is ignored: a resumed run has its weights"
    assert said.replace("\n", " ").count("--hf-model-path") == 1
    assert ignored in said.replace("\n", "")
    assert result.export is not None
    assert (vectors(result.export) - continued.wanted).abs().max() < 1e-5
    first, second = (load_checkpoint(tmp_path / "run" / f"checkpoint{update}") for update in (1, 2))
    modules = dict(first.export_files)
    assert modules.pop(FACTS) != second.export_files[FACTS]
    assert set(modules) == {
        "modules.json",
        "config_sentence_transformers.json",
        "sentence_bert_config.json",
        "1_Pooling/config.json",
        "2_Normalize/config.json",
    }
    assert modules.items() <= second.export_files.items()
    assert json.loads(second.export_files[FACTS])["base"] == "sentences"
    # Nothing is left to do, and no byte changes.
    before = tree(tmp_path / "run")
    run(again)
    assert tree(tmp_path / "run") == before


def test_another_run_takes_modules_and_tokenizer_from_a_checkpoint(
    continued: Continued, text: TinyText, tmp_path: Path
) -> None:
    checkpoint = continued.config.run.checkpoint_dir / "checkpoint1"
    source = {"hf_model_path": str(checkpoint), "checkpoint_dir": tmp_path / "run"}
    result, _ = run(changed(continued.config, **source))
    assert result.export is not None
    assert (vectors(result.export) - continued.wanted).abs().max() < 1e-5


def test_damaged_tokenizer_of_the_newest_checkpoint_is_taken_from_an_older_one(
    continued: Continued, tmp_path: Path
) -> None:
    shutil.copytree(continued.config.run.checkpoint_dir, tmp_path / "run")
    config = changed(continued.config, checkpoint_dir=tmp_path / "run", resume=True)
    run(changed(config, total_updates=2))
    (tmp_path / "run" / "checkpoint2" / "tokenizer" / "tokenizer.json").write_text("{}")
    shutil.rmtree(tmp_path / "run" / "best_checkpoint")
    _, said = run(changed(config, total_updates=2))
    assert "checkpoint1, after update 1" in said.replace("\n", "")


def test_checkpoint_with_a_foreign_file_for_its_export_is_refused(
    continued: Continued, tmp_path: Path
) -> None:
    checkpoint = load_checkpoint(continued.config.run.checkpoint_dir / "checkpoint1")
    for name in ("config.json", "modeling.py", "../up.json", "1_Pooling/../config.json"):
        with pytest.raises(CheckpointError, match="no file of an export"):
            from_export_files(dataclasses.replace(checkpoint, export_files={name: b""}))
    with pytest.raises(CheckpointError, match=r"annotated_mpnet\.json cannot be read"):
        from_export_files(dataclasses.replace(checkpoint, export_files={FACTS: b"[]"}))


def test_command_of_the_readme_does_it(
    continued: Continued, text: TinyText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = Path(__file__).parents[1] / "README.md"
    (command,) = [
        line for line in readme.read_text().splitlines() if "--hf-model-path sentence-tr" in line
    ]
    # Here the Hub name is a directory.
    shutil.copytree(continued.encoder, tmp_path / "sentence-transformers" / "all-mpnet-base-v2")
    shutil.copytree(text.train_dir, tmp_path / "my_text")
    monkeypatch.chdir(tmp_path)
    program, *words = shlex.split(command)
    words += shlex.split("--total-updates 1 --warmup-updates 0 --lr 1e-12 --max-tokens 32")
    assert cli._ending(program, cli._pretrain, words) == 0
    assert (vectors(Path("checkpoints/continue/hf")) - continued.wanted).abs().max() < 1e-5
    card = Path("checkpoints/continue/hf/README.md").read_text()
    assert "| validation text | 2% of the training text, held out |" in card


# The model card.


def test_card_says_what_the_model_is(continued: Continued, text: TinyText, tmp_path: Path) -> None:
    assert continued.result.export is not None
    card = (continued.result.export / "README.md").read_text()
    result = continued.result
    assert result.test is not None
    assert result.plateau is not None
    for said in (
        "library_name: sentence-transformers",
        "pipeline_tag: sentence-similarity",
        "# run",
        "| base model | sentences |",
        "| training text | train |",
        "| validation text | valid.txt |",
        "| test text | test.txt |",
        "| objective | masked and permuted (MPNet): 15% of the tokens predicted, whole words;",
        "| update | 8 sequences of up to 32 tokens |",
        "| trained | 1 updates, 256 tokens, ",
        f"| guessing by frequency, on the validation text | {result.plateau.bits:.3f} | "
        f"{result.plateau.accuracy:.3f} |",
        f"| this model, on the validation text | {result.state.best_valid_bits:.3f} | 0.",
        f"| this model, on the test text | {result.test.bits:.3f} | {result.test.accuracy:.3f} |",
        "    --batch-size 4\n",
        "SentenceTransformer('hf')",
        "pipeline(\"fill-mask\", 'hf')",
    ):
        assert said in card, said
    # The card of a second export says the same.
    convert_checkpoint(
        continued.result.export,
        tmp_path / "run" / "hf",
        save_tokenizer=True,
        overwrite=False,
        pytorch_bin=False,
    )
    assert (tmp_path / "run" / "hf" / "README.md").read_text() == card
    # A card is public, so it has nothing about the machine.
    assert str(text.train_dir.parent) not in card


def test_what_the_card_says_about_use_works(
    continued: Continued, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert continued.result.export is not None
    monkeypatch.chdir(continued.result.export.parent)
    card = (continued.result.export / "README.md").read_text()
    blocks = [part.partition("```")[0] for part in card.split("```python")[1:]]
    assert len(blocks) == 2
    with quiet_transformers():
        for block in blocks:
            exec(compile(block, "README.md", "exec"), {})
    assert "tensor" in capsys.readouterr().out
