"""Policies: a Batch in, a StepPlan out; what a rank can hold, and the baselines."""
