"""plan(): a batch's lengths and a cluster in, a StepPlan out.

The policies, each a function of the same arguments:

    hdp                    list scheduling with any degrees; near-optimal (policies/hdp/search.py)
    bytescale, -naive,     the paper's Algorithms 1 and 2 (bytescale.py)
      -dp, -pp
    static                 DP x CP with packed zigzag: the baseline (static_mesh.py)

A plan is a pure function of its arguments: no clock, no random numbers, and no arithmetic whose
result depends on the machine. Each rank computes its own copy, byte for byte the same
(`test_same_bytes`).

    from hdp.scheduler import CostModel, plan
    cost = CostModel.from_coefficients(quadratic_s=5.128e-9, linear_s=1.84e-4)
    step = plan([262144, 1000, 3000], hdp_size=64, max_tokens_per_rank=16384, cost=cost)
    step.predicted_s, step.lower_bound_s
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from hdp.scheduler.costs.cost_model import CostModel
from hdp.scheduler.plain import shown
from hdp.scheduler.policies.batch import Batch
from hdp.scheduler.policies.bytescale import (
    plan_bytescale,
    plan_dp_balance,
    plan_naive,
    plan_pp_balance,
)
from hdp.scheduler.policies.hdp.degrees import Degrees
from hdp.scheduler.policies.hdp.lower_bound import lower_bound_ticks, step_bound_s
from hdp.scheduler.policies.hdp.search import plan_hdp
from hdp.scheduler.policies.static_mesh import plan_static
from hdp.scheduler.simulation.simulator import finish_s

from .step_plan import StepPlan

POLICIES: dict[str, Callable[..., StepPlan]] = {
    "hdp": plan_hdp,
    "bytescale": plan_bytescale,
    "bytescale-naive": plan_naive,
    "bytescale-dp": plan_dp_balance,
    "bytescale-pp": plan_pp_balance,
    "static": plan_static,
}


def plan(
    seqlens: Sequence[int] | np.ndarray,
    *,
    hdp_size: int,
    max_tokens_per_rank: int,
    cost: CostModel,
    policy: str = "hdp",
    units: Sequence[int] | np.ndarray | None = None,
    pp_size: int = 1,
    cp_size: int | None = None,
    ranks_per_node: int | None = None,
    offload: bool = False,
    equal_counts: bool = False,
    multiple: int = 1,
    ends_together: bool = False,
) -> StepPlan:
    """Plan one step: which ranks hold which sequences, in which order (ByteScale sections 5, 6).

    seqlens: tokens of each sequence, (num_seqs,), all >= 1
    hdp_size: ranks that share the batch
    max_tokens_per_rank: tokens that a rank can hold in one microbatch (the paper's C)
    cost: seconds and bytes of a piece, the same on all ranks
    policy: one of `POLICIES`, described in the module docstring
    units: (num_seqs,) integers; sequences with equal units share a microbatch on the same ranks
    pp_size: pipeline stages of each rank
    cp_size: ranks per ring, for the static policy only; default: the smallest that fits the longest
    ranks_per_node: hdp keeps rings that fit inside a node and gives others whole nodes; bytescale's
        rings and static's blocks of cp_size ranks ignore nodes and pay for the link. None: one node
    offload: let activations move to the host where forward hides it, for fewer ranks (Eq. 3)
    equal_counts: give every rank the same number of microbatches (expert parallelism and ZeRO-3
        across ranks need it), padding with empty ones, and rings the same index on all of their
        ranks: the plan is `aligned`
    multiple: make every rank's number of microbatches a multiple of this (interleaved pipelines
        need one of pp_size), padding with empty ones
    ends_together: let no ring be the last microbatch of only some of its ranks
        (`StepPlan.ends_together`), adding empty ones after it, so that gradients may be reduced
        during the last backward

    Returns a plan with its simulated seconds and a lower bound for any plan. Raises ValueError for
    bad arguments, or if the plan is impossible or has over 2**25 pieces or pipeline operations.
    """
    _check_policy(policy, cp_size)
    batch = Batch.check(
        seqlens,
        hdp_size=hdp_size,
        max_tokens_per_rank=max_tokens_per_rank,
        cost=cost,
        units=units,
        pp_size=pp_size,
        ranks_per_node=ranks_per_node,
        offload=offload,
        equal_counts=equal_counts,
        multiple=multiple,
        ends_together=ends_together,
    )
    return _planned(batch, policy, cp_size)


def _check_policy(policy: str, cp_size: int | None) -> None:
    if not isinstance(policy, str) or policy not in POLICIES:
        raise ValueError(f"unknown policy {shown(policy)}; choose one of {', '.join(POLICIES)}")
    if cp_size is not None and policy != "static":
        raise ValueError(
            f"cp_size={shown(cp_size)} applies to the static policy only, not {policy!r}"
        )


def _planned(batch: Batch, policy: str, cp_size: int | None) -> StepPlan:
    """The policy's plan with its simulated seconds and the lower bound."""
    degrees = Degrees(batch)
    bound = lower_bound_ticks(degrees)
    own: dict[str, Any] = {"static": {"cp_size": cp_size}}
    own["hdp"] = {"degrees": degrees, "bound": bound}
    result = POLICIES[policy](batch, **own.get(policy, {}))
    return replace(
        result,
        predicted_s=finish_s(result, batch.cost),
        lower_bound_s=step_bound_s(degrees, bound),
    )
