"""The demo's text: six novels by Jane Austen, split by book.

By book, because a split by paragraph would let the model see, in training, the very names and turns
of the novel that it is validated on. (Where the text comes from: `austen/PROVENANCE.md`.)
"""

import lzma
from importlib import resources
from pathlib import Path

from annotated_mpnet.errors import WriteError

TRAIN = ("emma", "mansfieldpark", "prideprejudice", "sensesensibility")
VALID = "northangerabbey"
TEST = "persuasion"


DIRECTORY = Path("checkpoints/demo-text")
"""Where the preset `demo` expects the novels and the tokenizer, below the working directory."""


def unpack(directory: Path) -> None:
    """Write the novels as `train/*.txt`, `valid.txt` and `test.txt` below a directory.

    Raises:
        WriteError: the directory cannot be written.
    """
    targets = {name: directory / "train" / f"{name}.txt" for name in TRAIN}
    targets |= {VALID: directory / "valid.txt", TEST: directory / "test.txt"}
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
