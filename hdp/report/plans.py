"""Traces as boxes: where each sequence is, for the page to draw and to answer for.

The boxes are those of `hdp plan --plot` (`hdp/scheduler/render/gantt.py`): a microbatch's compute
is one box per sequence, as wide as its share of the work. Colors are the same as well: strong for
long sequences, pale for short ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hdp.scheduler import StepPlan, Timeline
from hdp.scheduler.render.colors import colors_of, is_long
from hdp.scheduler.render.gantt import make_boxes
from hdp.scheduler.simulation.timeline import KINDS

from .trace import Trace

MOST_BOXES = 20_000  # of one timeline; beyond that a browser is slow, and Perfetto is the tool

_LONGEST_NAME = 200  # characters


def plan_view(trace: Trace) -> dict[str, Any]:
    """One traced step for the page."""
    plan = trace.plan
    views = [_timeline_view(trace, timeline) for timeline in (trace.planned, trace.measured)]
    colors = (colors_of(plan) * 255).round().astype(int) if plan.num_seqs else np.zeros((0, 3))
    return {
        "step": trace.step,
        "policy": plan.policy,
        "ranks": plan.hdp_size,
        "stages": plan.pp_size,
        "tokens": int(plan.seqlens.sum()),
        "capacity": plan.max_tokens_per_rank,
        "ids": trace.seq_ids.tolist(),
        "names": [name[:_LONGEST_NAME] for name in trace.names],
        "lengths": plan.seqlens.tolist(),
        "rings": [list(plan.ring(seq)) for seq in range(plan.num_seqs)],
        "gathered": np.flatnonzero(plan.gathered).tolist(),
        "colors": ["#{:02x}{:02x}{:02x}".format(*map(int, color)) for color in colors],
        "long": is_long(plan).astype(int).tolist() if plan.num_seqs else [],
        "kinds": list(KINDS),
        "timelines": views,
    }


def _timeline_view(trace: Trace, timeline: Timeline) -> dict[str, Any]:
    plan = trace.plan
    boxes = make_boxes(plan, timeline, trace.cost)
    drawn = boxes.end_s > boxes.start_s
    columns = {
        "row": boxes.row[drawn],
        "start": boxes.start_s[drawn],
        "end": boxes.end_s[drawn],
        "kind": boxes.kind[drawn],
        "seq": boxes.seq[drawn],
    }
    waits = [span for span in timeline.spans if span.kind == "wait" and span.duration_s > 0]
    more = {
        "row": [span.stage * timeline.num_ranks + span.rank for span in waits],
        "start": [span.start_s for span in waits],
        "end": [span.end_s for span in waits],
        "kind": [KINDS.index("wait")] * len(waits),
        "seq": [-1] * len(waits),
    }
    columns = {name: np.concatenate([columns[name], np.array(more[name])]) for name in columns}
    count = len(columns["row"])
    view: dict[str, Any] = {
        "title": timeline.title,
        "end": timeline.makespan_s,
        "idle": [round(share, 4) for share in timeline.bubble.tolist()],
        "bubble": timeline.mean_bubble,
        "count": count,
    }
    if count > MOST_BOXES:
        return view
    where = _microbatch_of(plan)
    ranks, seqs = (columns["row"] % timeline.num_ranks).tolist(), columns["seq"].tolist()
    return view | {
        "row": columns["row"].astype(int).tolist(),
        "start": [float(f"{value:.6g}") for value in columns["start"].tolist()],
        "length": [float(f"{v:.6g}") for v in (columns["end"] - columns["start"]).tolist()],
        "kind": columns["kind"].astype(int).tolist(),
        "seq": [int(seq) for seq in seqs],
        "microbatch": [where.get(pair, -1) for pair in zip(ranks, seqs, strict=True)],
    }


def _microbatch_of(plan: StepPlan) -> dict[tuple[int, int], int]:
    """(rank, sequence) -> local index of the microbatch; a sequence is on a rank at most once."""
    return {
        (rank, piece.seq): index
        for rank in range(plan.hdp_size)
        for index, microbatch in enumerate(plan.microbatches(rank))
        for piece in microbatch.pieces
    }
