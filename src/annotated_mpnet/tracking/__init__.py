"""Tracking: what a run says while it runs, and its report at the end.

    tracker.py    console, log.txt, and the metrics to all sinks
    display.py    metrics and durations in words; the live lines
    sinks.py      metrics.jsonl, TensorBoard, Weights & Biases
    guesses.py    guessed words, in a file and in the report
    plateau.py    when training leaves the unigram plateau
    report.py     report.md and loss.png

It reads the settings and the names of the files in a run's directory. Only `runs/` imports it:
training does not know who listens.
"""
