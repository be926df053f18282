"""Timeline: what each rank did when in one step, planned or measured, in the same format.

A span is one stretch of time on one rank (and pipeline stage). `simulate()` builds the planned
timeline, the runtime builds the measured one from its own events, and both write the same Perfetto
JSON (https://ui.perfetto.dev); overlay the two to check a prediction.

* compute, comm, offload, reduce   the rank is busy: kernels, exposed P2P, exposed host copies, the
                                   gradient reduction
* wait                             the rank is idle: a ring partner is late, a stage has not
                                   delivered, or other ranks are still working

Time not covered by any span is waiting too. Busy time counts "compute" only, so the bubble is the
share of the step in which a rank does no useful work: 1 - busy / makespan.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

KINDS = ("compute", "comm", "offload", "wait", "reduce")

# Perfetto's reserved color names: one hue per kind in its legacy JSON importer.
_COLORS = {
    "compute": "good",
    "comm": "bad",
    "offload": "yellow",
    "wait": "grey",
    "reduce": "terrible",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One stretch of time of one rank, in seconds from the start of the step."""

    rank: int
    start_s: float
    end_s: float
    kind: str  # one of KINDS
    name: str = ""
    stage: int = 0  # pipeline stage

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"span kind {self.kind!r} must be one of {', '.join(KINDS)}")
        if not self.end_s >= self.start_s:
            raise ValueError(
                f"span {self.name!r} of rank {self.rank} ends at {self.end_s} s, "
                f"before its start at {self.start_s} s"
            )

    @property
    def duration_s(self) -> float:
        """Seconds from start to end."""
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """All spans of one step. `title` names it in figures and traces ("planned", "measured")."""

    spans: tuple[Span, ...]
    num_ranks: int
    num_stages: int = 1
    title: str = "planned"

    def __post_init__(self) -> None:
        object.__setattr__(self, "spans", tuple(self.spans))
        for span in self.spans:
            if not (0 <= span.rank < self.num_ranks and 0 <= span.stage < self.num_stages):
                raise ValueError(
                    f"span {span.name!r} is on rank {span.rank}, stage {span.stage} of a timeline "
                    f"with {self.num_ranks} ranks and {self.num_stages} stages"
                )

    @property
    def makespan_s(self) -> float:
        """End of the last span, seconds."""
        return max((span.end_s for span in self.spans), default=0.0)

    def seconds(self, kind: str) -> np.ndarray:
        """(num_ranks,) float64: seconds of one kind on each rank, mean over its stages."""
        total = np.zeros(self.num_ranks)
        mine = [span for span in self.spans if span.kind == kind]
        np.add.at(total, [span.rank for span in mine], [span.duration_s for span in mine])
        return total / self.num_stages

    @property
    def busy_s(self) -> np.ndarray:
        """(num_ranks,) float64: seconds of useful work ("compute") on each rank."""
        return self.seconds("compute")

    @property
    def bubble(self) -> np.ndarray:
        """(num_ranks,) float64 in [0, 1]: share of the step in which each rank does not compute."""
        makespan_s = self.makespan_s
        return 1.0 - self.busy_s / makespan_s if makespan_s > 0 else np.zeros(self.num_ranks)

    @property
    def mean_bubble(self) -> float:
        """Mean of `bubble` over the ranks: the step line's "bubble"."""
        return float(self.bubble.mean())

    def of_rank(self, rank: int) -> list[Span]:
        """Spans of one rank, by stage and start."""
        return sorted(
            (span for span in self.spans if span.rank == rank),
            key=lambda span: (span.stage, span.start_s, span.end_s),
        )

    def to_perfetto(self, path: str | Path, *, others: Iterable[Timeline] = ()) -> None:
        """Write Chrome trace JSON that https://ui.perfetto.dev opens.

        One process per timeline (this one, then `others`, such as the measured one), one thread per
        rank and stage. Times are microseconds.
        """
        events = []
        for pid, timeline in enumerate((self, *others)):
            events += timeline._events(pid)
        text = json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
        Path(path).write_text(text, encoding="ascii")

    def _events(self, pid: int) -> list[dict[str, Any]]:
        def named(event: str, tid: int, name: str) -> dict[str, Any]:
            return {"ph": "M", "pid": pid, "tid": tid, "name": event, "args": {"name": name}}

        events = [named("process_name", 0, self.title)]
        for rank in range(self.num_ranks):
            for stage in range(self.num_stages):
                name = f"rank {rank}" + (f" stage {stage}" if self.num_stages > 1 else "")
                events.append(named("thread_name", rank * self.num_stages + stage, name))
        for span in self.spans:
            events.append(
                {
                    "ph": "X",
                    "pid": pid,
                    "tid": span.rank * self.num_stages + span.stage,
                    "name": span.name or span.kind,
                    "cat": span.kind,
                    "cname": _COLORS[span.kind],
                    "ts": span.start_s * 1e6,
                    "dur": span.duration_s * 1e6,
                }
            )
        return events
