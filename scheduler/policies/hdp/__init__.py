"""The hdp policy: list scheduling of moldable tasks. Start with search.py."""
