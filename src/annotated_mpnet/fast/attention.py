"""The ways to compute attention that a user can choose from (`--attention`)."""

from functools import partial
from typing import Literal

from annotated_mpnet.fast.blocked_attention import attend_blocked
from annotated_mpnet.fast.triton_attention import attend_triton, bias_rule
from annotated_mpnet.mpnet.attention import EAGER, SDPA, Attention, attend_blocks

AttentionName = Literal["eager", "sdpa", "blocked", "triton"]

ATTENTIONS: dict[AttentionName, Attention] = {
    "eager": EAGER,
    "sdpa": SDPA,
    "blocked": Attention(partial(attend_blocks, attend_blocked)),
    "triton": Attention(attend_triton, bias_rule),
}
