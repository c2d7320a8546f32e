"""`train-mpnet-tokenizer`: find the text, learn, say how well the result fits."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from annotated_mpnet.errors import ConfigError
from annotated_mpnet.files.output import TOKENIZER, refuse_to_replace
from annotated_mpnet.mpnet.config import check_ranges
from annotated_mpnet.settings.commands import TokenizerCommand
from annotated_mpnet.settings.config import DataConfig
from annotated_mpnet.streams.sample import write_sample
from annotated_mpnet.text.learn_tokenizer import check_vocab_size, train_tokenizer_files


def learn_tokenizer(command: TokenizerCommand) -> None:
    """Learn a tokenizer from files or from the beginning of a dataset, and write it.

    Raises:
        ConfigError: the settings contradict each other, or the directory may not be replaced.
        DataError: the text cannot be read, or there is none.
        WriteError: the directory cannot be written.
    """
    try:
        check_ranges(command)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if not command.files and not command.dataset_name:
        raise ConfigError(
            "FILES is missing; expected text files or directories of them, or a --dataset-name; "
            "see train-mpnet-tokenizer --help"
        )
    if command.files and command.dataset_name:
        raise ConfigError(
            f"FILES {command.files[0]} and --dataset-name {command.dataset_name} exclude each "
            "other; give one source of text"
        )
    # Before anything is downloaded.
    check_vocab_size(command.vocab_size, command.model)
    refuse_to_replace(command.output, TOKENIZER, overwrite=command.overwrite)
    if command.files:
        print(_learn(command, command.files))
        return
    with TemporaryDirectory() as folder:
        data = DataConfig(
            dataset_name=command.dataset_name,
            dataset_config=command.dataset_config,
            dataset_split=command.dataset_split,
            dataset_revision=command.dataset_revision,
            text_field=command.text_field,
        )
        sample = Path(folder, "sample.jsonl")
        print(write_sample(data, command.dataset_documents, sample))
        print(_learn(command, [sample]).partition("\n")[2])


def _learn(command: TokenizerCommand, text: Sequence[Path]) -> str:
    return train_tokenizer_files(
        text,
        command.vocab_size,
        command.output,
        model=command.model,
        lowercase=command.lowercase,
        strip_accents=command.strip_accents,
        overwrite=command.overwrite,
        text_field=command.text_field,
    )
