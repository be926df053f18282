"""1F1B: when each operation of a plan with pipeline stages runs.

Stage s of n microbatches runs w = min(pp_size - 1 - s, n) forwards, then F(w) B(0) F(w + 1) B(1)
.., then the remaining backwards. So forward i is operation max(i, 2 i - w) of its stage and
backward i is operation min(w + 2 i + 1, n + i). A forward needs that of the previous stage, a
backward that of the next, and ring partners meet in each stage, in forward and in backward.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hdp.scheduler.rendezvous import meetings, stuck
from hdp.scheduler.step_plan import StepPlan

from .events import Operations, deadlock

# Most forwards and backwards of a step, over all stages of all ranks: seconds and about 3 GB.
MOST_OPERATIONS = 2**25


def run_1f1b(plan: StepPlan, total_s: np.ndarray, forward_share: float) -> Operations:
    """Operations of every stage of every rank; total_s: (num_microbatches,) seconds of each.

    Raises ValueError naming the waiting ranks if the plan deadlocks.
    """
    forward, backward, offsets = _positions(plan)
    seconds, start_s, end_s = _walk(plan, total_s, forward_share)
    count = len(total_s)
    microbatch, stage = np.empty((2, len(end_s)), dtype=np.int64)
    part = np.full(len(end_s), "F")
    microbatch[forward] = microbatch[backward] = np.arange(count)
    stage[forward] = stage[backward] = np.arange(plan.pp_size)[:, None]
    part[backward] = "B"
    if np.isinf(end_s).any():
        where = stuck(offsets, end_s)
        m = microbatch[where]
        rank = plan.microbatch_ranks[m]
        columns = (rank, stage[where], part[where], m - plan.microbatch_offsets[rank])
        rows = zip(*(column.tolist() for column in columns), strict=True)
        raise deadlock(f"rank {r} stage {s} at {p}{i}" for r, s, p, i in rows)
    ready_s = np.concatenate([[0.0], end_s[:-1]])
    ready_s[offsets[:-1][np.diff(offsets) > 0]] = 0.0
    return Operations(
        microbatch=microbatch,
        stage=stage,
        part=part,
        ready_s=ready_s,
        start_s=start_s,
        own_s=seconds,
        end_s=end_s,
    )


def finish_1f1b(plan: StepPlan, total_s: np.ndarray, forward_share: float) -> float:
    """When the last operation of `run_1f1b` ends, without building its columns."""
    end_s = float(_walk(plan, total_s, forward_share)[2].max())
    if np.isinf(end_s):
        run_1f1b(plan, total_s, forward_share)  # raises, naming the waiting ranks
    return end_s


def _positions(plan: StepPlan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Position of each forward and backward, (pp_size, num_microbatches), and the lane offsets.

    Operations are ordered by rank, then by stage.
    """
    pp_size, rank = plan.pp_size, plan.microbatch_ranks
    first, n = plan.microbatch_offsets[rank], plan.num_microbatches[rank]
    i, stage = np.arange(len(rank)) - first, np.arange(pp_size)[:, None]
    lane = 2 * (pp_size * first + stage * n)
    w = np.minimum(pp_size - 1 - stage, n)
    offsets = np.concatenate([[0], np.cumsum(np.repeat(2 * plan.num_microbatches, pp_size))])
    return lane + np.maximum(i, 2 * i - w), lane + np.minimum(w + 2 * i + 1, n + i), offsets


def _walk(
    plan: StepPlan, total_s: np.ndarray, forward_share: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Seconds, start and end of each operation. Raises ValueError for over MOST_OPERATIONS."""
    if 2 * plan.pp_size * len(total_s) > MOST_OPERATIONS:
        raise ValueError(
            f"pp_size={plan.pp_size} stages run {len(total_s)} microbatches forward and backward, "
            f"more than the {MOST_OPERATIONS} operations that are simulated; use fewer stages or "
            "sequences"
        )
    forward, backward, offsets = _positions(plan)
    count, stages = forward.size + backward.size, np.arange(plan.pp_size)[:, None]
    meeting = meetings(plan)
    alone = plan.num_seqs + np.arange(len(meeting))
    own = np.where(meeting >= 0, meeting, alone)
    groups = plan.num_seqs + len(meeting)
    group, after = np.empty((2, count), dtype=np.int64)
    group[forward] = own + stages * groups
    group[backward] = own + (plan.pp_size + stages) * groups
    after[forward[0]] = count
    after[forward[1:]] = forward[:-1]
    after[backward[:-1]] = backward[1:]
    after[backward[-1]] = forward[-1]
    seconds = np.empty(count)
    seconds[forward] = total_s * forward_share
    seconds[backward] = total_s * (1 - forward_share)
    order, size = np.argsort(own, kind="stable"), np.bincount(own, minlength=groups)
    first, member = np.cumsum(size) - size, plan.microbatch_ranks[order]

    def lanes_of(some: np.ndarray) -> np.ndarray:
        """The lanes that meet in these groups."""
        base, count = some % groups, size[some % groups]
        along = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
        rank = member[np.repeat(first[base], count) + along]
        return rank * plan.pp_size + np.repeat(some // groups % plan.pp_size, count)

    return (seconds, *_run_lanes(offsets, group, seconds, after, lanes_of))


def _run_lanes(
    offsets: np.ndarray,
    group: np.ndarray,
    seconds: np.ndarray,
    after: np.ndarray,
    lanes_of: Callable[[np.ndarray], np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """Like rendezvous.walk, with inputs from other lanes: lanes sleep until theirs is there.

    A lane is looked at when it is free or when the operation that it needs ends, so the work grows
    with the operations and not with lanes times waves. No two operations need the same one.
    """
    count = len(group)
    then = np.full(count + 1, -1)
    then[after] = np.arange(count)  # the operation that needs each one
    missing = np.bincount(group)  # lanes of each group yet to arrive
    start_s, longest_s = np.zeros((2, len(missing)))
    np.maximum.at(longest_s, group, seconds)
    end_s = np.full(count + 1, np.inf)
    end_s[count] = 0.0  # for operations without an input
    at, stop = offsets[:-1].copy(), offsets[1:]
    lane_of = np.repeat(np.arange(len(at), dtype=np.int32), np.diff(offsets))
    free_s, is_free = np.zeros(len(at)), np.zeros(len(at), dtype=bool)
    coming = np.flatnonzero(at < stop)
    while len(coming):
        # Lanes whose input is ready arrive.
        here = at[coming]
        input_s = end_s[after[here]]
        ready = input_s < np.inf
        arrived, groups = coming[ready], group[here[ready]]
        np.maximum.at(start_s, groups, np.maximum(free_s[arrived], input_s[ready]))
        np.subtract.at(missing, groups, 1)
        # Complete groups run; their lanes move on, and the lanes that need their results wake.
        gone = lanes_of(np.unique(groups[missing[groups] == 0]))
        ran = at[gone]
        free_s[gone] = end_s[ran] = start_s[group[ran]] + longest_s[group[ran]]
        at[gone] += 1
        freed = gone[at[gone] < stop[gone]]
        needed = then[ran]
        needed = needed[needed >= 0]
        lanes = lane_of[needed]
        is_free[freed] = True
        woken = lanes[(at[lanes] == needed) & ~is_free[lanes]]
        is_free[freed] = False
        coming = np.concatenate([freed, woken])
    return start_s[group], end_s[:count]
