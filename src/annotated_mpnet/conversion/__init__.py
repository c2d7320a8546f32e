"""Our weights to Hugging Face, and everybody's weights to ours.

Three programs have trained or run MPNet, and each stores the same numbers in another way:

    fairseq (Microsoft), annotated-mpnet      Hugging Face's MPNetForMaskedLM
    ------------------------------------      ------------------------------------------------
    one .pt file, a pickle                    model.safetensors and config.json
    q, k and v stacked: in_proj, 3D x D       three matrices q, k, v, each D x D
    sentence_encoder.layers.0.fc1             mpnet.encoder.layer.0.intermediate.dense
    512 positions: a table of 514 rows        max_position_embeddings 514: rows, not positions
    LayerNorm eps 1e-5, stored nowhere        layer_norm_eps, 1e-12 if it is missing
    any number of buckets, any distance       32 buckets and distance 128, hard-coded
    activation_fn in layers and head          hidden_act in the layers; always GELU in the head
    pre-norm or post-norm                     post-norm
    the padding id of the dictionary          1, hard-coded

The first four lines are spelling, which `names.py` translates. The others are about what can be
expressed at all. Hugging Face accepts a configuration with 64 buckets,
builds a table of 64 rows, and uses 32 of them for the wrong distances: no missing tensor, no wrong
shape, no warning, another network. So there are two rules:

1. **Refuse with reasons** what cannot be represented, before anything is written.
2. **Trust no list of reasons.** Every export is opened again by the class that its user will use,
   and both networks run the same padded batch (`proof.py`). More than 1e-4 of difference in a
   logit, and there is no export.

Reading is as strict: every tensor has its place or is named in an error, and no file can run code.
What was made up (a head) or left out (a pooler) is said in `notes`.

A sentence encoder is more than its network. What sentence-transformers has after it travels along,
with each checkpoint, to every export (`sentence_modules.py`, `kept.py`); so do the facts for the
model card (`model_card.py`).

May be imported by runs/, demo/ and the command line.
"""

from annotated_mpnet.conversion.export import ExportReport, export_to_hugging_face
from annotated_mpnet.conversion.foreign import LoadedWeights
from annotated_mpnet.conversion.names import reasons_not_representable
from annotated_mpnet.conversion.recognise import convert_checkpoint, load_any

__all__ = [
    "ExportReport",
    "LoadedWeights",
    "convert_checkpoint",
    "export_to_hugging_face",
    "load_any",
    "reasons_not_representable",
]
