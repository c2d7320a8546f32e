"""Several tokenising processes: what a signal, a kill or an error in one of them does."""

import errno
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import toy_tokenizer

from annotated_mpnet.errors import OutOfMemoryError, WriteError
from annotated_mpnet.signals import Stopped, listening
from annotated_mpnet.text import packing, tokenization
from annotated_mpnet.text.packing import pack_sequences
from waiting import HUNG

WRITE_SHARE = tokenization._write_share


def pack(directory: Path) -> None:
    """Pack a text with two processes, and check that none is left."""
    (directory / "a.txt").write_text("tall tale\n" * 20)
    try:
        pack_sequences(
            [directory / "a.txt"],
            toy_tokenizer.word_piece(),
            8,
            num_workers=2,
            cache_dir=directory / "cache",
        )
    finally:
        assert multiprocessing.active_children() == []
        left = {path.suffix for path in (directory / "cache").iterdir()}
        assert left <= {".lock", ".arrow"}


def in_the_second(monkeypatch: pytest.MonkeyPatch, what: Callable[[], object]) -> None:
    """Call a function in the second process, in the middle of its share."""

    def write_share(source: object, target: Path, to_tokens: object) -> Iterator[int]:
        for done in WRITE_SHARE(source, target, to_tokens):
            if target.name.endswith("1"):
                what()
            yield done

    monkeypatch.setattr(tokenization, "_write_share", write_share)
    monkeypatch.setattr(tokenization, "TOKENISED_AT_ONCE", 2)


def never_ends() -> None:
    threading.Event().wait()


def test_27_a_process_that_is_killed_ends_the_run_with_one_line(tmp_path, monkeypatch):
    in_the_second(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(OutOfMemoryError, match=r"exit code -9.*--num-workers 1"):
        pack(tmp_path)
    monkeypatch.undo()
    pack(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_50_a_signal_to_the_group_stops_all_processes(tmp_path, monkeypatch, number):
    def ctrl_c() -> None:
        os.kill(os.getpid(), number)
        os.kill(os.getppid(), number)
        os.kill(os.getppid(), number)
        never_ends()

    in_the_second(monkeypatch, ctrl_c)
    with pytest.raises(Stopped) as caught, listening():
        pack(tmp_path)
    assert caught.value.number == number


def test_a_signal_to_one_of_the_processes_changes_nothing(tmp_path, monkeypatch):
    in_the_second(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGTERM))
    pack(tmp_path)


def test_a_full_disk_in_one_of_the_processes_is_a_write_error(tmp_path, monkeypatch):
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    in_the_second(monkeypatch, full)
    with pytest.raises(WriteError, match="No space left on device"):
        pack(tmp_path)


def test_a_bug_in_one_of_the_processes_keeps_its_traceback(tmp_path, monkeypatch):
    in_the_second(monkeypatch, lambda: {}["nothing"])
    with pytest.raises(KeyError) as caught:
        pack(tmp_path)
    assert "in_the_second" in caught.value.__notes__[0]


def test_52_processes_end_with_their_parent(tmp_path, monkeypatch):
    alive, their_end = os.pipe()
    begun, say_begun = os.pipe()

    def hang() -> None:
        os.write(say_begun, b".")
        never_ends()

    in_the_second(monkeypatch, hang)
    parent = multiprocessing.get_context("fork").Process(target=pack, args=(tmp_path,))
    parent.start()
    os.close(their_end)
    os.read(begun, 1)
    parent.kill()
    parent.join()
    # The pipe ends when no process is left to write to it.
    ended = threading.Thread(target=os.read, args=(alive, 1), daemon=True)
    ended.start()
    ended.join(HUNG)
    assert not ended.is_alive()


def test_of_two_runs_that_pack_the_same_text_one_packs_and_the_other_uses_its_cache(
    tmp_path, monkeypatch
):
    (tmp_path / "a.txt").write_text("tall tale\n" * 20)
    begun, say_begun = os.pipe()
    go_on, say_go_on = os.pipe()
    packed = packing._pack

    def pack_when_told(*arguments: object) -> None:
        os.write(say_begun, b".")
        os.read(go_on, 1)
        packed(*arguments)

    def pack_alone() -> None:
        tokenizer = toy_tokenizer.word_piece()
        pack_sequences([tmp_path / "a.txt"], tokenizer, 8, cache_dir=tmp_path / "cache")

    monkeypatch.setattr(packing, "_pack", pack_when_told)
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=pack_alone) for _ in range(2)]
    for process in both:
        process.start()
    os.read(begun, 1)
    # If the second one packed too, it would find `go_on` closed, and report that it had begun.
    os.write(say_go_on, b".")
    os.close(say_go_on)
    os.close(say_begun)
    for process in both:
        process.join(HUNG)
    assert [process.exitcode for process in both] == [0, 0]
    assert os.read(begun, 1) == b""
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".lock", ".arrow"}
