"""The balance scheduler: sequence lengths in, a StepPlan out. Pure numpy, no torch, no clock, no RNG."""

from .plan import Microbatch, Piece, StepPlan

__all__ = ["Microbatch", "Piece", "StepPlan"]
