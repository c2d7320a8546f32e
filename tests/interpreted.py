"""Whether tests of Triton kernels can run: they need a GPU or Triton's interpreter."""

import importlib.metadata
import importlib.util

import numpy as np
import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _why_not() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton exists for Linux only"
    version = importlib.metadata.version("triton")
    # Measured: 3.6 converts arrays to numbers, which NumPy 2.4 refuses; 3.9 does not.
    old = tuple(map(int, version.split(".")[:2])) < (3, 9)
    if DEVICE == "cpu" and old and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        return f"the interpreter of Triton {version} fails with NumPy {np.__version__}"
    return None


triton_runs = pytest.mark.skipif(_why_not() is not None, reason=_why_not() or "")
