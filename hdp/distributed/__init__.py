"""Ranks: the mesh, sharding, agreement, and the watchdog."""
