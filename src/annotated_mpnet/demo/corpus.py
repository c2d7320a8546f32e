"""The demo's text: six novels by Jane Austen, split by book.

By book, not by paragraph: a model that saw half of "Emma" knows that "Frank" is followed by
"Churchill", in 151 of 185 places, and in the other half that would count as knowing English.

>>> def novel(name):
...     packed = resources.files("annotated_mpnet.demo") / "austen" / f"{name}.txt.xz"
...     return lzma.decompress(packed.read_bytes()).decode()
>>> emma = novel("emma")
>>> emma.count("Frank Churchill"), emma.count("Frank "), novel(VALID).count("Frank ")
(151, 185, 0)

    training      Emma, Mansfield Park, Pride and Prejudice, Sense and Sensibility
    validation    Northanger Abbey      chooses the best checkpoint
    test          Persuasion            is looked at once, at the end

The novels come with the package (`austen/PROVENANCE.md` says from where), a paragraph per line, so
`make demo` needs no network. They are written out as ordinary files and read like any other text.
"""

import lzma
from importlib import resources
from pathlib import Path

from annotated_mpnet.errors import WriteError
from annotated_mpnet.files.atomic import write_if_changed

TRAIN = ("emma", "mansfieldpark", "prideprejudice", "sensesensibility")
VALID = "northangerabbey"
TEST = "persuasion"

DIRECTORY = Path("checkpoints/demo-text")
"""Where the preset `demo` expects the novels and the tokenizer; `presets/demo.toml` names the same
paths."""


def unpack(directory: Path) -> None:
    """Write the novels as `train/*.txt`, `valid.txt` and `test.txt` below a directory.

    A file that has the right bytes is left alone, so the packed text is found in the cache, and a
    demo that reads it at this moment is not disturbed. Others of these names are replaced.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     unpack(Path(folder))
    ...     files = sorted(path for path in Path(folder).rglob("*.txt"))
    ...     print(*(path.relative_to(folder) for path in files), sep="\\n")
    test.txt
    train/emma.txt
    train/mansfieldpark.txt
    train/prideprejudice.txt
    train/sensesensibility.txt
    valid.txt

    Raises:
        WriteError: the directory cannot be written.
    """
    targets = {name: directory / "train" / f"{name}.txt" for name in TRAIN}
    targets |= {VALID: directory / "valid.txt", TEST: directory / "test.txt"}
    # Not by `__file__`: a package may also lie in a zip archive.
    packed = resources.files("annotated_mpnet.demo") / "austen"
    try:
        (directory / "train").mkdir(parents=True, exist_ok=True)
        for name, target in targets.items():
            novel = lzma.decompress((packed / f"{name}.txt.xz").read_bytes())
            write_if_changed(target, novel)
    except OSError as error:
        raise WriteError(
            f"cannot write the demo's text to {directory}: {error.strerror}; start the demo in a "
            "directory that you can write to"
        ) from error
