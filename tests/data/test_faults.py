"""Data faults of the fault matrix (docs/reliability.md), line by line.

no.  fault                                         tested in
9    no text files                                 here
10   empty files, blank lines                      here, test_packing.py
11   bytes that are not UTF-8 in the last file     here, test_sources.py, test_file_formats.py
12   binary files                                  here
13   byte order mark, line ends                    test_sources.py, test_file_formats.py
14   a line of 50 MB                               here (memory), test_tokenising.py (time, loss)
15   circular link, pipe, unreadable file          here, test_sources.py
16   file that changes while it is read            here
17   text shorter than a token                     here, test_collator.py
18   short document among long ones                test_collator.py
19   everything left out                           here (streams: test_streams.py)
20   end of the data, less than a batch            test_loader.py
21   held-out text that is also trained on         test_hold_out.py, here
22   rows without text, no such column             test_file_formats.py
24   data that changed between two runs            here (the fingerprint; refused by the run)
25   another version of `datasets`                 here
26   any number of processes                       here, test_updates.py
28   tokenizer without special tokens              test_tokenizer.py
29   gaps, added tokens, no marks of words         test_tokenizer.py
30   permuted vocabulary of the same size          test_tokenizer.py
31   tokenizer that brings code                    test_tokenizer.py
"""

import gzip
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import toy_tokenizer

from annotated_mpnet.errors import DataError
from annotated_mpnet.mpnet.collator import DataCollatorForMaskedPermutedLanguageModeling
from annotated_mpnet.mpnet.config import ObjectiveConfig
from annotated_mpnet.text.hold_out import split_by_hash
from annotated_mpnet.text.packing import pack_sequences
from annotated_mpnet.text.sequences import PackedSequences
from annotated_mpnet.text.sources import LocalFiles
from annotated_mpnet.text.tokenizer import vocabulary_of
from annotated_mpnet.training.loader import BatchLoader
from batches import hash_of_first_100
from waiting import HUNG

TOKENIZER = toy_tokenizer.word_piece()


def pack(directory: Path, packing: str = "full", **options: int) -> PackedSequences:
    source = LocalFiles.find(directory / "text", "--train-dir")
    return pack_sequences(
        source, TOKENIZER, 16, packing=packing, cache_dir=directory / "cache", **options
    )


@pytest.fixture
def text(tmp_path) -> Path:
    directory = tmp_path / "text"
    directory.mkdir()
    (directory / "a.txt").write_text("tall tale\n")
    (directory / "b.txt").write_text("tale\n")
    return directory


def refused(directory: Path, match: str) -> None:
    """Assert that packing ends with one clear line, and leaves no cache."""
    with pytest.raises(DataError, match=match) as caught:
        pack(directory)
    assert "\n" not in str(caught.value)
    cache = directory / "cache"
    assert not cache.exists() or {file.suffix for file in cache.iterdir()} <= {".lock"}


def test_9_directory_without_text_files_is_refused(tmp_path):
    (tmp_path / "text" / "only" / "directories").mkdir(parents=True)
    refused(tmp_path, "no text files in")
    (tmp_path / "text" / ".hidden.txt").write_text("tall\n")
    (tmp_path / "text" / "picture.png").write_text("tall\n")
    refused(tmp_path, "no text files in")


def test_10_empty_files_are_counted_among_others_and_refused_alone(tmp_path, text):
    (text / "c.txt").write_text("")
    (text / "d.txt").write_text("\n \n")
    counts = pack(tmp_path).report.counts
    assert (counts.files, counts.empty_files, counts.blank_lines) == (4, 2, 2)
    for name in ("a.txt", "b.txt"):
        (text / name).unlink()
    with pytest.raises(DataError, match=r"no text in .*c.txt' and 1 more files: 0 documents"):
        pack(tmp_path)


def test_11_bytes_that_are_not_utf8_in_the_last_file_are_found_before_training(tmp_path, text):
    (text / "c.txt").write_bytes(b"tall\n\xff\xfe\n")
    refused(tmp_path, r"c.txt' is not UTF-8: line 2, byte 5 of the file is 0xff")


@pytest.mark.parametrize(
    "content",
    [
        np.random.default_rng(0).bytes(4096),
        "tall tale\n".encode("utf-16-le"),
        gzip.compress(np.random.default_rng(0).bytes(4096)),
    ],
    ids=["random", "UTF-16 without a mark", "random, compressed"],
)
def test_12_binary_files_are_refused(tmp_path, text, content):
    (text / "c.txt").write_bytes(content)
    refused(tmp_path, r"c.txt' is not (UTF-8|text): line \d+, byte \d+")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("tall tale\n".encode("utf-16"), "is UTF-16; .*iconv -f UTF-16 -t UTF-8"),
        ("tall tale\n".encode("utf-32"), "is UTF-32; .*iconv -f UTF-32 -t UTF-8"),
        (b"\xfe\xff\0t\0a", "is UTF-16"),
        (b"PK\x03\x04rest", "is a zip archive .*unpack it"),
        (b"%PDF-1.7 rest", "is a PDF file"),
        (b"PAR1rest", r"is a Parquet file; give it the ending \.parquet"),
        (b"ARROW1\0\0", r"is an Arrow file; give it the ending \.arrow"),
    ],
)
def test_12_a_file_says_what_it_is_by_its_first_bytes(tmp_path, text, content, said):
    (text / "c.txt").write_bytes(content)
    refused(tmp_path, f"c.txt' {said}")


def test_a_search_takes_no_file_of_a_run_a_checkpoint_a_tokenizer_or_a_model(tmp_path, text):
    before = LocalFiles.find(text, "--train-dir")
    for names, vocabulary in (
        (("run/config.toml", "run/environment.json", "run/metrics.jsonl"), "run/log.txt"),
        (("run2/metrics.jsonl", "run2/environment.json"), "run2/log.txt"),
        (("run/checkpoint5/state.json", "run/checkpoint5/manifest.json"), "run/checkpoint5/a.txt"),
        (("tok/tokenizer_config.json", "tok/tokenizer.json"), "tok/vocab.txt"),
        (("hf/config.json", "hf/model.safetensors"), "hf/merges.txt"),
        # The run and the tokenizer are in the directory of the text.
        (("environment.json", "config.toml", "tokenizer_config.json"), "vocab.txt"),
        (("log.txt", "metrics.jsonl", "checkpoint5/state.json", "checkpoint5/manifest.json"), ""),
    ):
        for name in filter(None, [*names, vocabulary]):
            (text / name).parent.mkdir(parents=True, exist_ok=True)
            (text / name).write_text('{"step": 1}\n')
    after = LocalFiles.find(text, "--train-dir")
    assert after.paths == before.paths
    assert after.fingerprint == before.fingerprint
    assert after.skipped_files > before.skipped_files == 0


MEASURE = """
import resource, sys
from pathlib import Path
import toy_tokenizer
from annotated_mpnet.text.packing import pack_sequences
used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
tokenizer = toy_tokenizer.word_piece()
directory = Path(sys.argv[1])
(directory / "small.txt").write_text("tall tale")
pack_sequences([directory / "small.txt"], tokenizer, 512, cache_dir=directory)
before = used()
sequences = pack_sequences([directory / "large.txt"], tokenizer, 512, cache_dir=directory)
print(used() - before, sequences.report.tokens)
"""


def test_14_a_long_line_takes_memory_for_its_text_and_not_for_its_tokens(tmp_path):
    # A line of 5 MB, 1.4 million tokens, takes 135 MB; tokenised in one piece, it would be 654 MB.
    (tmp_path / "large.txt").write_text("tall tale a b " * (5 * 10**6 // 14))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=HUNG,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
    )
    megabytes, tokens = done.stdout.split()
    assert int(tokens) == 4 * (5 * 10**6 // 14)
    assert float(megabytes) < 300


def test_15_what_is_called_a_text_and_is_none_is_refused_without_waiting(tmp_path, text):
    for make in (
        os.mkfifo,
        lambda path: path.symlink_to(text / "nowhere"),
        lambda path: path.symlink_to(path),
    ):
        path = text / "c.txt"
        make(path)
        refused(tmp_path, r"c.txt' has the name of a text but is not a regular file")
        path.unlink()


def test_15_file_that_may_not_be_read_is_refused(tmp_path, text, monkeypatch):
    real = Path.open

    def without_permission(path: Path, *arguments: object) -> object:
        if path.name == "b.txt":
            raise PermissionError(13, "Permission denied")
        return real(path, *arguments)

    # Not by chmod, because tests may run as root, who may read everything.
    monkeypatch.setattr(Path, "open", without_permission)
    refused(tmp_path, r"b.txt' cannot be read: Permission denied")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.write_text("tall tall\n"), "changed while it was read"),
        (lambda file: os.truncate(file, 3), "changed while it was read"),
        (lambda file: file.write_text(file.read_text() + "more\n"), "changed while it was read"),
        (lambda file: file.unlink(), "cannot be read: No such file"),
    ],
    ids=["written", "cut off", "grown", "deleted"],
)
def test_16_file_that_changes_while_it_is_read_is_refused_by_name(tmp_path, text, change, message):
    source = LocalFiles.find(text, "--train-dir")
    assert source.fingerprint
    change(text / "b.txt")
    with pytest.raises(DataError, match=rf"b.txt' {message}"):
        pack_sequences(source, TOKENIZER, 16, cache_dir=tmp_path / "cache")


def test_17_text_without_a_predictable_token_is_dropped_and_counted(tmp_path, text):
    (text / "c.txt").write_text("ç\n\u200b\né é\n")
    for packing in ("full", "none", "documents"):
        report = pack(tmp_path, packing).report
        assert (report.dropped_documents, report.tokens) == (3, 3)


def test_19_text_of_which_nothing_is_left_is_refused(tmp_path, text):
    for file in text.iterdir():
        file.write_text("ç\né\n")
    refused(tmp_path, "nothing to predict in the 4 documents that were read")


def test_21_parts_of_files_share_no_text_for_any_number_of_processes(tmp_path, text):
    lines = [f"{'tall ' * (i % 5)}{'a ' * (i // 5)}tale" for i in range(100)]
    (text / "c.txt").write_text("\n".join(lines + lines[::3]))
    parts = split_by_hash(LocalFiles.find(text, "--train-dir"), 0.2)

    def packed(workers: int) -> list[set[tuple[int, ...]]]:
        cache = tmp_path / f"cache of {workers}"
        tables = [
            pack_sequences(
                part, TOKENIZER, 64, packing="none", num_workers=workers, cache_dir=cache
            )
            for part in parts
        ]
        return [
            {tuple(each) for each in sequences.take(np.arange(len(sequences)))}
            for sequences in tables
        ]

    train, valid = packed(workers=1)
    assert train.isdisjoint(valid)
    assert len(valid) > 1
    assert len(train) + len(valid) == 100
    assert packed(workers=2) == [train, valid]


def test_24_every_change_of_the_data_changes_the_fingerprint(tmp_path, text):
    fingerprints = [pack(tmp_path).fingerprint]
    changes = [
        lambda: (text / "a.txt").write_text("tall talk\n"),
        lambda: (text / "c.txt").write_text("tall\n"),
        lambda: (text / "c.txt").rename(text / "0.txt"),
    ]
    for change in changes:
        change()
        fingerprints.append(pack(tmp_path).fingerprint)
    fingerprints += [pack(tmp_path, packing).fingerprint for packing in ("none", "documents")]
    assert len(set(fingerprints)) == 6
    # Neither dates nor the location count.
    os.utime(text / "a.txt", (0, 0))
    moved = text.rename(tmp_path / "elsewhere")
    source = LocalFiles.find(moved, "--train-dir")
    again = pack_sequences(source, TOKENIZER, 16, cache_dir=tmp_path / "cache")
    assert again.fingerprint == fingerprints[3]


GOLDEN = {
    "full": "39bfd12250343336",
    "none": "e99d00fb75d3c38d",
    "documents": "acd55f876a2ab953",
}
"""Hashes of the first 100 batches of the text below. If they change, every user's batches do: write
it into the log, and raise `packing.FORMAT` if the sequences changed."""


@pytest.mark.parametrize("packing", GOLDEN)
@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_25_26_first_100_batches_are_the_golden_ones_for_any_number_of_processes(
    tmp_path, monkeypatch, packing, num_workers
):
    monkeypatch.setattr("annotated_mpnet.text.tokenization.TOKENISED_AT_ONCE", 16)
    (tmp_path / "text").mkdir()
    words = ["tall", "tale", "mask", "un", "bel", "a", "<mask>", "ç"]
    generator = np.random.Generator(np.random.Philox(1))
    lines = (
        " ".join(words[i] for i in generator.integers(0, len(words), size=length))
        for length in generator.integers(1, 30, size=300)
    )
    (tmp_path / "text" / "a.txt").write_text("\n".join(lines))
    collator = DataCollatorForMaskedPermutedLanguageModeling(
        vocabulary_of(TOKENIZER), ObjectiveConfig(), 16, seed=12345, packing=packing
    )
    sequences = pack(tmp_path, packing, num_workers=num_workers)
    loader = BatchLoader(sequences, collator, batch_size=8, seed=12345)
    assert hash_of_first_100(loader) == GOLDEN[packing]
