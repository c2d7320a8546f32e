"""Benchmarks are scripts that stand in one folder and import each other by name."""

import sys
from pathlib import Path

# At the end: at the beginning, `profile.py` would hide Python's module of that name.
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
