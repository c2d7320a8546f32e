"""Metrics, console and report."""
