"""Flags, presets and files."""
