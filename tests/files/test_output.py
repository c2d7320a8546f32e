"""A command may replace only its own output."""

from pathlib import Path

import pytest

from annotated_mpnet.errors import ConfigError, WriteError
from annotated_mpnet.files.output import (
    HUGGING_FACE_MODEL,
    TOKENIZER,
    output_directory,
    refuse_to_replace,
)
from folders import tree


def write(output: Path, *, overwrite: bool = False, inputs: tuple[Path, ...] = ()) -> None:
    with output_directory(output, TOKENIZER, overwrite=overwrite, inputs=inputs) as staging:
        (staging / "tokenizer.json").write_text("new")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenizer.json").write_text("old")
    return tmp_path / "out"


def test_overwrite_replaces_the_commands_own_output(out: Path) -> None:
    (out / "tokenizer_config.json").touch()
    with pytest.raises(ConfigError, match="not empty"):
        write(out)
    write(out, overwrite=True)
    assert tree(out.parent) == {"out/tokenizer.json": b"new"}


FOREIGN = {
    "another file": lambda out: (out / "thesis.tex").touch(),
    "a hidden file": lambda out: (out / ".notes").touch(),
    "a directory": lambda out: (out / "deep").mkdir(),
    "a directory with a known name": lambda out: (out / "vocab.txt").mkdir(),
    "a link with a known name": lambda out: (out / "vocab.txt").symlink_to(out / "tokenizer.json"),
    "a model": lambda out: (out / "config.json").touch(),
    "a known name and no tokenizer": lambda out: (out / "tokenizer.json").rename(out / "vocab.txt"),
    "what a killed process would not leave": lambda out: (
        (out.parent / ".old-out").mkdir(),
        (out.parent / ".old-out" / "mine").touch(),
    ),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_anything_else_in_the_directory_is_a_refusal(out: Path, what: str) -> None:
    FOREIGN[what](out)
    before = tree(out.parent)
    with pytest.raises(ConfigError, match="something other than a tokenizer"):
        write(out, overwrite=True)
    assert tree(out.parent) == before


def test_a_refusal_names_three_entries_and_counts_the_rest(out: Path) -> None:
    for name in ("a", "b", "c", "d", "e"):
        (out / name).touch()
    with pytest.raises(ConfigError, match="'a', 'b', 'c' and 2 more"):
        write(out, overwrite=True)


def test_files_that_appear_while_the_command_runs_are_not_deleted(out: Path) -> None:
    def interfered() -> None:
        with output_directory(out, TOKENIZER, overwrite=True) as staging:
            (staging / "tokenizer.json").touch()
            (out / "thesis.tex").touch()

    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        interfered()
    assert set(tree(out.parent)) == {"out/tokenizer.json", "out/thesis.tex"}


def test_links_are_followed_to_free_directories_only(out: Path) -> None:
    folder = out.parent
    (folder / "empty").mkdir()
    for name, target in {"free": "empty", "taken": "out", "nowhere": "x", "file": "out/f"}.items():
        (folder / name).symlink_to(folder / target)
    write(folder / "free")
    assert (folder / "empty" / "tokenizer.json").exists()
    assert (folder / "free").is_symlink()
    with pytest.raises(ConfigError, match="is a link"):
        write(folder / "taken", overwrite=True)
    for name in ("nowhere", "file"):
        with pytest.raises(ConfigError, match="is a file"):
            write(folder / name, overwrite=True)


def test_inputs_are_not_replaced_under_any_name(out: Path) -> None:
    text = out / "vocab.txt"
    text.write_text("a text")
    link = out.parent / "link.txt"
    link.symlink_to(text)
    for read in (text, link, out, out / ".." / "out" / "vocab.txt"):
        with pytest.raises(ConfigError, match="which is read"):
            write(out, overwrite=True, inputs=(read,))
    write(out, overwrite=True, inputs=(out.parent / "other.txt",))


def test_a_checkpoint_is_not_written_into(out: Path) -> None:
    for name in ("manifest.json", "state.json"):
        (out.parent / name).touch()
    with pytest.raises(ConfigError, match="inside the checkpoint"):
        write(out, overwrite=True)


def test_the_current_directory_is_filled_and_stays_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    monkeypatch.chdir(inside)
    write(Path())
    assert Path.cwd() == inside
    assert tree(tmp_path) == {"inside/tokenizer.json": b"new"}
    with pytest.raises(ConfigError, match="not empty"):
        write(Path())
    with pytest.raises(ConfigError, match="current directory"):
        write(Path(), overwrite=True)
    with pytest.raises(ConfigError, match="something other"):
        write(Path(".."), overwrite=True)
    with pytest.raises(ConfigError, match="mount point"):
        write(Path("/"), overwrite=True)


def test_a_place_that_cannot_be_written_is_an_error_of_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for output in (tmp_path / "file" / "out", tmp_path / "new" / ("x" * 300)):
        with pytest.raises(WriteError, match="could not be written") as caught:
            write(output)
        assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


def test_kinds_differ_in_what_they_hold(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).touch()
    refuse_to_replace(tmp_path, HUGGING_FACE_MODEL, overwrite=True)
    with pytest.raises(ConfigError):
        refuse_to_replace(tmp_path, TOKENIZER, overwrite=True)
