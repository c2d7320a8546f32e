"""Conversion: our weights to Hugging Face and back, fairseq's and annotated-mpnet's in.

Three programs have trained or run MPNet, and each writes the same numbers down in another way:

    fairseq (Microsoft), annotated-mpnet      Hugging Face's MPNetForMaskedLM
    ------------------------------------      ------------------------------------------------
    one .pt file, a pickle                    model.safetensors and config.json
    q, k and v stacked: in_proj, 3D x D       three matrices q, k, v, each D x D
    sentence_encoder.layers.0.fc1             mpnet.encoder.layer.0.intermediate.dense
    512 positions: a table of 514 rows        max_position_embeddings 514: the rows, not the
                                              positions (rows 0 and 1 are never a position)
    LayerNorm eps 1e-5, written nowhere       layer_norm_eps, and 1e-12 if it is not written
    any number of buckets, any distance       32 buckets and distance 128, in the code itself
    activation_fn in layers and head          hidden_act in the layers; in the head always GELU
    pre-norm or post-norm                     post-norm
    the padding id of the dictionary          1, in the code itself

The first four lines are a matter of spelling, which `names.py` settles for the tensors and
`configuration.py` for the numbers. The rest is a matter of what can be said at all. A configuration
file of Hugging Face's happily takes `relative_attention_num_buckets: 64`, and the model that reads
it makes a table of 64 rows, of which it then uses 32, for the wrong distances. No tensor is
missing, nothing has a wrong shape, no warning appears, and the network is another one.
annotated-mpnet exports such models (its buckets grow with the sequence, from 516 tokens on),
pre-norm ones as if they were post-norm, ReLU ones with a GELU in the head, and starts from a BERT
directory with fresh random weights, reporting success.

Hence two rules:

1. **Refuse with reasons** what cannot be represented, before anything is written
   (`reasons_not_representable`).
2. **Trust no list of reasons.** Every export is opened again from the disk, by the class that its
   user will use, and both networks are asked the same random, padded batch. Names, offsets, eps,
   buckets, masks: what is wrong shows in the logits (`proof.py` says how much, and what does not).
   More than 1e-4 of difference, and there is no export.

Reading is as strict: every tensor has its place or is named in an error, and no file can run code.
What was made up (the head of an encoder that came without one) or left aside (a pooler) is said in
`notes`, which the caller shows.

    names.py           the table of the tensors' names, read in both directions
    configuration.py   the same for the numbers; what cannot be represented
    export.py          ours -> Hugging Face, all or nothing
    proof.py           and that it is the same network
    hugging_face.py    Hugging Face, sentence-transformers -> ours
    fairseq.py         .pt files -> ours
    recognise.py       which of all these is it?
    vocabulary.py      and does it belong to this tokenizer?

Next: `names.py`.
"""

from annotated_mpnet.conversion.configuration import reasons_not_representable
from annotated_mpnet.conversion.export import ExportReport, export_to_hugging_face
from annotated_mpnet.conversion.fairseq import load_fairseq_checkpoint
from annotated_mpnet.conversion.hugging_face import load_hugging_face
from annotated_mpnet.conversion.recognise import (
    LoadedWeights,
    convert_checkpoint,
    load_any,
)

__all__ = [
    "ExportReport",
    "LoadedWeights",
    "convert_checkpoint",
    "export_to_hugging_face",
    "load_any",
    "load_fairseq_checkpoint",
    "load_hugging_face",
    "reasons_not_representable",
]
