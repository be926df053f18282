"""Timelines as data: planned and measured ones, and their Perfetto JSON."""

from __future__ import annotations

import json

import pytest

from hdp.scheduler import Span, Timeline


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
