"""`python -m annotated_mpnet` is `pretrain-mpnet`. torchrun needs a module to start."""

from annotated_mpnet.cli import pretrain

pretrain()
