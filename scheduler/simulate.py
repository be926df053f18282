"""The simulator: a discrete-event run of a StepPlan, with the semantics that the runtime has.

1. Each rank walks its microbatches in order; a microbatch takes `fixed_s`, its pieces, and the host
   copies that they do not hide.
2. A microbatch on a ring starts when all ranks of the ring are there and lasts, on all of them, as
   long as on the slowest.
3. With pp_size > 1 each rank is a pipeline. Its stages run 1F1B: stage s runs min(pp - 1 - s, n)
   forwards, then alternates, then drains; forward of a stage follows that of the stage before,
   backward follows that of the stage after. Ring partners meet in each stage, in forward and in
   backward. Stages take the same time.
4. The reduction of gradients starts when all ranks are done; if every rank's last microbatch is
   local, it starts as soon as all ranks are in that microbatch's backward.

This is the verifier of deadlock freedom: if ranks wait for each other in a circle the run stops
short and the circle is reported (`test_deadlock_is_found`).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from .cost import CostModel
from .plan import StepPlan
from .timeline import Span, Timeline


@dataclass(frozen=True, slots=True, kw_only=True)
class MicrobatchTimes:
    """Columns of seconds, (num_microbatches,) float64 each, forward + backward (of one stage)."""

    compute_s: np.ndarray  # kernels, fixed_s included
    comm_s: np.ndarray  # exposed P2P
    offload_s: np.ndarray  # exposed host copies

    @property
    def total_s(self) -> np.ndarray:
        return self.compute_s + self.comm_s + self.offload_s


def microbatch_times(plan: StepPlan, cost: CostModel) -> MicrobatchTimes:
    """Seconds of each microbatch of the plan, columnar.

    Pieces of one microbatch that share a ring go round together: a long one hides the transfer of a
    short one, and they take the ring's steps once (`test_pieces_of_a_ring_go_round_together`).
    """
    degrees, num_microbatches = plan.degrees, len(plan.offload_ratio)
    owner = np.repeat(np.arange(num_microbatches), np.diff(plan.piece_offsets))

    def by_microbatch(per_seq: np.ndarray) -> np.ndarray:
        return np.bincount(owner, weights=per_seq[plan.piece_seqs], minlength=num_microbatches)

    on_ring = degrees > 1
    block_s = cost.attention_s(plan.seqlens, degrees) / degrees
    transfer_s = cost.transfer_s(plan.seqlens, degrees, rings_across_nodes(plan))
    steps = np.zeros(num_microbatches)
    np.maximum.at(steps, owner, degrees[plan.piece_seqs] - 1)
    late_s = by_microbatch(np.where(on_ring, transfer_s - block_s, 0.0))
    rings_beyond_one = np.maximum(by_microbatch(on_ring.astype(float)) - 1, 0)
    kernels_s = by_microbatch(cost.compute_s(plan.seqlens, degrees))
    kernels_s = kernels_s - cost.ring_step_s * steps * rings_beyond_one
    return MicrobatchTimes(
        compute_s=kernels_s + cost.fixed_s,
        comm_s=steps * np.maximum(late_s, 0.0),
        offload_s=cost.offload_s(plan.microbatch_tokens, plan.offload_ratio, kernels_s),
    )


def rings_across_nodes(plan: StepPlan) -> np.ndarray:
    """(num_seqs,) bool: whether the ranks of each sequence are on more than one node."""
    if plan.ranks_per_node is None or not plan.num_seqs:
        return np.zeros(plan.num_seqs, dtype=bool)
    nodes = plan.ring_ranks // plan.ranks_per_node
    starts = plan.ring_offsets[:-1]
    return np.minimum.reduceat(nodes, starts) != np.maximum.reduceat(nodes, starts)


def simulate(plan: StepPlan, cost: CostModel) -> Timeline:
    """Run the plan and return its timeline. Raises ValueError if it deadlocks."""
    times = microbatch_times(plan, cost)
    if plan.pp_size == 1:
        runs = _run_flat(plan, times.total_s)
    else:
        runs = _run_1f1b(plan, times.total_s, cost.forward_share)
    spans = _spans(plan, times, runs)
    spans += _tail(plan, runs, cost)
    return Timeline(spans=tuple(spans), num_ranks=plan.hdp_size, num_stages=plan.pp_size)


def finish_s(plan: StepPlan, cost: CostModel) -> float:
    """Seconds at which the simulated step ends, without making a timeline."""
    total_s = microbatch_times(plan, cost).total_s
    if plan.pp_size == 1:
        runs = _run_flat(plan, total_s)
    else:
        runs = _run_1f1b(plan, total_s, cost.forward_share)
    return _reduction(plan, runs, cost)[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """One operation on one device; `end_s` is that of its slowest partner, `own_s` its own time."""

    rank: int
    stage: int
    microbatch: int
    part: str  # "" whole, "F" forward, "B" backward
    ready_s: float  # the device is free
    start_s: float
    own_s: float
    end_s: float


def _meetings(plan: StepPlan) -> np.ndarray:
    """(num_microbatches,) int64: first sequence of microbatches on a ring, -1 for local ones."""
    meetings = np.full(len(plan.offload_ratio), -1, dtype=np.int64)
    filled = np.flatnonzero(np.diff(plan.piece_offsets) > 0)
    first = plan.piece_seqs[plan.piece_offsets[filled]]
    meetings[filled] = np.where(plan.degrees[first] > 1, first, -1)
    return meetings


def _run_flat(plan: StepPlan, total_s: np.ndarray) -> list[_Run]:
    """pp_size 1: forward and backward of a microbatch are one operation."""
    programs = [
        [(m, "") for m in range(plan.microbatch_offsets[r], plan.microbatch_offsets[r + 1])]
        for r in range(plan.hdp_size)
    ]
    return _execute(plan, programs, {"": total_s.tolist()}, 1)


def _run_1f1b(plan: StepPlan, total_s: np.ndarray, forward_share: float) -> list[_Run]:
    """The 1F1B order of every (rank, stage); device index is rank * pp_size + stage."""
    programs = []
    for rank in range(plan.hdp_size):
        first, stop = plan.microbatch_offsets[rank : rank + 2].tolist()
        for stage in range(plan.pp_size):
            warmup = min(plan.pp_size - 1 - stage, stop - first)
            program = [(m, "F") for m in range(first, first + warmup)]
            for m in range(first + warmup, stop):
                program += [(m, "F"), (m - warmup, "B")]
            program += [(m, "B") for m in range(stop - warmup, stop)]
            programs.append(program)
    forward_s = (total_s * forward_share).tolist()
    backward_s = (total_s * (1 - forward_share)).tolist()
    return _execute(plan, programs, {"F": forward_s, "B": backward_s}, plan.pp_size)


def _execute(
    plan: StepPlan,
    programs: list[list[tuple[int, str]]],
    seconds: dict[str, list[float]],
    num_stages: int,
) -> list[_Run]:
    """Event loop: a device arrives at its next operation when it is free.

    The operation starts when its input is there and, on a ring, when all partners have arrived.
    """
    meetings = _meetings(plan).tolist()
    degrees = plan.degrees.tolist()
    position, free_s = [0] * len(programs), [0.0] * len(programs)
    done: dict[tuple[int, str, int], float] = {}  # (microbatch, part, stage) -> end_s
    gathered: dict[tuple[int, str, int], list[int]] = {}
    sleeping: dict[tuple[int, str, int], int] = {}  # input that a device waits for -> device
    runs: list[_Run] = []
    ready = deque(device for device, program in enumerate(programs) if program)
    while ready:
        device = ready.popleft()
        if position[device] == len(programs[device]):
            continue
        m, part = programs[device][position[device]]
        stage = device % num_stages
        source = _input(m, part, stage, num_stages)
        if source is not None and source not in done:
            sleeping[source] = device
            continue
        partners = [device]
        if meetings[m] >= 0:
            partners = gathered.setdefault((meetings[m], part, stage), [])
            partners.append(device)
            if len(partners) < degrees[meetings[m]]:
                continue
        ops = [(d, programs[d][position[d]][0]) for d in partners]
        inputs = (_input(k, part, stage, num_stages) for _, k in ops)
        start_s = max(max(done[i] for i in inputs if i is not None) if source else 0.0,
                      max(free_s[d] for d, _ in ops))  # fmt: skip
        end_s = start_s + max(seconds[part][k] for _, k in ops)
        for d, k in ops:
            runs.append(_Run(rank=d // num_stages, stage=stage, microbatch=k, part=part,
                             ready_s=free_s[d], start_s=start_s, own_s=seconds[part][k],
                             end_s=end_s))  # fmt: skip
            free_s[d] = end_s
            position[d] += 1
            done[(k, part, stage)] = end_s
            ready.append(d)
            if (k, part, stage) in sleeping:
                ready.append(sleeping.pop((k, part, stage)))
    stuck = [d for d in range(len(programs)) if position[d] < len(programs[d])]
    if stuck:
        where = []
        for d in stuck[:8]:
            m, part = programs[d][position[d]]
            index = m - int(plan.microbatch_offsets[d // num_stages])
            where.append(f"rank {d // num_stages} stage {d % num_stages} at {part}{index}")
        raise ValueError(f"acyclic_order: deadlock: {'; '.join(where)} wait for each other")
    return runs


def _input(m: int, part: str, stage: int, num_stages: int) -> tuple[int, str, int] | None:
    """The operation whose result (m, part, stage) needs from another stage."""
    if part == "F" and stage > 0:
        return (m, "F", stage - 1)
    if part == "B":
        return (m, "B", stage + 1) if stage < num_stages - 1 else (m, "F", stage)
    return None


def _reduction(plan: StepPlan, runs: list[_Run], cost: CostModel) -> tuple[float, float]:
    """(start, end) seconds of the gradient reduction; its end is the step's."""
    all_done_s = max(run.end_s for run in runs)
    start_s = all_done_s
    if plan.ends_local and plan.pp_size == 1:
        last = plan.microbatch_offsets[1:] - 1
        begun = {run.microbatch: run.start_s + cost.forward_share * run.own_s for run in runs}
        start_s = max(begun[m] for m in last.tolist())
    return start_s, max(all_done_s, start_s + cost.reduce_s)


def _spans(plan: StepPlan, times: MicrobatchTimes, runs: list[_Run]) -> list[Span]:
    """Spans of all operations: waiting for partners, compute, exposed copies, waiting for them."""
    shares = {
        "compute": (times.compute_s / np.maximum(times.total_s, 1e-300)).tolist(),
        "comm": (times.comm_s / np.maximum(times.total_s, 1e-300)).tolist(),
        "offload": (times.offload_s / np.maximum(times.total_s, 1e-300)).tolist(),
    }
    first = plan.microbatch_offsets.tolist()
    spans = []
    for run in runs:
        name = f"{run.part}{run.microbatch - first[run.rank]}"
        at_s = run.ready_s
        stretches = [("wait", run.start_s)]
        for kind, share in shares.items():
            at_end_s = stretches[-1][1] + share[run.microbatch] * run.own_s
            stretches.append((kind, at_end_s))
        stretches.append(("wait", run.end_s))
        for kind, end_s in stretches:
            if end_s - at_s > 1e-12 * run.end_s:
                spans.append(Span(rank=run.rank, stage=run.stage, kind=kind, name=name,
                                  start_s=at_s, end_s=end_s))  # fmt: skip
                at_s = end_s
    return spans


def _tail(plan: StepPlan, runs: list[_Run], cost: CostModel) -> list[Span]:
    """From each device's last operation to the end of the step: waiting, then the reduction."""
    start_s, end_s = _reduction(plan, runs, cost)
    free_s = np.zeros((plan.hdp_size, plan.pp_size))
    for run in runs:
        free_s[run.rank, run.stage] = max(free_s[run.rank, run.stage], run.end_s)
    spans = []
    for (rank, stage), own_end_s in np.ndenumerate(free_s):
        at_s = float(own_end_s)
        for kind, until_s in (("wait", max(start_s, at_s)), ("reduce", end_s)):
            if cost.reduce_s == 0.0 and kind == "reduce":
                kind = "wait"
            if until_s - at_s > 1e-12 * end_s:
                spans.append(Span(rank=rank, stage=stage, kind=kind, name="gradients",
                                  start_s=at_s, end_s=until_s))  # fmt: skip
                at_s = until_s
    return spans
