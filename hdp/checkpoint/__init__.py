"""Checkpoints: asynchronous, atomic, and independent of the number of ranks."""
