"""Benchmarks are scripts that stand in one folder and import each other by name."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# At the end: at the beginning, `profile.py` would hide Python's module of that name.
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads that wait for each other are slow on a machine that has other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
