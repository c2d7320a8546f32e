"""Text to batches: everything between a file and the network.

    files --sources--> documents --packing--> rows --loader, collator, masking--> batches
    stream --hub, shards--> documents --streams--> rows --collator, masking--> batches

Nothing here knows the model, and the model knows nothing of this: they share `batch.py`.

A map, in the order in which it may be read. The heart, if you read nothing else, and what MPNet is
about on this side:

    masking             which tokens are predicted, in which order, and what stands in their place
    collator            rows to batches, by way of `masking`
    loader              batch number k as a function of (data, seed, k); how a run resumes

From text to rows, on the disk:

    sources             a document source; files below a directory
    file_formats        lines, JSON, Parquet, CSV, compressed or not, to documents
    counts              what was read, and what was left out
    tokenizer           a vocabulary as tables of plain numbers: special tokens, beginnings of words
    tokenizer_training  a WordPiece vocabulary of one's own
    tokenising          documents to ids, many at a time, nothing cut off
    row_cutting         ids to rows, in three ways (`--packing`)
    packing             all of the text to a table of rows, once, in a cache
    rows                that table, memory-mapped
    statistics          how often each token occurs; the plateau of guessing by it

What is evaluated on is not trained on:

    texts               training, validation and test text of a run
    hold_out            a share of documents, by a hash of their text
    eval_samples        a few documents from the beginning of a stream, and their copies further on

Text as it comes, where there is no disk for it:

    hub                 data sets from the Hub, downloaded or streamed; trying again
    shards              the order of a stream's files, and who reads which
    reservoir           a shuffle buffer that is part of the state
    streams             all of these together: rows, and a state from which to go on exactly

Next: `masking.py`; or `sources.py`, to begin where the text does.
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
