"""Training: a run set up from its configuration, its steps, and what it reports."""
