"""Policies: a Batch in, a StepPlan out. Memory limits, packing, and the baseline policies."""
