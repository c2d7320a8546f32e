"""Checkpoints and the directory of a run: everything that lets a run resume after it was killed.

`checkpoint.py` saves and loads one checkpoint and `manifest.py` proves that it is whole;
`saving.py` does it in a thread during training; `retention.py` prunes old ones; `resume.py` picks
the one to resume from and checks that it is still the same run; `run_directory.py` locks the
directory and decides who may write there.

Imports the book, `errors`, `files`, `settings`, `streams` and `training`. The rooms `tracking`,
`conversion`, `runs` and `demo` may import it.
"""
