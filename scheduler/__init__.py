"""The balance scheduler: sequence lengths in, a StepPlan out. No torch, no clock, no RNG."""

from hdp.scheduler.costs.cost_model import CostModel
from hdp.scheduler.costs.estimate import estimate_cost
from hdp.scheduler.simulation.simulator import finish_s, simulate
from hdp.scheduler.simulation.timeline import Span, Timeline

from .planner import POLICIES, plan
from .step_plan import Microbatch, Piece, StepPlan
from .validate import validate_plan

__all__ = [
    "POLICIES",
    "CostModel",
    "Microbatch",
    "Piece",
    "Span",
    "StepPlan",
    "Timeline",
    "estimate_cost",
    "finish_s",
    "plan",
    "simulate",
    "validate_plan",
]
