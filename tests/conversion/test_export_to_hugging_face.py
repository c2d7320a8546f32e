"""Ours -> Hugging Face: refused with reasons, or proved; all of it, or nothing."""

import copy
import errno
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import (
    MAX_POSITIONS,
    VOCAB_SIZE,
    padded_batch,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
)
from transformers import AutoModelForMaskedLM, AutoTokenizer, MPNetForMaskedLM

from annotated_mpnet.conversion import (
    ExportReport,
    export,
    export_to_hugging_face,
    load_any,
    reasons_not_representable,
)
from annotated_mpnet.errors import CheckpointError, ConfigError, WriteError
from annotated_mpnet.mpnet.config import ModelConfig
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining
from folders import tree


def exported(
    directory: Path, model: MPNetForPretraining | None = None, overwrite: bool = False
) -> ExportReport:
    return export_to_hugging_face(
        model or tiny_model(), directory, tokenizer=tiny_tokenizer(), overwrite=overwrite
    )


def without_card(directory: Path) -> dict[str, bytes]:
    # The card has the directory's name in it.
    found = tree(directory)
    del found["README.md"]
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"encoder_layers": 1, "encoder_attention_heads": 1},
        {"encoder_layers": 3, "encoder_embed_dim": 24, "encoder_ffn_dim": 20},
        # Long enough for the last bucket of relative positions, on both sides.
        {"max_positions": 200},
        {"layer_norm_eps": 1e-3, "max_positions": 3},
    ],
)
def test_export_gives_the_logits_of_encode_and_head(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    model = tiny_model(tiny_config(**changes)).eval()
    report = exported(tmp_path / "hf", model)
    assert report.max_difference < 1e-5
    theirs = AutoModelForMaskedLM.from_pretrained(tmp_path / "hf").eval()
    input_ids, attention_mask = padded_batch(VOCAB_SIZE, model.config.max_positions)
    with torch.no_grad():
        ours = model.logits(model.encode(input_ids, attention_mask))
        logits = theirs(input_ids=input_ids, attention_mask=attention_mask).logits
    assert logits.std() > 0.1, "logits that are all alike would prove nothing"
    assert (ours - logits)[attention_mask == 1].abs().max() < 1e-4


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"relative_attention_num_buckets": 64}, "relative_attention_num_buckets is 64, not 32"),
        ({"relative_attention_num_buckets": 0}, "relative_attention_num_buckets is 0, not 32"),
        ({"relative_attention_max_distance": 136}, "max_distance is 136, not 128"),
        ({"normalize_before": True}, "normalize_before is True, not False"),
        ({"position_embedding": "sinusoidal"}, "position_embedding is sinusoidal, not learned"),
        ({"activation_fn": "relu"}, "relu, not gelu"),
        ({"activation_fn": "gelu_accurate"}, "gelu_accurate, not gelu"),
        ({"pad_token_id": 0}, "pad_token_id is 0, not 1"),
    ],
)
def test_what_hugging_face_cannot_represent_is_refused_with_the_reason(
    tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    config = tiny_config(**changes)
    assert len(reasons_not_representable(config)) == 1
    with pytest.raises(ConfigError, match=reason):
        export_to_hugging_face(
            MPNetForPretraining(config), tmp_path / "hf", tokenizer=None, overwrite=False
        )
    assert list(tmp_path.iterdir()) == []


def test_refusal_lists_all_reasons_at_once(tmp_path: Path) -> None:
    model = MPNetForPretraining(tiny_config(normalize_before=True, activation_fn="tanh"))
    with pytest.raises(
        ConfigError, match=r"activation_fn is tanh.*; normalize_before is True"
    ) as refusal:
        export_to_hugging_face(model, tmp_path / "hf", tokenizer=None, overwrite=False)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"relative_attention_max_distance": 256, "max_positions": 160},
        {"activation_fn": "relu"},
        {"normalize_before": True},
    ],
)
def test_proof_by_logits_catches_what_the_reasons_would_miss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object]
) -> None:
    monkeypatch.setattr(export, "reasons_not_representable", lambda config: [])
    with pytest.raises(CheckpointError, match="logits differ"):
        exported(tmp_path / "hf", tiny_model(tiny_config(**changes)))
    assert list(tmp_path.iterdir()) == []


def test_model_that_computes_nan_is_not_exported(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.bias[7] = float("nan")
    with pytest.raises(CheckpointError, match="differ from the original's by nan"):
        exported(tmp_path / "hf", model)
    assert list(tmp_path.iterdir()) == []


def test_export_import_export_gives_the_same_bytes(tmp_path: Path) -> None:
    exported(tmp_path / "first")
    config, tensors, notes, *_ = load_any(str(tmp_path / "first"))
    assert notes == []
    again = MPNetForPretraining(config)
    again.load_state_dict(tensors)
    exported(tmp_path / "second", again)
    assert without_card(tmp_path / "first") == without_card(tmp_path / "second")


def test_tied_weights_are_stored_once_and_tied_again_when_opened(tmp_path: Path) -> None:
    exported(tmp_path / "hf")
    names = load_file(tmp_path / "hf" / "model.safetensors").keys()
    assert not any("decoder" in name for name in names)
    theirs = MPNetForMaskedLM.from_pretrained(tmp_path / "hf")
    assert theirs.lm_head.decoder.bias is theirs.lm_head.bias
    assert theirs.lm_head.decoder.weight is theirs.mpnet.embeddings.word_embeddings.weight


def test_configuration_says_what_the_class_would_get_wrong(tmp_path: Path) -> None:
    exported(tmp_path / "hf", tiny_model(tiny_config(dropout=0.25)))
    config = AutoModelForMaskedLM.from_pretrained(tmp_path / "hf").config
    assert config.architectures == ["MPNetForMaskedLM"]
    assert config.layer_norm_eps == 1e-5
    assert config.max_position_embeddings == MAX_POSITIONS + 2
    assert config.hidden_dropout_prob == 0.25
    assert (config.bos_token_id, config.pad_token_id, config.eos_token_id) == (0, 1, 2)


def test_padded_vocabulary_is_cut_back_to_the_tokenizer(tmp_path: Path) -> None:
    model = tiny_model(tiny_config(vocab_size=128)).eval()
    report = exported(tmp_path / "hf", model)
    assert report.vocabulary_cut == 128 - VOCAB_SIZE
    theirs = AutoModelForMaskedLM.from_pretrained(tmp_path / "hf").eval()
    assert theirs.config.vocab_size == VOCAB_SIZE
    input_ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        ours = model.logits(model.encode(input_ids))[..., :VOCAB_SIZE]
        torch.testing.assert_close(theirs(input_ids).logits, ours, atol=1e-5, rtol=0)


@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE - 1, VOCAB_SIZE + 128])
def test_tokenizer_of_another_model_is_refused(tmp_path: Path, vocab_size: int) -> None:
    model = tiny_model(tiny_config(vocab_size=vocab_size))
    with pytest.raises(
        ConfigError, match=f"weights have {vocab_size} tokens, the tokenizer {VOCAB_SIZE}"
    ):
        exported(tmp_path / "hf", model)
    assert list(tmp_path.iterdir()) == []


def test_exported_tokenizer_neither_cuts_nor_pads_and_keeps_all_ids(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    texts = ["The sea, the SEA.", "éa <mask> bing", ""]
    wanted = [tokenizer(text)["input_ids"] for text in texts]
    tokenizer("a", truncation=True, max_length=3, padding="max_length")
    switched_on = copy.deepcopy(tokenizer.backend_tokenizer.truncation)
    assert switched_on is not None
    export_to_hugging_face(tiny_model(), tmp_path / "hf", tokenizer=tokenizer, overwrite=False)
    opened = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert opened.backend_tokenizer.truncation is None
    assert opened.backend_tokenizer.padding is None
    assert opened.model_max_length == MAX_POSITIONS
    # The name that transformers 4 knows.
    described = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert described["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert [opened(text)["input_ids"] for text in texts] == wanted
    assert tokenizer.backend_tokenizer.truncation == switched_on, "the caller's own was changed"


def test_tokenizer_that_changes_when_it_is_saved_fails_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tiny_tokenizer()
    other.add_tokens(["sea"])
    monkeypatch.setattr(export, "write_tokenizer", lambda tokenizer, to: other.save_pretrained(to))
    with pytest.raises(CheckpointError, match="--no-save-tokenizer"):
        exported(tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_longest_text_that_the_tokenizer_allows_fits_the_model(tmp_path: Path) -> None:
    exported(tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    rows = tokenizer("the " * 100, truncation=True, return_tensors="pt")
    assert rows["input_ids"].shape[1] == MAX_POSITIONS
    AutoModelForMaskedLM.from_pretrained(tmp_path / "hf")(**rows)


def test_directory_in_use_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    exported(tmp_path / "hf")
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match="--overwrite"):
        exported(tmp_path / "hf", tiny_model(seed=1))
    assert tree(tmp_path) == before


def test_overwrite_replaces_the_whole_export(tmp_path: Path) -> None:
    export_to_hugging_face(
        tiny_model(), tmp_path / "hf", tokenizer=None, overwrite=False, pytorch_bin=True
    )
    exported(tmp_path / "hf", tiny_model(seed=1), overwrite=True)
    exported(tmp_path / "wanted", tiny_model(seed=1))
    assert without_card(tmp_path / "hf") == without_card(tmp_path / "wanted")
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "wanted"}


@pytest.mark.parametrize("files", [["thesis.tex"], ["config.json", "manifest.json"]])
def test_overwrite_deletes_nothing_but_hugging_face_models(
    tmp_path: Path, files: list[str]
) -> None:
    for name in files:
        (tmp_path / name).write_text("precious")
    with pytest.raises(ConfigError, match="something other than a Hugging Face model"):
        exported(tmp_path, overwrite=True)
    assert tree(tmp_path) == dict.fromkeys(files, b"precious")


def test_empty_directory_is_as_good_as_none_and_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    exported(tmp_path / "empty")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        exported(tmp_path / "file", overwrite=True)


def test_pytorch_bin_opens_in_readers_that_tie_nothing(tmp_path: Path) -> None:
    export_to_hugging_face(
        tiny_model(), tmp_path / "hf", tokenizer=None, overwrite=False, pytorch_bin=True
    )
    weights = torch.load(tmp_path / "hf" / "pytorch_model.bin", weights_only=True)
    (tmp_path / "hf" / "model.safetensors").unlink()
    theirs = MPNetForMaskedLM.from_pretrained(tmp_path / "hf")
    assert weights.keys() == theirs.state_dict().keys()
    _, tensors, *_ = load_any(str(tmp_path / "hf"))
    assert all(torch.equal(each, tensors[name]) for name, each in tiny_model().state_dict().items())


def test_export_leaves_model_and_random_numbers_alone(tmp_path: Path) -> None:
    model = tiny_model().train()
    before, drawn = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    exported(tmp_path / "hf", model)
    assert model.training
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn)


def test_export_in_lower_precision_is_written_in_float32(tmp_path: Path) -> None:
    exported(tmp_path / "hf", tiny_model().bfloat16())
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_export_follows_the_umask_and_keeps_the_console_quiet(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = os.umask(0o022)
    try:
        exported(tmp_path / "hf")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "hf").iterdir()} == {0o644}
    assert (tmp_path / "hf").stat().st_mode & 0o777 == 0o755
    assert capfd.readouterr() == ("", "")


def test_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(WriteError, match="No space left"):
        exported(tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_killed_at_any_moment_the_export_is_absent_old_or_complete(tmp_path: Path) -> None:
    # Imports are slow, so that one process imports, by way of a first export, and then forks a
    # victim for each moment.
    program = textwrap.dedent(
        """
        import json, os, shutil, signal, sys, warnings
        from pathlib import Path
        import torch
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        sys.path[:0] = sys.argv[2].split(os.pathsep)
        from tiny_models import tiny_model, tiny_tokenizer
        from annotated_mpnet.conversion import export_to_hugging_face

        def dying(function, moment):
            calls = 0
            def call(*arguments, **keywords):
                nonlocal calls
                calls += 1
                if calls == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **keywords)
            return call

        folder = Path(sys.argv[1])
        export_to_hugging_face(tiny_model(), folder / "old", tokenizer=None, overwrite=False)
        export_to_hugging_face(
            tiny_model(), folder / "first", tokenizer=tiny_tokenizer(), overwrite=False
        )
        outcomes = []
        for existing, name, moment in json.loads(sys.argv[3]):
            target = folder / f"{existing}-{name}-{moment}"
            if existing:
                shutil.copytree(folder / "old", target)
            if os.fork() == 0:
                setattr(os, name, dying(getattr(os, name), moment))
                export_to_hugging_face(
                    tiny_model(seed=1), target, tokenizer=tiny_tokenizer(), overwrite=existing
                )
                os._exit(0)
            assert os.WTERMSIG(os.wait()[1]) == signal.SIGKILL, (name, moment)
            outcomes.append(sorted(path.name for path in target.glob("*")))
        # What the last victim left behind, the next export clears away.
        export_to_hugging_face(tiny_model(), target, tokenizer=tiny_tokenizer(), overwrite=True)
        assert not [path for path in folder.iterdir() if path.name.endswith(target.name)
                    and path != target]
        print(json.dumps(outcomes))
        """
    )
    old = ["README.md", "config.json", "model.safetensors"]
    whole = [*old, "tokenizer.json", "tokenizer_config.json"]
    # (an older export is there, what is called, for the how many-th time) -> what is there then
    moments: list[tuple[tuple[bool, str, int], list[str]]] = [
        ((False, "mkdir", 1), []),
        ((False, "fsync", 4), []),
        ((False, "rename", 1), []),
        ((True, "fsync", 1), old),
        ((True, "rename", 1), old),
        ((True, "rmdir", 1), whole),
        ((True, "rename", 2), []),
    ]
    here = Path(__file__).parent
    helpers = os.pathsep.join(map(str, (here, here.parent)))
    asked = json.dumps([moment for moment, _ in moments])
    command = [sys.executable, "-c", program, str(tmp_path), helpers, asked]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [left for _, left in moments]


def test_default_architecture_is_representable() -> None:
    assert reasons_not_representable(ModelConfig()) == []
