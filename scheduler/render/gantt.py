"""Boxes: a plan laid out on a timeline, for drawing.

A timeline knows *when* each microbatch of a rank ran, the plan knows *what* was in it. Combined, a
microbatch's compute becomes one box per piece, as wide as its share of the work. Figures and the
text timeline are both drawn from these columns.

A span belongs to the microbatch whose local index is in its name: "3", "F3" or "B3", as
`simulate()` and the runtime write it. Spans with other names keep their kind and have no sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hdp.scheduler.costs.cost_model import CostModel
from hdp.scheduler.simulation.timeline import KINDS, MICROBATCH_NAME, Timeline
from hdp.scheduler.step_plan import StepPlan

COMPUTE, COMM, OFFLOAD, WAIT, REDUCE = range(len(KINDS))


@dataclass(frozen=True, slots=True, kw_only=True)
class Boxes:
    """Columns, (num_boxes,) each. A row is a rank; with a pipeline, all ranks once per stage."""

    row: np.ndarray  # int64: stage * num_ranks + rank
    start_s: np.ndarray  # float64
    end_s: np.ndarray  # float64
    kind: np.ndarray  # int64: index into timeline.KINDS
    seq: np.ndarray  # int64: sequence of a compute box, else the ring's first one; -1 if none
    backward: np.ndarray  # bool: pipeline backward
    num_ranks: int
    num_rows: int  # num_ranks * num_stages


def make_boxes(plan: StepPlan, timeline: Timeline, cost: CostModel | None = None) -> Boxes:
    """Boxes of a plan and its timeline, planned or measured. Waiting has no box.

    cost: splits a microbatch's compute among its pieces; without it, attention and the rest of a
    layer are assumed to cost the same at 32K tokens.
    """
    if timeline.num_ranks != plan.hdp_size:
        raise ValueError(
            f"timeline of {timeline.num_ranks} ranks does not belong to a plan for {plan.hdp_size}"
        )
    kind_of = {name: i for i, name in enumerate(KINDS)}
    rows, starts, ends, kinds, microbatches, backward = [], [], [], [], [], []
    first = plan.microbatch_offsets.tolist()
    for span in timeline.spans:
        if span.kind == "wait":
            continue
        match = MICROBATCH_NAME.match(span.name)
        m = first[span.rank] + int(match[2]) if match else -1
        rows.append(span.stage * timeline.num_ranks + span.rank)
        starts.append(span.start_s)
        ends.append(span.end_s)
        kinds.append(kind_of[span.kind])
        microbatches.append(m if m < first[span.rank + 1] else -1)
        backward.append(match is not None and match[1] == "B")
    columns = {
        "row": np.array(rows, dtype=np.int64),
        "start_s": np.array(starts, dtype=np.float64),
        "end_s": np.array(ends, dtype=np.float64),
        "kind": np.array(kinds, dtype=np.int64),
        "backward": np.array(backward, dtype=bool),
    }
    return _split(plan, columns, np.array(microbatches, dtype=np.int64), timeline, cost)


def _split(
    plan: StepPlan,
    columns: dict[str, np.ndarray],
    microbatch: np.ndarray,
    timeline: Timeline,
    cost: CostModel | None,
) -> Boxes:
    """Split each compute span of a microbatch into one box per piece, by the pieces' work."""
    pieces = np.diff(plan.piece_offsets)
    is_split = (columns["kind"] == COMPUTE) & (microbatch >= 0)
    is_split[is_split] = pieces[microbatch[is_split]] > 0
    counts = np.where(is_split, pieces[np.maximum(microbatch, 0)] if len(pieces) else 1, 1)
    source = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(len(source)) - np.repeat(np.cumsum(counts) - counts, counts)
    out = {name: column[source] for name, column in columns.items()}
    seq = _first_of_ring(plan)[microbatch[source]] if len(source) else source
    seq = np.where(microbatch[source] >= 0, seq, -1)
    cut = is_split[source]
    if cut.any():
        at = plan.piece_offsets[microbatch[source[cut]]] + within[cut]
        seq[cut] = plan.piece_seqs[at]
        share_to = np.cumsum(_weights(plan, cost))  # running work over all pieces of the plan
        low = plan.piece_offsets[microbatch[source[cut]]]
        high = plan.piece_offsets[microbatch[source[cut]] + 1]
        before = np.concatenate([[0.0], share_to])
        total = before[high] - before[low]
        start, end = out["start_s"][cut], out["end_s"][cut]
        out["start_s"][cut] = start + (end - start) * (before[at] - before[low]) / total
        out["end_s"][cut] = start + (end - start) * (before[at + 1] - before[low]) / total
    num_rows = timeline.num_ranks * timeline.num_stages
    return Boxes(seq=seq, num_ranks=timeline.num_ranks, num_rows=num_rows, **out)


def _first_of_ring(plan: StepPlan) -> np.ndarray:
    """(num_microbatches,) int64: first sequence of the microbatch's ring, -1 without one."""
    first = np.full(len(plan.offload_ratio), -1, dtype=np.int64)
    filled = np.flatnonzero(np.diff(plan.piece_offsets) > 0)
    seqs = plan.piece_seqs[plan.piece_offsets[filled]]
    first[filled] = np.where(plan.degrees[seqs] > 1, seqs, -1)
    return first


def _weights(plan: StepPlan, cost: CostModel | None) -> np.ndarray:
    """(num_pieces,) float64 > 0: seconds of compute of each piece on its rank."""
    if cost is None:
        cost = CostModel.from_coefficients(quadratic_s=1 / 32768, linear_s=1.0)
    return cost.compute_s(plan.seqlens, plan.degrees, plan.gathered)[plan.piece_seqs]
