"""Trace: one step's plan, the ids of its sequences, and its planned and measured timelines.

`--trace-step N` writes trace_N.json next to the timelines; `hdp report` reads it back. The file
holds plain JSON: {"version": 1, "step": 3, "plan": {...}, "seq_ids": [...], "names": [...],
"cost": {...} or null,
"planned": [[rank, stage, kind, name, start_s, end_s], ...], "measured": [...]}.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hdp.scheduler import CostModel, Span, StepPlan, Timeline

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """One traced step."""

    step: int
    plan: StepPlan
    seq_ids: np.ndarray  # (num_seqs,) int64: the plan's sequences, as ids in the data
    names: Sequence[str] = ()  # (num_seqs,) where each is from, such as a file; or none at all
    cost: CostModel | None  # splits a microbatch's time among its sequences in pictures
    planned: Timeline
    measured: Timeline

    def to_json(self) -> str:
        """The text of trace_STEP.json."""
        return json.dumps(
            {
                "version": FORMAT_VERSION,
                "step": self.step,
                "plan": json.loads(self.plan.to_json()),
                "seq_ids": np.asarray(self.seq_ids).tolist(),
                "names": list(self.names),
                "cost": None if self.cost is None else json.loads(self.cost.to_json()),
                "planned": _rows(self.planned),
                "measured": _rows(self.measured),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Trace:
        """Inverse of `to_json`. Raises ValueError for text that is not a trace."""
        try:
            data = json.loads(text)
            version = data["version"]
            if version != FORMAT_VERSION:
                raise ValueError(f"trace has version {version!r}, expected {FORMAT_VERSION}")
            plan = StepPlan.from_json(json.dumps(data["plan"])).validate()
            seq_ids = np.array([int(number) for number in data["seq_ids"]], dtype=np.int64)
            if len(seq_ids) != plan.num_seqs:
                raise ValueError(f"{len(seq_ids)} seq_ids for {plan.num_seqs} sequences")
            names = [str(name) for name in data["names"]]
            if names and len(names) != plan.num_seqs:
                raise ValueError(f"{len(names)} names for {plan.num_seqs} sequences")
            cost = data["cost"]
            return cls(
                step=int(data["step"]),
                plan=plan,
                seq_ids=seq_ids,
                names=names,
                cost=None if cost is None else CostModel.from_json(json.dumps(cost)),
                planned=_timeline(data["planned"], plan, "planned"),
                measured=_timeline(data["measured"], plan, "measured"),
            )
        except (KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            raise ValueError(f"not a trace: {error!r}") from error
        except OverflowError as error:
            raise ValueError(f"not a trace: a number is too large ({error})") from error


def _rows(timeline: Timeline) -> list[list[Any]]:
    return [
        [span.rank, span.stage, span.kind, span.name, round(span.start_s, 9), round(span.end_s, 9)]
        for span in timeline.spans
    ]


def _timeline(rows: list[list[Any]], plan: StepPlan, title: str) -> Timeline:
    spans = []
    for rank, stage, kind, name, start_s, end_s in rows:
        if not (math.isfinite(start_s) and math.isfinite(end_s)):
            raise ValueError(f"span {name!r} of rank {rank} has no finite time")
        spans.append(
            Span(
                rank=int(rank),
                stage=int(stage),
                kind=str(kind),
                name=str(name),
                start_s=float(start_s),
                end_s=float(end_s),
            )
        )
    return Timeline(
        spans=tuple(spans), num_ranks=plan.hdp_size, num_stages=plan.pp_size, title=title
    )
