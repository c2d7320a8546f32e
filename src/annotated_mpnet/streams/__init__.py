"""Datasets that are read as they come: nothing is stored, and a resume loses no row.

    hub             a dataset from the Hub or a folder, downloaded or streamed
    shards          the order of a stream's files, and which rank reads which
    reservoir       a shuffle buffer that is part of a run's state
    streams         all of these together: sequences, batches, and the state after each update
    eval_samples    documents held out from the beginning of a stream

May be imported by training/, checkpoints/ and runs/.
"""
