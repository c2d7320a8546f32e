"""MPNet pretraining, from your own text to a verified Hugging Face model: exact, fast, readable.

The order in which to read the package is in the README. Nothing is imported here, so that
`pretrain-mpnet --help` does not wait for PyTorch.
"""

__version__ = "0.1.0"
