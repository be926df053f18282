"""Timelines as data: planned and measured ones, and their Perfetto JSON."""

from __future__ import annotations

import json

import pytest

from hdp.scheduler import CostModel, Span, StepPlan, Timeline, plan, simulate


def small(title: str = "planned") -> Timeline:
    spans = (
        Span(rank=0, start_s=0.0, end_s=3.0, kind="compute", name="0"),
        Span(rank=1, start_s=0.0, end_s=1.0, kind="wait"),
        Span(rank=1, start_s=1.0, end_s=2.0, kind="compute", name="0"),
        Span(rank=1, start_s=2.0, end_s=4.0, kind="comm"),
    )
    return Timeline(spans=spans, num_ranks=2, title=title)


def test_numbers() -> None:
    timeline = small()
    assert timeline.makespan_s == 4.0
    assert timeline.busy_s.tolist() == [3.0, 1.0]
    assert timeline.bubble.tolist() == [0.25, 0.75]
    assert timeline.mean_bubble == 0.5
    assert timeline.seconds("comm").tolist() == [0.0, 2.0]
    assert [span.kind for span in timeline.of_rank(1)] == ["wait", "compute", "comm"]


def test_empty_timeline() -> None:
    timeline = Timeline(spans=(), num_ranks=3)
    assert timeline.makespan_s == 0.0 and timeline.mean_bubble == 0.0


def test_perfetto(tmp_path) -> None:
    path = tmp_path / "trace.json"
    small().to_perfetto(path, others=[small("measured")])
    events = json.loads(path.read_text())["traceEvents"]
    names = {(e["pid"], e["args"]["name"]) for e in events if e["name"] == "process_name"}
    assert names == {(0, "planned"), (1, "measured")}
    spans = [e for e in events if e["ph"] == "X"]
    assert len(spans) == 8
    assert spans[0] == {
        "ph": "X", "pid": 0, "tid": 0, "name": "0", "cat": "compute", "cname": "good",
        "ts": 0.0, "dur": 3e6,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "sleep"}, "'sleep' must be one of compute"),
        ({"end_s": -1.0}, "before its start"),
        ({"end_s": float("nan")}, "before its start"),
    ],
)
def test_bad_spans(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Span(**{"rank": 0, "start_s": 0.0, "end_s": 1.0, "kind": "compute", **change})


def test_spans_of_other_ranks() -> None:
    span = Span(rank=2, start_s=0.0, end_s=1.0, kind="compute")
    with pytest.raises(ValueError, match="rank 2, stage 0 of a timeline with 2 ranks"):
        Timeline(spans=(span,), num_ranks=2)


def test_slices_are_named_by_what_ran(tmp_path) -> None:
    cost = CostModel.from_coefficients(quadratic_s=1e-9, linear_s=1e-4)
    made = plan([70_000, 300, 200], hdp_size=4, max_tokens_per_rank=20_000, cost=cost)
    path = tmp_path / "trace.json"
    simulate(made, cost).to_perfetto(path)
    slices = [e for e in json.loads(path.read_text())["traceEvents"] if e["ph"] == "X"]
    ring = [e for e in slices if e["name"].startswith("seq 0 (70,000 tokens) ring of 4")]
    assert {e["tid"] for e in ring} == {0, 1, 2, 3}
    assert ring[0]["args"]["ring"] == [0, 1, 2, 3] and ring[0]["args"]["sequences"][0] == 0
    made = plan([70_000, 300], hdp_size=4, max_tokens_per_rank=20_000, cost=cost, pp_size=2)
    simulate(made, cost).to_perfetto(path)
    names = {e["name"] for e in json.loads(path.read_text())["traceEvents"] if e["ph"] == "X"}
    assert {f"{way}: seq 0 (70,000 tokens) ring of 4" for way in ("forward", "backward")} <= names


def test_waiting_for_the_last_rank_is_waiting() -> None:
    """A collective takes time from the moment when the last rank arrives."""
    made = StepPlan.from_lists([3, 1], [[0], [1]], [[[0]], [[1]]], max_tokens_per_rank=8)
    spans = [
        Span(rank=0, start_s=0.0, end_s=3.0, kind="compute", name="0"),
        Span(rank=0, start_s=3.0, end_s=3.5, kind="reduce", name="reduce gradients"),
        Span(rank=1, start_s=0.0, end_s=1.0, kind="compute", name="0"),
        Span(rank=1, start_s=1.0, end_s=3.5, kind="reduce", name="reduce gradients"),
    ]
    timeline = Timeline.measured(spans, made)
    assert timeline.seconds("reduce").tolist() == [0.5, 0.5]
    assert timeline.seconds("wait").tolist() == [0.0, 2.0]
    assert timeline.makespan_s == 3.5
