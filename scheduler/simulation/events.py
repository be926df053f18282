"""Walks: when each operation of a plan runs. Two of them, with the same semantics.

`walk_flat` is for plans without pipeline stages, columnar: all ranks walk at once, from ring to
ring, and a wave of rings starts as soon as all their ranks are there. `walk_1f1b` is an event loop
over the stages of every rank. Both raise ValueError when the plan deadlocks, and say who waits.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from hdp.scheduler.step_plan import StepPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Operations:
    """Columns over the operations of a step. A ring's operation ends on all ranks with the slowest.

    With pp_size 1 there is one operation for each microbatch, in the plan's order.
    """

    microbatch: np.ndarray  # int64
    stage: np.ndarray  # int64
    part: np.ndarray  # "F" forward, "B" backward, "" both
    ready_s: np.ndarray  # the device is free
    start_s: np.ndarray  # it starts, on all ranks of the ring
    own_s: np.ndarray  # seconds that it takes by itself
    end_s: np.ndarray


def meetings(plan: StepPlan) -> np.ndarray:
    """(num_microbatches,) int64: first sequence of microbatches on a ring, -1 for local ones."""
    result = np.full(len(plan.offload_ratio), -1, dtype=np.int64)
    filled = np.flatnonzero(np.diff(plan.piece_offsets) > 0)
    first = plan.piece_seqs[plan.piece_offsets[filled]]
    result[filled] = np.where(plan.degrees[first] > 1, first, -1)
    return result


def walk_flat(plan: StepPlan, total_s: np.ndarray) -> Operations:
    """Operations of a plan with pp_size 1; total_s: (num_microbatches,) seconds of each."""
    meeting = meetings(plan)
    shared = np.flatnonzero(meeting >= 0)
    local_s = np.where(meeting < 0, total_s, 0.0)
    first = plan.microbatch_offsets[:-1]
    # Seconds of local microbatches on the same rank before each microbatch.
    before_s = np.concatenate([[0.0], np.cumsum(local_s)[:-1]])
    before_s -= np.repeat(before_s[first], plan.num_microbatches)
    ring_end_s = _ring_ends(plan, total_s, meeting, shared, before_s)
    # After a ring, local microbatches follow from its end.
    since_s = np.zeros(len(total_s))
    base = np.full(len(total_s), -1)
    base[shared] = shared
    base[first] = np.maximum(base[first], first)
    base = np.maximum.accumulate(base)
    is_ring = meeting[base] >= 0
    since_s[is_ring] = (ring_end_s - before_s)[base[is_ring]]
    end_s = np.where(meeting >= 0, ring_end_s, since_s + before_s + local_s)
    ready_s = np.concatenate([[0.0], end_s[:-1]])
    ready_s[first] = 0.0
    start_s = ready_s.copy()
    if len(shared):
        longest_s = np.zeros(plan.num_seqs)
        np.maximum.at(longest_s, meeting[shared], total_s[shared])
        start_s[shared] = ring_end_s[shared] - longest_s[meeting[shared]]
        start_s = np.maximum(start_s, ready_s)
    count = len(total_s)
    return Operations(
        microbatch=np.arange(count),
        stage=np.zeros(count, dtype=np.int64),
        part=np.full(count, ""),
        ready_s=ready_s,
        start_s=start_s,
        own_s=total_s,
        end_s=end_s,
    )


def _ring_ends(
    plan: StepPlan,
    total_s: np.ndarray,
    meeting: np.ndarray,
    shared: np.ndarray,
    before_s: np.ndarray,
) -> np.ndarray:
    """(num_microbatches,) seconds at which microbatches on rings end; 0 for the others."""
    end_s = np.zeros(len(total_s))
    ranks = plan.microbatch_ranks[shared]
    _, ring = np.unique(meeting[shared], return_inverse=True)
    missing = np.bincount(ring)
    longest_s, start_s = np.zeros((2, len(missing)))
    np.maximum.at(longest_s, ring, total_s[shared])
    stop = np.searchsorted(ranks, np.arange(plan.hdp_size), side="right")
    at = np.searchsorted(ranks, np.arange(plan.hdp_size))
    offset_s = np.zeros(plan.hdp_size)  # clock of a rank, less its local seconds so far
    arrived = np.flatnonzero(at < stop)
    waiting = arrived
    while len(waiting):
        # Ranks that have just arrived make their rings start no earlier.
        here = at[arrived]
        np.maximum.at(start_s, ring[here], offset_s[arrived] + before_s[shared[here]])
        np.subtract.at(missing, ring[here], 1)
        here = at[waiting]
        complete = missing[ring[here]] == 0
        if not complete.any():
            _refuse_deadlock(plan, waiting, shared[here])
        gone, here = waiting[complete], here[complete]
        ends_s = start_s[ring[here]] + longest_s[ring[here]]
        end_s[shared[here]] = ends_s
        offset_s[gone] = ends_s - before_s[shared[here]]
        at[gone] += 1
        arrived = gone[at[gone] < stop[gone]]
        waiting = np.concatenate([waiting[~complete], arrived])
    return end_s


def _refuse_deadlock(plan: StepPlan, ranks: np.ndarray, microbatches: np.ndarray) -> None:
    where = [
        f"rank {r} at microbatch {m - int(plan.microbatch_offsets[r])}"
        for r, m in sorted(zip(ranks.tolist(), microbatches.tolist(), strict=True))[:8]
    ]
    raise ValueError(f"acyclic_order: deadlock: {'; '.join(where)} wait for each other")


# ---- pipelines ----


def walk_1f1b(plan: StepPlan, total_s: np.ndarray, forward_share: float) -> Operations:
    """Operations of a plan with pipeline stages; device index is rank * pp_size + stage."""
    programs = []
    for rank in range(plan.hdp_size):
        first, stop = plan.microbatch_offsets[rank : rank + 2].tolist()
        programs += [program_1f1b(first, stop, plan.pp_size, s) for s in range(plan.pp_size)]
    seconds = {
        "F": (total_s * forward_share).tolist(),
        "B": (total_s * (1 - forward_share)).tolist(),
    }
    return _Pipelines(plan, programs, seconds).run()


def program_1f1b(first: int, stop: int, pp_size: int, stage: int) -> list[tuple[int, str]]:
    """What a stage runs: pp_size - 1 - stage forwards, then one of each in turn, then backwards."""
    warmup = min(pp_size - 1 - stage, stop - first)
    program = [(m, "F") for m in range(first, first + warmup)]
    for m in range(first + warmup, stop):
        program += [(m, "F"), (m - warmup, "B")]
    return program + [(m, "B") for m in range(stop - warmup, stop)]


class _Pipelines:
    """Event loop: a device arrives at its next operation when it is free.

    The operation starts when its input is there and, on a ring, when all partners have arrived.
    """

    def __init__(
        self,
        plan: StepPlan,
        programs: list[list[tuple[int, str]]],
        seconds: dict[str, list[float]],
    ) -> None:
        self.plan, self.programs, self.seconds = plan, programs, seconds
        self.meeting, self.degrees = meetings(plan).tolist(), plan.degrees.tolist()
        self.position, self.free_s = [0] * len(programs), [0.0] * len(programs)
        self.done: dict[tuple[int, str, int], float] = {}  # (microbatch, part, stage) -> end
        self.partners: dict[tuple[int, str, int], list[int]] = {}  # (sequence, part, stage)
        self.sleeping: dict[tuple[int, str, int], int] = {}  # input -> device that waits for it
        self.rows: list[tuple[int, int, str, float, float, float, float]] = []
        self.ready = deque(device for device, program in enumerate(programs) if program)

    def run(self) -> Operations:
        while self.ready:
            device = self.ready.popleft()
            if self.position[device] < len(self.programs[device]):
                self._arrive(device)
        stuck = [d for d, program in enumerate(self.programs) if self.position[d] < len(program)]
        if stuck:
            where = []
            for device in stuck[:8]:
                rank, at_stage = divmod(device, self.plan.pp_size)
                m, step = self.programs[device][self.position[device]]
                index = m - int(self.plan.microbatch_offsets[rank])
                where.append(f"rank {rank} stage {at_stage} at {step}{index}")
            raise ValueError(f"acyclic_order: deadlock: {'; '.join(where)} wait for each other")
        columns = [np.array(column) for column in zip(*self.rows, strict=True)]
        microbatch, stage, part, ready_s, start_s, own_s, end_s = columns
        return Operations(
            microbatch=microbatch,
            stage=stage,
            part=part,
            ready_s=ready_s,
            start_s=start_s,
            own_s=own_s,
            end_s=end_s,
        )

    def _arrive(self, device: int) -> None:
        stages = self.plan.pp_size
        m, part = self.programs[device][self.position[device]]
        stage = device % stages
        source = _input(m, part, stage, stages)
        if source is not None and source not in self.done:
            self.sleeping[source] = device
            return
        devices = [device]
        if self.meeting[m] >= 0:
            devices = self.partners.setdefault((self.meeting[m], part, stage), [])
            devices.append(device)
            if len(devices) < self.degrees[self.meeting[m]]:
                return
        pairs = [(d, self.programs[d][self.position[d]][0]) for d in devices]
        start_s = max(self.free_s[d] for d in devices)
        if source is not None:
            inputs = (_input(k, part, stage, stages) for _, k in pairs)
            start_s = max(start_s, *(self.done[i] for i in inputs if i is not None))
        own_s = self.seconds[part]
        end_s = start_s + max(own_s[k] for _, k in pairs)
        for d, k in pairs:
            self.rows.append((k, stage, part, self.free_s[d], start_s, own_s[k], end_s))
            self.free_s[d] = end_s
            self.position[d] += 1
            self.done[(k, part, stage)] = end_s
            self.ready.append(d)
            sleeper = self.sleeping.pop((k, part, stage), None)
            if sleeper is not None:
                self.ready.append(sleeper)


def _input(m: int, part: str, stage: int, num_stages: int) -> tuple[int, str, int] | None:
    """The operation whose result (m, part, stage) needs."""
    if part == "F":
        return (m, "F", stage - 1) if stage > 0 else None
    return (m, "B", stage + 1) if stage < num_stages - 1 else (m, "F", stage)
