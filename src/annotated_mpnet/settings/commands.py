"""What each command can be told: a field is a flag, its docstring the help.

    pretrain-mpnet          PretrainCommand      text            -> model
    convert-to-hf           ConvertCommand       checkpoint      -> Hugging Face model
    train-mpnet-tokenizer   TokenizerCommand     text            -> tokenizer
    explain-mpnet           ExplainCommand       sentence        -> what the model sees of it

The settings of a run are in `settings/config.py`: they are saved in the run's `config.toml` and
hold again when the run is resumed. The fields here, such as `--dry-run`, are not saved.

The docstring of a class is the first thing that `--help` shows.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from annotated_mpnet.mpnet.config import ObjectiveConfig, option
from annotated_mpnet.settings.config import PretrainingConfig
from annotated_mpnet.settings.config_file import Preset


@dataclass(frozen=True, kw_only=True)
class PretrainCommand:
    """Pretrain MPNet on your own text, from scratch to a verified Hugging Face model.

        To see it work:         pretrain-mpnet --preset demo
        On your text:           pretrain-mpnet --train-dir DIR --tokenizer-name DIR
        What it would do:       the same command, with --dry-run
        After an interruption:  the same command, with --resume

    Flags may be written with dashes or underscores. Every user error is one line and an exit code.
    """

    preset: Literal[Preset, "list"] | None = None
    """Start from the settings of a preset, from a two-minute demo to MPNet-base. A shorter
    --total-updates shortens its warm-up in proportion, unless --warmup-updates is given. list: show
    all presets with their cost and expected loss, and exit."""
    config: Path | None = None
    """Take settings from a file, TOML or YAML (.yaml or .yml), such as the config.toml of an
    earlier run. The command line overrides the file, and the file overrides the preset."""
    print_config: bool = False
    """Print all settings with their explanations, as TOML for --config, and exit."""
    dry_run: bool = False
    """Build everything, run one batch, print the plan (device, parameters, tokens per update,
    memory, time), and exit without starting a run. Worth a minute before a run of hours."""
    settings: PretrainingConfig = field(default_factory=PretrainingConfig)
    # What parsing has changed, for the plan. Not a flag: it has no docstring.
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ConvertCommand:
    """Turn a checkpoint into a Hugging Face MPNetForMaskedLM, and check that it is the same model.

    The result is loaded again and its logits are compared with the checkpoint's. If they differ by
    more than 1e-4, the command fails and writes nothing. A sentence encoder keeps its modules, so
    sentence-transformers computes the same vectors.
    """

    mpnet_checkpoint_path: Path
    """A checkpoint, a run's directory (its best model is converted), a model of Hugging Face or of
    sentence-transformers (directory or Hub name), or a .pt file of annotated-mpnet or of
    Microsoft's code."""
    hf_model_folder_path: Path
    """The directory to write."""
    save_tokenizer: bool = True
    """Also write the tokenizer's files, to make the directory complete."""
    overwrite: bool = False
    """Replace the directory if it holds a Hugging Face model and nothing else. Otherwise, a
    directory that is not empty is an error."""
    pytorch_bin: bool = False
    """Also write pytorch_model.bin, for old readers."""
    push_to_hub: str | None = None
    """Also upload the result to this repository of the Hugging Face Hub, OWNER/NAME; it is made if
    there is none. It takes a token that may write: `hf auth login`, or HF_TOKEN. An older export
    there is replaced, with its README.md; the repository's history keeps it."""
    private: bool = False
    """Make the repository of --push-to-hub private, if it is made now. Default: public."""
    debug: bool = False
    """Write a debug log to standard error, including the libraries' messages and the traceback of
    an error."""


TokenizerModel = Literal["wordpiece", "bpe", "unigram"]


@dataclass(frozen=True, kw_only=True)
class TokenizerCommand:
    """Learn a tokenizer from text, for any language, with MPNet's special tokens.

        From files:    train-mpnet-tokenizer FILES --output DIR
        From the Hub:  train-mpnet-tokenizer --dataset-name NAME --output DIR

    The special tokens are `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, and `<mask>` at the end. Vowel
    signs and other marks of Indic scripts, Thai and Japanese are always kept. At the end it says
    how many tokens a word takes and how much of the text is unknown.
    """

    files: tuple[Path, ...] = ()
    """Text: files or directories, in the formats of --train-dir."""
    vocab_size: int = 30527
    """Number of tokens, at most 10000000, special tokens included; at least 64, 300 (bpe) or 400
    (unigram). MPNet has 30527; use fewer for a small text."""
    model: TokenizerModel = "wordpiece"
    """wordpiece: as BERT and MPNet; a word with a letter that is not in the vocabulary is unknown.
    bpe: bytes, as RoBERTa; nothing is unknown, and any text comes back exactly. unigram: as
    SentencePiece and XLM-R; rare letters are spelled in bytes, so nothing is unknown. For text
    without spaces, unigram."""
    lowercase: bool | None = None
    """Read all text in lower case. Default: yes with wordpiece, no with bpe and unigram."""
    strip_accents: bool | None = None
    """Remove the accents of Latin and Greek letters (é is read as e). No other marks are ever
    removed. Default: the same as --lowercase."""
    dataset_name: str | None = None
    """Learn from a dataset: a name on the Hub, which is streamed, or a folder of data files.
    Excludes FILES."""
    dataset_config: str | None = None
    """Configuration (subset) of the dataset, if it has several."""
    dataset_split: str = "train"
    """Split of the dataset."""
    dataset_revision: str | None = None
    """Commit, tag or branch of the dataset. Default: the newest commit."""
    dataset_documents: int = option(100000, at_least=1, at_most=10**9)
    """Documents to read, from the beginning of the dataset. More hardly change the vocabulary."""
    text_field: str = "text"
    """Column that holds the text, in datasets and in .jsonl, .parquet and .csv files."""
    output: Path
    """The directory to write. Pass it to pretrain-mpnet as --tokenizer-name."""
    overwrite: bool = False
    """Replace the directory if it holds a tokenizer and nothing else. Otherwise, a directory that
    is not empty is an error."""
    debug: bool = False
    """Write a debug log to standard error, including the libraries' messages and the traceback of
    an error."""


@dataclass(frozen=True, kw_only=True)
class ExplainCommand:
    """Show what MPNet is given for a sentence, and what each position of it may see.

        To see it work:  explain-mpnet "The cat sat on the mat."
        Chosen words:    explain-mpnet "The cat sat on the mat." --predict sat,mat
        As a page:       explain-mpnet "The cat sat on the mat." --html cat.html
        With a model:    explain-mpnet "The cat sat on the mat." --checkpoint DIR

    Everything is computed by the functions that training uses. A model adds its guesses and what it
    attends to.
    """

    sentence: tuple[str, ...]
    """The sentence, at most 128 tokens. Without quotes, its words are joined with spaces."""
    predict: str | None = None
    """The words to predict, in this order, separated by commas. A word that the sentence has twice
    may be given twice; a number is a position. Default: a random choice, as in training."""
    checkpoint: str | None = None
    """A model to ask: a checkpoint, a run's directory (its best model), a model of Hugging Face or
    of sentence-transformers (directory or Hub name), or a .pt file of annotated-mpnet or of
    Microsoft's code. It brings its tokenizer."""
    tokenizer_name: str | None = option(None, aliases=("--tokenizer",))
    """A tokenizer: a directory or a Hub name. Default: the checkpoint's; without a checkpoint, each
    word and punctuation mark is a token, which needs no file."""
    seed: int = option(12345, at_least=0, at_most=2**63 - 1)
    """Decides which tokens are predicted, in which order, and what replaces them."""
    html: Path | None = None
    """Write an interactive page: one file that needs no network."""
    png: Path | None = None
    """Write a picture of who sees whom. Needs matplotlib: the extra annotated-mpnet[plot]."""
    overwrite: bool = False
    """Replace the files of --html and --png, if this command wrote them. Otherwise, a file that
    exists is an error."""
    debug: bool = False
    """Write a debug log to standard error, including the libraries' messages and the traceback of
    an error."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
