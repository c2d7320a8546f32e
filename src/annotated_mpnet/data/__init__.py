"""Text to batches: read `sources`, `tokenizer`, `packing`, `rows`, `masking`, `collator`, `loader`.

    files --sources--> documents --packing--> rows --loader, collator, masking--> batches

Nothing here knows the model, and the model knows nothing of this: they share `batch.py`.
"""

from annotated_mpnet.data.collator import DataCollatorForMaskedPermutedLanguageModeling, Row
from annotated_mpnet.data.loader import BatchLoader, evaluation_batches, prefetch
from annotated_mpnet.data.packing import pack_rows
from annotated_mpnet.data.rows import PackedRows, PackingReport
from annotated_mpnet.data.sources import (
    Counts,
    DocumentSource,
    LocalFiles,
    find_text_files,
    fingerprint_files,
    read_documents,
)
from annotated_mpnet.data.tokenizer import Vocabulary, load_tokenizer, tokenizer_hash

__all__ = [
    "BatchLoader",
    "Counts",
    "DataCollatorForMaskedPermutedLanguageModeling",
    "DocumentSource",
    "LocalFiles",
    "PackedRows",
    "PackingReport",
    "Row",
    "Vocabulary",
    "evaluation_batches",
    "find_text_files",
    "fingerprint_files",
    "load_tokenizer",
    "pack_rows",
    "prefetch",
    "read_documents",
    "tokenizer_hash",
]
