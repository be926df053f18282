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
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from hdp.scheduler.plain import to_plain
from hdp.scheduler.step_plan import Microbatch, StepPlan

KINDS = ("compute", "comm", "offload", "wait", "reduce")

# The span of a rank's microbatch: its local index, in a pipeline after F (forward) or B (backward).
MICROBATCH_NAME = re.compile(r"^(F|B|)([0-9]+)$")
_PASSES = {"F": "forward", "B": "backward"}
_MOST_LISTED = 64  # sequences or ranks in the details of a slice

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
    """All spans of one step. `title` names it in figures and traces ("planned", "measured"); with
    `plan`, slices of a trace are named by what ran: "seq 17 (70,000 tokens) ring of 4"."""

    spans: tuple[Span, ...]
    num_ranks: int
    num_stages: int = 1
    title: str = "planned"
    plan: StepPlan | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "spans", tuple(self.spans))
        for span in self.spans:
            if not (0 <= span.rank < self.num_ranks and 0 <= span.stage < self.num_stages):
                raise ValueError(
                    f"span {span.name!r} is on rank {span.rank}, stage {span.stage} of a timeline "
                    f"with {self.num_ranks} ranks and {self.num_stages} stages"
                )

    @classmethod
    def measured(cls, spans: Iterable[Span], plan: StepPlan) -> Timeline:
        """The timeline of a step that ran: spans of all its ranks.

        A "reduce" span begins when its rank arrives and ends when all have: until the last one
        arrives, the rank waits, and that part becomes a "wait" span.
        """
        spans = tuple(spans)
        last_s: dict[str, float] = {}
        for span in spans:
            if span.kind == "reduce":
                last_s[span.name] = max(last_s.get(span.name, 0.0), span.start_s)
        parts: list[Span] = []
        for span in spans:
            if span.kind == "reduce" and span.start_s < last_s[span.name]:
                middle_s = min(last_s[span.name], span.end_s)
                parts.append(replace(span, kind="wait", end_s=middle_s))
                span = replace(span, start_s=middle_s)
            if span.end_s > span.start_s:
                parts.append(span)
        return cls(spans=tuple(parts), num_ranks=plan.hdp_size, title="measured", plan=plan)

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
        rank and stage. Times are microseconds. A timeline with a plan names its slices by sequence,
        length and ring, and has the details under "args".
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
        rows: dict[int, list[Microbatch]] = {}
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
            match = MICROBATCH_NAME.match(span.name)
            if self.plan is None or match is None:
                continue
            if span.rank not in rows:
                rows[span.rank] = self.plan.microbatches(span.rank)
            if int(match[2]) < len(rows[span.rank]):
                events[-1] |= _described(span, match, rows[span.rank][int(match[2])])
        return events


def _described(span: Span, match: re.Match[str], microbatch: Microbatch) -> dict[str, Any]:
    """Name and args of a slice: what its microbatch holds."""
    pieces, ring = microbatch.pieces, microbatch.ring
    on_ring = [piece for piece in pieces if piece.degree > 1]
    tokens = sum(piece.seqlen for piece in on_ring or pieces)
    some = on_ring or list(pieces)
    what = f"{len(some)} seqs ({tokens:,} tokens)" if some else "empty"
    if len(some) == 1:
        what = f"seq {some[0].seq} ({tokens:,} tokens)"
    if ring:
        what += f" ring of {len(ring)}" + (", gathered" if microbatch.gathered else "")
    if on_ring and len(pieces) > len(on_ring):
        what += f" + {len(pieces) - len(on_ring)} local"
    step = _PASSES.get(match[1], "")
    words = [step, "" if span.kind == "compute" else span.kind]
    prefix = " ".join(word for word in words if word)
    args = {
        "microbatch": int(match[2]),
        "pass": step or "forward and backward",
        "tokens_on_rank": microbatch.num_tokens(span.rank),
        "sequences": [piece.seq for piece in pieces[:_MOST_LISTED]],
        "seqlens": [piece.seqlen for piece in pieces[:_MOST_LISTED]],
        "num_sequences": len(pieces),
        "ring": list(ring[:_MOST_LISTED]),
        "ring_size": len(ring),
        "gathered": microbatch.gathered,
        "offload_ratio": microbatch.offload_ratio,
    }
    return {"name": f"{prefix}: {what}" if prefix else what, "args": to_plain(args)}
