"""`explain-mpnet`: what the model is given for a sentence, and what each position may see.

`sentence.py` cuts the sentence into tokens; `explanation.py` computes the rest, once, with the
collator and the entries that training uses; `model.py` asks a checkpoint what it predicts and
attends to. Three modules draw the result and compute nothing: `terminal.py`, `page.py` (one HTML
file, from `page.html`) and `picture.py` (PNG). `command.py` is the command.

Imports the book, `text/` for tokenizers, `conversion/` for checkpoints, and `settings/`. Only the
command line and the documentation import it.
"""
