"""The demo: the whole pipeline on six novels that come with the package, in minutes on a CPU.

`corpus.py` unpacks them, `show.py` trains and shows what became of it.
"""
