"""1F1B over all pipelines at once, columnar: the finishing time of a plan with pp_size > 1.

Stage s of n microbatches runs w = pp_size - 1 - s forwards, then B0 F(w+1) B1 F(w+2) .., then the
remaining backwards. So in slot k, on any rank, stage s runs B(k - w - 1) and then F(k), if they
exist; and slots in rising order, backwards of a slot from the last stage to the first, then
forwards from the first to the last, is an order in which every operation finds its inputs done. All
ranks follow it, and shared microbatches have one index, so ring partners meet in the same slot: one
vector operation over ranks does each step, and 1F1B cannot deadlock (`test_1f1b_two_ways` compares
with the event loop of events.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hdp.scheduler.step_plan import StepPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipelines:
    """Microbatches by index. Ranks are in the order of falling numbers of microbatches."""

    seconds: list[np.ndarray]  # of index i: one entry for each rank that has more than i
    rings: list[tuple[np.ndarray, np.ndarray]]  # of index i: ranks on rings, and ring of each, 0..


def gather(plan: StepPlan, meeting: np.ndarray, total: np.ndarray) -> Pipelines:
    """A plan's microbatches to Pipelines; all shared ones must have one index on their ranks.

    meeting (num_microbatches,): the ring, -1 for none; total (num_microbatches,): seconds of each.
    """
    counts, first = plan.num_microbatches, plan.microbatch_offsets[:-1]
    order = np.argsort(-counts, kind="stable")
    falling = counts[order]
    seconds, rings = [], []
    for i in range(int(falling[0])):
        active = int(np.searchsorted(-falling, -i, side="left"))
        mine = first[order[:active]] + i
        seconds.append(total[mine])
        shared = np.flatnonzero(meeting[mine] >= 0)
        _, ring = np.unique(meeting[mine[shared]], return_inverse=True)
        rings.append((shared, ring))
    return Pipelines(seconds=seconds, rings=rings)


def finish_1f1b(pipelines: Pipelines, pp_size: int, forward_share: float) -> float:
    """When the last backward of the first stage is done, in the unit of `seconds`."""
    count, ranks = len(pipelines.seconds), len(pipelines.seconds[0])
    free = np.zeros((pp_size, ranks))
    # End of the latest forward of a microbatch over the stages so far, and of its backward.
    forward = [np.zeros(len(s)) for s in pipelines.seconds]
    backward = [np.zeros(len(s)) for s in pipelines.seconds]
    forward_s = [s * forward_share for s in pipelines.seconds]
    backward_s = [s * (1 - forward_share) for s in pipelines.seconds]
    lone = [not len(shared) for shared, _ in pipelines.rings]

    def run(stage: int, i: int, done: list[np.ndarray], own: list[np.ndarray]) -> None:
        active = len(own[i])
        start = np.maximum(free[stage, :active], done[i])
        end = start + own[i]
        if not lone[i]:
            shared, ring = pipelines.rings[i]
            size = int(ring.max()) + 1
            begin, longest = np.zeros(size), np.zeros(size)
            np.maximum.at(begin, ring, start[shared])
            np.maximum.at(longest, ring, own[i][shared])
            end[shared] = (begin + longest)[ring]
        free[stage, :active] = done[i] = end

    for k in range(count + pp_size):
        for stage in range(pp_size - 1, -1, -1):
            i = k - (pp_size - stage)
            if 0 <= i < count:
                if stage == pp_size - 1:
                    backward[i] = forward[i]
                run(stage, i, backward, backward_s)
        if k < count:
            for stage in range(pp_size):
                run(stage, k, forward, forward_s)
    return float(free.max())
