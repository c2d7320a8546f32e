"""The network. Needs torch only, and takes plain numbers, never a tokenizer.

Read `two_stream.py` first: it is the idea. Then `positions.py`, `attention.py`, `encoder.py`,
`pretraining.py`.
"""

from annotated_mpnet.modeling.pretraining import MPNetForPretraining

__all__ = ["MPNetForPretraining"]
