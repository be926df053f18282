"""Everything about ranks: the mesh, sharding, agreement, and the watchdog."""
