"""Training around the book's loop: devices, processes, memory, speed.

`trainer.py` binds the loop to a device and its settings, `distributed.py` to several processes.
`loader.py` makes batches ahead of it, `muon.py` is the other optimizer, `metrics.py` measures the
updates, and `throughput.py`, `memory.py` and `memory_estimate.py` know what one costs. `busy.py`
finds out what else the CPU is doing.

Imports the book, `errors`, `settings`, `text`, `streams` and `fast`. Used by `checkpoints` and
`runs`.
"""
