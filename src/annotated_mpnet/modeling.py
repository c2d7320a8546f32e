"""The model, under the name by which users of annotated-mpnet import it."""

from annotated_mpnet.mpnet.pretraining import MPNetForPretraining

__all__ = ["MPNetForPretraining"]
