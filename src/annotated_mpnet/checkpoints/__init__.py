"""Checkpoints and the run's directory."""
