"""Training: setting up a run from its configuration, its steps, and its metrics."""
