"""Events: when each operation of a plan without pipeline stages runs.

All ranks advance together from ring to ring (rendezvous.py). Consecutive local microbatches are one
step of that walk, so the number of waves depends on the rings of a rank, not on its microbatches.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import numpy as np

from hdp.scheduler.rendezvous import meetings, stuck, walk
from hdp.scheduler.step_plan import StepPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Operations:
    """Columns over the operations of a step. On a ring, all ranks end with the slowest.

    With pp_size 1 there is one operation per microbatch, in plan order.
    """

    microbatch: np.ndarray  # int64
    stage: np.ndarray  # int64
    part: np.ndarray  # "F" forward, "B" backward, "" both
    ready_s: np.ndarray  # when the device is free
    start_s: np.ndarray  # when it starts, on all ranks of the ring
    own_s: np.ndarray  # seconds that it takes on its own
    end_s: np.ndarray


def deadlock(waiting: Iterable[str]) -> ValueError:
    """The error for operations that never end."""
    names = "; ".join(islice(waiting, 8))
    return ValueError(f"acyclic_order: deadlock: {names} wait for each other")


def run_flat(plan: StepPlan, total_s: np.ndarray) -> Operations:
    """Operations of a plan with pp_size 1; total_s: (num_microbatches,) seconds of each.

    Raises ValueError naming the waiting ranks if the plan deadlocks.
    """
    count, first = len(total_s), plan.microbatch_offsets[:-1]
    meeting = meetings(plan)
    shared = meeting >= 0
    opens = shared.copy()
    opens[1:] |= shared[:-1]
    opens[first] = True
    begins, run = np.flatnonzero(opens), np.cumsum(opens) - 1
    alone = plan.num_seqs + np.arange(len(begins))
    offsets = np.searchsorted(begins, plan.microbatch_offsets)
    group = np.where(shared[begins], meeting[begins], alone)
    run_start_s, run_end_s = walk(offsets, group, np.add.reduceat(total_s, begins))
    if np.isinf(run_end_s).any():
        where = begins[stuck(offsets, run_end_s)].tolist()
        ranks = plan.microbatch_ranks[where].tolist()
        raise deadlock(
            f"rank {rank} at microbatch {m - int(first[rank])}"
            for rank, m in zip(ranks, where, strict=True)
        )
    passed_s = np.cumsum(total_s) - total_s
    start_s = run_start_s[run] + passed_s - passed_s[begins][run]
    end_s = np.where(shared, run_end_s[run], start_s + total_s)
    ready_s = np.concatenate([[0.0], end_s[:-1]])
    ready_s[first] = 0.0
    return Operations(
        microbatch=np.arange(count),
        stage=np.zeros(count, dtype=np.int64),
        part=np.full(count, ""),
        ready_s=ready_s,
        start_s=np.maximum(start_s, ready_s),
        own_s=total_s,
        end_s=end_s,
    )
