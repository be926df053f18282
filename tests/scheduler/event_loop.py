"""The simulator a second time: an event loop over devices, one operation at a time.

A test double of rendezvous.walk and what is built on it: same semantics, no columns.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from hdp.scheduler import StepPlan
from hdp.scheduler.rendezvous import meetings
from hdp.scheduler.simulation.events import Operations


def events_1f1b(plan: StepPlan, total_s: np.ndarray, forward_share: float) -> Operations:
    """Operations of a plan with pipeline stages; device index is rank * pp_size + stage."""
    programs = []
    for rank in range(plan.hdp_size):
        first, stop = plan.microbatch_offsets[rank : rank + 2].tolist()
        programs += [program_1f1b(first, stop, plan.pp_size, s) for s in range(plan.pp_size)]
    seconds = {
        "F": (total_s * forward_share).tolist(),
        "B": (total_s * (1 - forward_share)).tolist(),
    }
    return EventLoop(plan, programs, seconds).run()


def program_1f1b(first: int, stop: int, pp_size: int, stage: int) -> list[tuple[int, str]]:
    """What a stage runs: pp_size - 1 - stage forwards, then one of each in turn, then backwards."""
    warmup = min(pp_size - 1 - stage, stop - first)
    program = [(m, "F") for m in range(first, first + warmup)]
    for m in range(first + warmup, stop):
        program += [(m, "F"), (m - warmup, "B")]
    return program + [(m, "B") for m in range(stop - warmup, stop)]


class EventLoop:
    """A device arrives at its next operation when it is free.

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
    if part != "B":
        return (m, part, stage - 1) if stage > 0 else None
    return (m, "B", stage + 1) if stage < num_stages - 1 else (m, "F", stage)
