"""The demo: the whole pipeline on six novels that come with the package, in minutes on a CPU.

`corpus.py` unpacks them, `masks.py` chooses words to guess, `show.py` trains and shows the result.
It uses every other room; only the command line imports it.
"""
