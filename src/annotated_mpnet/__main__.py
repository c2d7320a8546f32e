"""`python -m annotated_mpnet` is `pretrain-mpnet`: for torchrun, which starts a module."""

from annotated_mpnet.cli import pretrain

pretrain()
