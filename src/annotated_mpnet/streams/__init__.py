"""Datasets from the Hugging Face Hub, or a folder, read while they download.

`hub.py` opens a dataset, `shards.py` decides in which order it is read, `streams.py` packs the text
into sequences, `reservoir.py` shuffles them, and `eval_samples.py` holds documents out. All that a
resumed run needs is in one record, `reservoir.StreamState`. `sample.py` writes the first documents
to a file, from which a tokenizer is learned.

Imports the book, `errors`, `settings` and `text`. Used by `training`, `checkpoints` and `runs`.
"""
