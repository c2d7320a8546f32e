"""The commands in annotated-mpnet's documentation, word for word.

Names on the Hub are found here because a folder has that name: `gair-prox/DCLM-pro` in the current
directory is a dataset, `microsoft/mpnet-base` a tokenizer. What is appended makes a run small; the
last of two equal flags holds, so that every word of the documentation is still parsed.
"""

import shlex
import shutil
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForMaskedLM

from annotated_mpnet import cli
from annotated_mpnet.settings.config import PretrainingConfig
from annotated_mpnet.settings.parsing import parse_pretrain
from annotated_mpnet.tracking.sinks import read_metrics
from processes import Command
from tiny_run import TinyText, write_dataset, write_text
from waiting import HUNG

# From its README and docs/training.md.

STREAM = """
pretrain-mpnet \\
    --dataset-name "HuggingFaceFW/fineweb-edu" \\
    --tokenizer-name "microsoft/mpnet-base" \\
    --batch-size 16 \\
    --update-freq 8 \\
    --total-updates 100000 \\
    --checkpoint-dir "./checkpoints/my_run"
"""

STREAM_IN_FULL = """
pretrain-mpnet \\
    --dataset-name "gair-prox/DCLM-pro" \\
    --text-field "text" \\
    --tokenizer-name "microsoft/mpnet-base" \\
    --max-tokens 512 \\
    --encoder-layers 12 \\
    --encoder-embed-dim 768 \\
    --encoder-ffn-dim 3072 \\
    --encoder-attention-heads 12 \\
    --batch-size 16 \\
    --update-freq 8 \\
    --lr 6e-4 \\
    --warmup-updates 1000 \\
    --total-updates 100000 \\
    --checkpoint-dir "./checkpoints/my_mpnet_run" \\
    --tensorboard-log-dir "./logs/my_mpnet_run" \\
    --wandb --wandb-project "annotated-mpnet-experiments" \\
    --checkpoint-interval 2500 \\
    --eval-interval-steps 2500
"""

FILES = """
pretrain-mpnet \\
    --train-dir "/path/to/your/train_data_directory/" \\
    --valid-file "/path/to/your/validation_data.txt" \\
    --test-file "/path/to/your/test_data.txt" \\
    --tokenizer-name "microsoft/mpnet-base" \\
    --max-tokens 512 \\
    --batch-size 16 \\
    --update-freq 8 \\
    --lr 6e-4 \\
    --warmup-updates 1000 \\
    --total-updates 100000 \\
    --checkpoint-dir "./checkpoints/my_local_mpnet_run" \\
    --tensorboard-log-dir "./logs/my_local_mpnet_run" \\
    --checkpoint-interval 2500 \\
    --eval-interval-steps 2500
"""

RESUMABLE = """
pretrain-mpnet \\
    --dataset-name "gair-prox/DCLM-pro" \\
    --tokenizer-name "microsoft/mpnet-base" \\
    --total-updates 200000 \\
    --checkpoint-dir "./checkpoints/my_mpnet_run" \\
    --checkpoint-interval 2500 \\
    --save-optimizer-state
"""

RESUME = """
pretrain-mpnet \\
    --dataset-name "gair-prox/DCLM-pro" \\
    --tokenizer-name "microsoft/mpnet-base" \\
    --total-updates 200000 \\
    --checkpoint-dir "./checkpoints/my_mpnet_run" \\
    --resume \\
    --resume-checkpoint "./checkpoints/my_mpnet_run/checkpoint2500.pt"
"""

CONVERT = """
convert-to-hf \\
    --mpnet-checkpoint-path "./checkpoints/my_mpnet_run/best_checkpoint.pt" \\
    --hf-model-folder-path "./my_hf_mpnet_model/"
"""

SMALL = """
    --encoder-layers 1 --encoder-embed-dim 16 --encoder-ffn-dim 32 --encoder-attention-heads 2
    --max-tokens 32 --batch-size 2 --update-freq 1 --warmup-updates 1 --total-updates 2
    --eval-samples 5 --buffer-size 20 --min-text-length 20
    --checkpoint-interval 1 --eval-interval-steps 1 --logging-steps 1
"""


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyText:
    """Write text, and fakes of the Hub's datasets; work in the directory where they are found."""
    text = write_text(tmp_path / "text")
    for name in ("HuggingFaceFW/fineweb-edu", "gair-prox/DCLM-pro"):
        write_dataset(text, tmp_path / name, shards=2)
    shutil.copytree(text.tokenizer, tmp_path / "microsoft" / "mpnet-base")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    return text


def words_of(documented: str, *more: str) -> list[str]:
    # A shell takes a backslash at the end of a line away, which shlex does not.
    return shlex.split(" ".join([documented, *more]).replace("\\\n", ""))[1:]


def pretrain(documented: str, *more: str) -> int:
    words = changed_by(words_of(documented), shlex.split(" ".join([SMALL, *more])))
    return cli._ending("pretrain-mpnet", cli._pretrain, words)


def changed_by(words: list[str], mine: list[str]) -> list[str]:
    """Give flags of a command other values: no flag may be given twice."""
    kept, keep = [], True
    for word in words:
        keep = word not in mine if word.startswith("--") else keep
        kept += [word] if keep else []
    return kept + mine


def settings_of(documented: str) -> PretrainingConfig:
    settings = parse_pretrain(words_of(documented)).settings
    settings.validate()
    return settings


def test_every_documented_command_means_what_it_meant() -> None:
    stream = settings_of(STREAM)
    assert stream.data.dataset_name == "HuggingFaceFW/fineweb-edu"
    assert stream.data.streaming
    assert stream.run.checkpoint_dir == Path("checkpoints/my_run")
    assert stream.optimization.total_updates == 100_000
    # The defaults wrote out what the longer command says.
    full = settings_of(STREAM_IN_FULL)
    assert full.model == stream.model
    assert full.tracking.wandb
    assert full.tracking.tensorboard_log_dir == Path("logs/my_mpnet_run")
    assert full.run.effective_eval_interval == full.run.checkpoint_interval == 2500
    files = settings_of(FILES)
    assert files.data.train_dir == Path("/path/to/your/train_data_directory")
    assert files.data.dataset_name is None
    assert settings_of(RESUMABLE).run.save_optimizer_state
    resume = settings_of(RESUME).run
    assert resume.resuming
    assert resume.resume_checkpoint == Path("checkpoints/my_mpnet_run/checkpoint2500.pt")


def test_the_streaming_run(text: TinyText, tmp_path: Path) -> None:
    assert pretrain(STREAM) == 0
    assert (tmp_path / "checkpoints" / "my_run" / "checkpoint2" / "model.safetensors").exists()


def test_the_streaming_run_in_full(text: TinyText, tmp_path: Path) -> None:
    # In a process of its own, because W&B leaves threads and a process.
    run = Command(changed_by(words_of(STREAM_IN_FULL), shlex.split(SMALL)))
    _, complained = run.communicate(HUNG)
    assert run.returncode == 0, complained
    # All three places know the same numbers, by the same names.
    events = EventAccumulator(str(tmp_path / "logs" / "my_mpnet_run"))
    events.Reload()
    names = set(events.Tags()["scalars"])
    records = read_metrics(tmp_path / "checkpoints" / "my_mpnet_run" / "metrics.jsonl")
    assert names == {name for record in records for name in record} - {"step"}
    assert names >= {
        "train/loss",
        "valid/bits",
        "perf/tokens_per_second",
        "perf/predicted_per_second",
        "perf/data_wait",
        "memory/peak_gb",
    }
    (offline,) = tmp_path.rglob("run-*.wandb")
    sent = offline.read_bytes()
    assert all(name.encode() in sent for name in names)
    assert (tmp_path / "checkpoints" / "my_mpnet_run" / "best_checkpoint").is_dir()


# `/path/to/your/` is where the reader's own paths go.
@pytest.mark.parametrize("habit", ["", '--dataset-name ""'])
def test_the_local_run(text: TinyText, tmp_path: Path, habit: str) -> None:
    mine = f"--train-dir {text.train_dir} --valid-file {text.valid_file}"
    assert pretrain(FILES, mine, f"--test-file {text.test_file}", habit) == 0
    run = tmp_path / "checkpoints" / "my_local_mpnet_run"
    assert "test text: " in (run / "log.txt").read_text()
    assert list((tmp_path / "logs" / "my_local_mpnet_run").rglob("events.out.tfevents.*"))


def test_a_run_is_resumed_and_converted(
    text: TinyText, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain(RESUMABLE) == 0
    run = tmp_path / "checkpoints" / "my_mpnet_run"
    uninterrupted = (run / "checkpoint2" / "model.safetensors").read_bytes()
    shutil.rmtree(run / "checkpoint2")
    # Update 2500 is update 1 here. The name is that of a file, as annotated-mpnet's were.
    interrupted = "--resume-checkpoint ./checkpoints/my_mpnet_run/checkpoint1.pt"
    capsys.readouterr()
    assert pretrain(RESUME, interrupted, "--trust-checkpoint") == 0
    assert "resuming from checkpoints/my_mpnet_run/checkpoint1" in capsys.readouterr().out
    assert (run / "checkpoint2" / "model.safetensors").read_bytes() == uninterrupted

    assert cli._ending("convert-to-hf", cli._convert, words_of(CONVERT)) == 0
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "my_hf_mpnet_model")
    assert model.config.hidden_size == 16
