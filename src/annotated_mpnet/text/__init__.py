"""From files and tokenizers to packed sequences on the disk.

    sources, file_formats   files to documents; counts says what was skipped
    hold_out                documents that are held out, by a hash of their text
    tokenizer               any fast tokenizer, as tables of numbers
    learn_tokenizer         makes one (tokenizer_learners) and says how it fits (tokenizer_report)
    tokenization            documents to tokens
    cutting, sequences      tokens to sequences, in three ways, and the table that holds them
    packing                 all of this once, in a cache
    mixture                 several texts, each with its share
    frequencies             how often each token occurs, and the plateau of guessing by it

Imports the book, `errors`, `files`, `settings` and `signals`. Used by `streams`, `training`,
`conversion`, `runs`, `demo` and `explain`.
"""
