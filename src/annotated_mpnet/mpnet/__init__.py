"""The book: MPNet's model, objective, batches and training loop.

It imports only the standard library, torch, numpy and itself; every other room may import it.
Read it in this order: batch, two_stream, pictures, positions, local_start, attention, encoder,
pretraining, masking, collator, randomness, dropout, optimizer, loop. `config` holds the numbers
that all of them use.

Capital letters at the end of a name are the dimensions of a tensor: `hidden_BLD` is (B, L, D).

    B batch    L sequence length    P predicted tokens    V vocabulary    D hidden width
    E entries of the network        Q queries             M keys          F feed-forward width
    H heads    K width of a head    S position buckets    W distances     1 shared by all
"""
