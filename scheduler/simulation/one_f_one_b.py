"""1F1B: when each operation of a plan with pipeline stages runs.

Stage s of n microbatches runs w = min(pp_size - 1 - s, n) forwards, then F(w) B(0) F(w + 1) B(1)
.., then the remaining backwards. So forward i is operation max(i, 2 i - w) of its stage and
backward i is operation min(w + 2 i + 1, n + i). A forward needs that of the previous stage, a
backward that of the next, and ring partners meet in each stage, in forward and in backward.
"""

from __future__ import annotations

import numpy as np

from hdp.scheduler.rendezvous import meetings, stuck, walk
from hdp.scheduler.step_plan import StepPlan

from .events import Operations, deadlock


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
    """Seconds, start and end of each operation."""
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
    return (seconds, *walk(offsets, group, seconds, after))
