"""What is in a directory, to compare two, or one before and after."""

from pathlib import Path

TENSORS = ("model.safetensors", "optimizer.safetensors")


def tree(directory: Path) -> dict[str, bytes]:
    """Return the bytes of each file below a directory."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def checkpoint_tree(checkpoint: Path) -> dict[str, bytes]:
    """Return the files of a checkpoint, except the manifest, which has a date and the run's id."""
    return {name: each for name, each in tree(checkpoint).items() if name != "manifest.json"}


def tensors_of(checkpoint: Path) -> dict[str, bytes]:
    """Return the two files of a checkpoint with weights and the optimizer's state."""
    return {name: (checkpoint / name).read_bytes() for name in TENSORS}


def names_in(directory: Path) -> set[str]:
    """Return the names of the files and directories in a directory, not below them."""
    return {path.name for path in directory.iterdir()}
