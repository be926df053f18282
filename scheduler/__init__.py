"""The balance scheduler: sequence lengths in, a StepPlan out. No torch, no clock, no RNG."""

from .cost import CostModel
from .plan import Microbatch, Piece, StepPlan
from .planner import POLICIES, plan
from .simulate import finish_s, simulate
from .timeline import Span, Timeline
from .validate import validate_plan

__all__ = [
    "POLICIES",
    "CostModel",
    "Microbatch",
    "Piece",
    "Span",
    "StepPlan",
    "Timeline",
    "finish_s",
    "plan",
    "simulate",
    "validate_plan",
]
