"""Rendezvous: where the ranks of a plan meet, and the walk that detects deadlocks.

A microbatch on a ring is a meeting: it starts when all ranks of the ring have arrived. `walk`
tells the validator whether all meetings take place, and the simulator when, with and without
pipeline stages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .step_plan import StepPlan


def meetings(plan: StepPlan) -> np.ndarray:
    """(num_microbatches,) int64: the meeting of each microbatch, -1 for local and empty ones.

    A meeting is named by the first sequence of its ring, which all ranks of the ring hold there
    (the invariant one_ring_each).
    """
    result = np.full(len(plan.offload_ratio), -1, dtype=np.int64)
    filled = np.flatnonzero(np.diff(plan.piece_offsets) > 0)
    first = plan.piece_seqs[plan.piece_offsets[filled]]
    result[filled] = np.where(plan.degrees[first] > 1, first, -1)
    return result


def walk(
    offsets: np.ndarray,
    group: np.ndarray,
    seconds: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Walk all lanes at once, wave by wave; returns when each operation starts and ends.

    Lane i runs operations offsets[i] .. offsets[i + 1] - 1, in this order. Operations of one group
    start together, when all their lanes have arrived, and end together, with the slowest.

    group, seconds: (num_operations,) of each. Returns two columns of seconds (num_operations,);
    operations that never run end at infinity. Operations that also need the result of another one,
    as in pipelines: simulation/one_f_one_b.py.
    """
    missing = np.bincount(group)  # lanes of each group yet to arrive
    start_s, longest_s = np.zeros((2, len(missing)))
    np.maximum.at(longest_s, group, seconds)
    end_s = np.full(len(group), np.inf)
    at, stop = offsets[:-1].copy(), offsets[1:]
    free_s = np.zeros(len(at))
    coming = np.flatnonzero(at < stop)
    waiting = coming[:0]
    while len(coming):
        # Lanes arrive.
        groups = group[at[coming]]
        np.maximum.at(start_s, groups, free_s[coming])
        np.subtract.at(missing, groups, 1)
        # Complete groups run, and their lanes move on.
        waiting = np.concatenate([waiting, coming])
        here = at[waiting]
        groups = group[here]
        complete = missing[groups] == 0
        gone, groups = waiting[complete], groups[complete]
        if not len(gone):
            break
        free_s[gone] = end_s[here[complete]] = start_s[groups] + longest_s[groups]
        at[gone] += 1
        coming = gone[at[gone] < stop[gone]]
        waiting = waiting[~complete]
    return start_s[group], end_s


def stuck(offsets: np.ndarray, end_s: np.ndarray) -> np.ndarray:
    """The operation at which each lane that never finishes is stuck, in lane order; see `walk`."""
    never = np.flatnonzero(np.isinf(end_s))
    lane = np.searchsorted(offsets, never, side="right") - 1
    return never[np.unique(lane, return_index=True)[1]]
