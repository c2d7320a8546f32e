"""Files and directories that are written completely or not at all."""

import os
from pathlib import Path

import pytest

from annotated_mpnet.files.atomic import replacing, write_file
from folders import names_in


def fill(directory: Path, text: str) -> None:
    (directory / "inner").mkdir(parents=True)
    (directory / "inner" / "file").write_text(text)


@pytest.mark.parametrize("taken", ["no", "empty", "yes"])
def test_a_directory_gets_its_name_when_it_is_complete(tmp_path: Path, taken: str) -> None:
    target = tmp_path / "name"
    if taken != "no":
        target.mkdir()
    if taken == "yes":
        fill(target, "old")
        (target / "only in the old one").touch()
    with replacing(target) as staging:
        fill(staging, "new")
        assert (target / "inner").exists() == (taken == "yes")
    assert names_in(tmp_path) == {"name"}
    assert names_in(target) == {"inner"}
    assert (target / "inner" / "file").read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_everything_as_it_was(tmp_path: Path, error: type[BaseException]) -> None:
    fill(tmp_path / "name", "old")

    def interrupted() -> None:
        with replacing(tmp_path / "name") as staging:
            fill(staging, "new")
            raise error

    with pytest.raises(error):
        interrupted()
    assert names_in(tmp_path) == {"name"}
    assert (tmp_path / "name" / "inner" / "file").read_text() == "old"


def test_a_failed_rename_gives_the_old_directory_its_name_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "name", "old")
    rename = os.rename

    def fail(source: Path, target: Path) -> None:
        if Path(source).name == ".tmp-name":
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="no"), replacing(tmp_path / "name") as staging:
        fill(staging, "new")
    assert names_in(tmp_path) == {"name"}
    assert (tmp_path / "name" / "inner" / "file").read_text() == "old"


def test_what_a_killed_process_left_over_is_removed(tmp_path: Path) -> None:
    fill(tmp_path / "name", "old")
    fill(tmp_path / ".tmp-name", "half")
    fill(tmp_path / ".old-name", "older")
    with replacing(tmp_path / "name") as staging:
        assert names_in(staging) == set()
        fill(staging, "new")
    assert names_in(tmp_path) == {"name"}


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    write_file(file, b"old")

    def full(self: Path, data: bytes) -> int:
        self.write_text("a part")
        raise OSError("full")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="full"):
        write_file(file, b"new")
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]
