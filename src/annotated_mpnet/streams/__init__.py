"""Datasets that are read as they come."""
