"""Sequence lengths, read from files or drawn from named distributions."""
