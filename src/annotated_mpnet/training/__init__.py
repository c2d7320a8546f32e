"""Training around the book's loop: devices, processes, memory, speed.

`trainer.py` binds the loop to a device and its settings, `distributed.py` to several processes.
`loader.py` makes batches ahead of it, `metrics.py` measures it, and `throughput.py`, `memory.py`
and `memory_estimate.py` know what an update costs.

Imports the book, `text/`, `streams/`, `fast/` and `settings/`. Imported by `checkpoints/`,
`tracking/`, `runs/` and `demo/`.
"""
