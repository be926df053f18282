"""The simulator: a discrete-event run of a StepPlan, with the semantics of the runtime.

1. Each rank runs its microbatches in order; a microbatch takes `fixed_s`, its pieces, and the host
   copies that they do not hide. Pieces that share a ring share its steps.
2. A microbatch on a ring starts when all ranks of the ring are ready and takes, on all of them, as
   long as on the slowest.
3. With pp_size > 1 each rank is a pipeline. Its stages run 1F1B: stage s runs min(pp - 1 - s, n)
   forwards, then alternates, then drains; a forward waits for that of the previous stage, a
   backward for that of the next. Ring partners meet in each stage, in forward and in backward. All
   stages take the same time.
4. The gradient reduction starts when all ranks are done. If every ring's microbatch is the last one
   on all of its ranks or on none (StepPlan.ends_together), it starts once all ranks are in the
   backward of their last microbatch.

The simulator also verifies deadlock freedom: if ranks wait for each other in a cycle, the run stops
early and an error names them (`test_deadlock_is_found`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hdp.scheduler.costs.cost_model import CostModel
from hdp.scheduler.step_plan import StepPlan
from hdp.scheduler.validate import columns_are_sound

from .events import Operations, run_flat
from .one_f_one_b import finish_1f1b, run_1f1b
from .timeline import Span, Timeline


@dataclass(frozen=True, slots=True, kw_only=True)
class MicrobatchTimes:
    """Seconds of each microbatch, (num_microbatches,) float64, forward + backward of one stage."""

    compute_s: np.ndarray  # kernels, fixed_s included
    comm_s: np.ndarray  # exposed P2P
    offload_s: np.ndarray  # exposed host copies

    @property
    def total_s(self) -> np.ndarray:
        return self.compute_s + self.comm_s + self.offload_s


def microbatch_times(plan: StepPlan, cost: CostModel) -> MicrobatchTimes:
    """Seconds of each microbatch of the plan, columnar.

    Pieces of one microbatch that share a ring also share its steps: a long one hides the transfer
    of a short one, and the steps are paid once (`test_pieces_of_a_ring_go_round_together`). A
    gathered one is alone on its ring and priced separately (`test_price_of_a_gathered_ring`).
    """
    degrees, num_microbatches = plan.degrees, len(plan.offload_ratio)
    owner = np.repeat(np.arange(num_microbatches), np.diff(plan.piece_offsets))

    def by_microbatch(per_seq: np.ndarray) -> np.ndarray:
        return np.bincount(owner, weights=per_seq[plan.piece_seqs], minlength=num_microbatches)

    gathered, on_ring = plan.gathered, (degrees > 1) & ~plan.gathered
    across = rings_across_nodes(plan)
    block_s = cost.attention_s(plan.seqlens, degrees) / degrees
    transfer_s = cost.transfer_s(plan.seqlens, degrees, across)
    steps = np.zeros(num_microbatches)
    np.maximum.at(steps, owner, degrees[plan.piece_seqs] - 1)
    late_s = by_microbatch(np.where(on_ring, transfer_s - block_s, 0.0))
    rings_beyond_one = np.maximum(by_microbatch(on_ring.astype(float)) - 1, 0)
    kernels_s = by_microbatch(cost.compute_s(plan.seqlens, degrees, gathered))
    kernels_s = kernels_s - cost.ring_step_s * steps * rings_beyond_one
    comm_s = steps * np.maximum(late_s, 0.0)
    if gathered.any():
        exposed_s = cost.exposed_s(plan.seqlens, degrees, across, gathered=True)
        comm_s += by_microbatch(np.where(gathered, exposed_s, 0.0))
    offload_s = np.zeros(num_microbatches)
    if plan.offload_ratio.any():
        offload_s = cost.offload_s(plan.microbatch_tokens, plan.offload_ratio, kernels_s)
    return MicrobatchTimes(
        compute_s=kernels_s + cost.fixed_s,
        comm_s=comm_s,
        offload_s=offload_s,
    )


def rings_across_nodes(plan: StepPlan) -> np.ndarray:
    """(num_seqs,) bool: whether each sequence's ring spans more than one node."""
    if plan.ranks_per_node is None or not plan.num_seqs:
        return np.zeros(plan.num_seqs, dtype=bool)
    nodes = plan.ring_ranks // plan.ranks_per_node
    starts = plan.ring_offsets[:-1]
    return np.minimum.reduceat(nodes, starts) != np.maximum.reduceat(nodes, starts)


def simulate(plan: StepPlan, cost: CostModel) -> Timeline:
    """Run the plan with the times of `cost` and return the planned timeline.

    Raises ValueError for columns that do not fit together, and naming the ranks that wait for each
    other if the plan deadlocks.
    """
    if not (isinstance(plan, StepPlan) and isinstance(cost, CostModel)):
        kinds = f"{type(plan).__name__} and {type(cost).__name__}"
        raise ValueError(f"simulate takes a StepPlan and a CostModel, not {kinds}")
    columns_are_sound(plan)
    times = microbatch_times(plan, cost)
    operations = _run(plan, times, cost)
    spans = _spans(plan, times, operations)
    spans += _tail(plan, operations, cost)
    spans.sort(key=lambda span: (span.rank, span.stage, span.start_s))
    return Timeline(spans=tuple(spans), num_ranks=plan.hdp_size, num_stages=plan.pp_size, plan=plan)


def finish_s(plan: StepPlan, cost: CostModel) -> float:
    """Seconds at which the simulated step of `plan` ends under `cost`, without a timeline."""
    times = microbatch_times(plan, cost)
    if plan.pp_size > 1:
        return finish_1f1b(plan, times.total_s, cost.forward_share) + cost.reduce_s
    return _reduction(plan, _run(plan, times, cost), cost)[1]


def _run(plan: StepPlan, times: MicrobatchTimes, cost: CostModel) -> Operations:
    if plan.pp_size == 1:
        return run_flat(plan, times.total_s)
    return run_1f1b(plan, times.total_s, cost.forward_share)


def _reduction(plan: StepPlan, operations: Operations, cost: CostModel) -> tuple[float, float]:
    """(start, end) seconds of the gradient reduction, which ends the step."""
    all_done_s = float(operations.end_s.max())
    start_s = all_done_s
    if plan.pp_size == 1 and cost.reduce_s > 0.0 and plan.ends_together:
        last = plan.microbatch_offsets[1:] - 1
        begun_s = operations.start_s[last] + cost.forward_share * operations.own_s[last]
        start_s = float(begun_s.max())
    return start_s, max(all_done_s, start_s + cost.reduce_s)


def _spans(plan: StepPlan, times: MicrobatchTimes, operations: Operations) -> list[Span]:
    """Spans of all operations: wait for partners, compute, exposed transfers and copies, wait."""
    m = operations.microbatch
    share = operations.own_s / np.maximum(times.total_s[m], 1e-300)
    compute_s = operations.start_s + times.compute_s[m] * share
    comm_s = compute_s + times.comm_s[m] * share
    own_end_s = np.minimum(comm_s + times.offload_s[m] * share, operations.end_s)
    ends = {"wait": operations.start_s, "compute": compute_s, "comm": comm_s, "offload": own_end_s}
    rank = plan.microbatch_ranks[m]
    index = (m - plan.microbatch_offsets[rank]).tolist()
    names = [f"{part}{i}" for part, i in zip(operations.part.tolist(), index, strict=True)]
    ranks, stages = rank.tolist(), operations.stage.tolist()
    spans: list[Span] = []
    begin_s = operations.ready_s
    for kind, end_s in [*ends.items(), ("wait", operations.end_s)]:
        for i in np.flatnonzero(end_s - begin_s > 1e-12 * operations.end_s).tolist():
            span = Span(
                rank=ranks[i],
                stage=stages[i],
                kind=kind,
                name=names[i],
                start_s=float(begin_s[i]),
                end_s=float(end_s[i]),
            )
            spans.append(span)
        begin_s = end_s
    return spans


def _tail(plan: StepPlan, operations: Operations, cost: CostModel) -> list[Span]:
    """Spans from each device's last operation to the end of the step: wait, then reduction."""
    start_s, end_s = _reduction(plan, operations, cost)
    free_s = np.zeros((plan.hdp_size, plan.pp_size))
    rank = plan.microbatch_ranks[operations.microbatch]
    np.maximum.at(free_s, (rank, operations.stage), operations.end_s)
    spans = []
    for (rank, stage), own_end_s in np.ndenumerate(free_s):
        at_s = float(own_end_s)
        middle_s = max(start_s, at_s) if cost.reduce_s > 0.0 else end_s
        for kind, until_s in (("wait", middle_s), ("reduce", end_s)):
            if until_s - at_s > 1e-12 * end_s:
                span = Span(
                    rank=rank,
                    stage=stage,
                    kind=kind,
                    name="gradients",
                    start_s=at_s,
                    end_s=until_s,
                )
                spans.append(span)
                at_s = until_s
    return spans
