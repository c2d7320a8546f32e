"""The demo's text: six novels by Jane Austen, split by book.

By book, because a split by paragraph would let the model see, in training, the very names and turns
of the novel that it is validated on. (Where the text comes from: `austen/PROVENANCE.md`.) No copies
are needed for that. Who has read half of "Emma" knows that it says "Churchill" behind "Frank", in
151 of 185 places, and in the other half that would count as knowing English.

>>> def novel(name):
...     packed = resources.files("annotated_mpnet.demo") / "austen" / f"{name}.txt.xz"
...     return lzma.decompress(packed.read_bytes()).decode()
>>> emma = novel("emma")
>>> emma.count("Frank Churchill"), emma.count("Frank "), novel(VALID).count("Frank ")
(151, 185, 0)

    training      Emma, Mansfield Park, Pride and Prejudice, Sense and Sensibility
    validation    Northanger Abbey      chooses the best checkpoint
    test          Persuasion            is looked at once, at the end

The novels come with the package, a paragraph a line, so that `make demo` needs no network: 4.0 MB,
which xz makes 1.2 MB of.

>>> sum(len(novel(name).encode()) for name in (*TRAIN, VALID, TEST)) // 100_000 / 10
4.0

They are written out as ordinary files, and trained on like anybody's: the demo has no way of its
own to read text, and shows what happens to yours.

Next: `show.py`, which trains on it.
"""

import lzma
from importlib import resources
from pathlib import Path

from annotated_mpnet.errors import WriteError

TRAIN = ("emma", "mansfieldpark", "prideprejudice", "sensesensibility")
VALID = "northangerabbey"
TEST = "persuasion"

DIRECTORY = Path("checkpoints/demo-text")
"""Where the preset `demo` expects the novels and the tokenizer, below the working directory. The
same paths stand in `presets/demo.toml`, which is read like any other configuration."""


def unpack(directory: Path) -> None:
    """Write the novels as `train/*.txt`, `valid.txt` and `test.txt` below a directory.

    What lies there under these names is replaced, by the same bytes if it is of a former demo: then
    the cache of packed text knows them (`text/packing.py`), and nothing is tokenised again.

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

    Args:
        directory: is made if it is missing.

    Raises:
        WriteError: the directory cannot be written.
    """
    # Directories decide what is trained on: whatever lies under `train/` is, and only that.
    targets = {name: directory / "train" / f"{name}.txt" for name in TRAIN}
    targets |= {VALID: directory / "valid.txt", TEST: directory / "test.txt"}
    # Not by `__file__`: a package may also lie in a zip archive.
    packed = resources.files("annotated_mpnet.demo") / "austen"
    try:
        (directory / "train").mkdir(parents=True, exist_ok=True)
        for name, target in targets.items():
            target.write_bytes(lzma.decompress((packed / f"{name}.txt.xz").read_bytes()))
    except OSError as error:
        raise WriteError(
            f"the demo's text cannot be written to {directory}: {error.strerror}; start the demo "
            "in a directory that you may write to"
        ) from error
