"""Pictures and text reports: every second of a plan is drawn once, where it happened."""

from __future__ import annotations

import numpy as np
import pytest

from hdp.scheduler import CostModel, Span, StepPlan, Timeline, plan, simulate
from hdp.scheduler.render.gantt import COMM, COMPUTE, make_boxes
from hdp.scheduler.render.text import (
    align,
    ascii_timeline,
    bytes_text,
    kv_token_steps,
    markdown,
    seconds_text,
    summarize,
    table,
    tokens_text,
)
from hdp.scheduler.workloads.generate import draw

COST = CostModel.from_coefficients(
    quadratic_s=5e-9, linear_s=2e-4, fixed_s=0.01, kv_bytes_per_token=1e6,
    intra_node_bytes_per_s=2e10, inter_node_bytes_per_s=1e10, reduce_s=0.1,
)  # fmt: skip


def _planned(policy: str = "hdp", ranks: int = 8, **options) -> tuple[StepPlan, Timeline]:
    seqlens = draw("lognormal", num_sequences=12 * ranks, seed=2, max_length=40_000)
    made = plan(
        seqlens, hdp_size=ranks, max_tokens_per_rank=8192, cost=COST, policy=policy, **options
    )
    return made, simulate(made, COST)


# ---- boxes ----


@pytest.mark.parametrize("options", [{}, {"policy": "static"}, {"pp_size": 2}])
@pytest.mark.parametrize("cost", [COST, None])
def test_boxes_cover_all_work_once(options: dict, cost: CostModel | None) -> None:
    made, timeline = _planned(**options)
    boxes = make_boxes(made, timeline, cost)
    assert boxes.num_rows == timeline.num_ranks * timeline.num_stages
    compute = boxes.kind == COMPUTE
    drawn = np.bincount(
        boxes.row[compute], (boxes.end_s - boxes.start_s)[compute], minlength=boxes.num_rows
    )
    busy_s = drawn.reshape(timeline.num_stages, timeline.num_ranks).mean(axis=0)
    np.testing.assert_allclose(busy_s, timeline.busy_s, rtol=1e-9)
    # Every sequence is drawn on each rank of its ring, and nowhere else.
    ranks = boxes.row % timeline.num_ranks
    for seq in range(made.num_seqs):
        assert set(ranks[compute & (boxes.seq == seq)].tolist()) == set(made.ring(seq))


def test_boxes_of_a_row_do_not_overlap() -> None:
    made, timeline = _planned("static")
    boxes = make_boxes(made, timeline, COST)
    for row in range(boxes.num_rows):
        mine = np.flatnonzero(boxes.row == row)
        mine = mine[np.argsort(boxes.start_s[mine])]
        assert (boxes.start_s[mine][1:] >= boxes.end_s[mine][:-1] - 1e-9).all()


def test_rings_are_drawn_equally_on_their_ranks() -> None:
    made, timeline = _planned("static")
    boxes = make_boxes(made, timeline, COST)
    seq = int(np.argmax(made.seqlens))
    mine = (boxes.kind == COMPUTE) & (boxes.seq == seq)
    assert mine.sum() == made.degrees[seq] > 1
    assert np.ptp(boxes.start_s[mine]) < 1e-6
    assert np.ptp(boxes.end_s[mine]) < 1e-6


def test_measured_spans_of_other_names_are_kept() -> None:
    made = StepPlan.from_lists([5], [[0]], [[[0]]], max_tokens_per_rank=8)
    spans = (
        Span(rank=0, start_s=0.0, end_s=1.0, kind="compute", name="0"),
        Span(rank=0, start_s=1.0, end_s=2.0, kind="compute", name="optimizer"),
        Span(rank=0, start_s=2.0, end_s=3.0, kind="comm", name="7"),
    )
    boxes = make_boxes(made, Timeline(spans=spans, num_ranks=1))
    assert boxes.seq.tolist() == [0, -1, -1]
    assert boxes.kind.tolist() == [COMPUTE, COMPUTE, COMM]


def test_timeline_of_another_plan_is_refused() -> None:
    made, _ = _planned()
    with pytest.raises(ValueError, match="timeline of 3 ranks"):
        make_boxes(made, Timeline(spans=(), num_ranks=3))


def test_empty_microbatches_draw_nothing() -> None:
    made = plan([5], hdp_size=4, max_tokens_per_rank=8, cost=COST)
    boxes = make_boxes(made, simulate(made, COST), COST)
    assert set(boxes.seq[boxes.kind == COMPUTE].tolist()) <= {0, -1}


# ---- text ----


def test_text_timeline_fits_and_shows_rings() -> None:
    seqlens = [40_000, 3000, 3000, 3000, 3000]
    made = plan(seqlens, hdp_size=8, max_tokens_per_rank=8192, cost=COST)
    text = ascii_timeline(made, simulate(made, COST), cost=COST, width=70)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 70
    assert any("|AAAA" in line for line in lines)
    assert f"A 39K on {made.degrees[0]}" in text
    assert text.isascii()


def test_equal_ranks_share_a_line() -> None:
    made, timeline = _planned("static", ranks=16)
    first = ascii_timeline(made, timeline, cost=COST, width=80).splitlines()[0]
    cp_size = made.notes["cp_size"]
    assert cp_size > 1
    assert first.split("|")[0].strip() == f"0-{cp_size - 1}"


def test_stages_have_lines_of_their_own() -> None:
    made, timeline = _planned("static", ranks=8, pp_size=2)
    text = ascii_timeline(made, timeline, cost=COST, width=80)
    names = [line.split("|")[0].strip() for line in text.splitlines() if "|" in line]
    assert names[0].startswith("stage 0: 0-")
    assert any(name.startswith("stage 1: 0-") for name in names)


def test_many_ranks_are_thinned_out() -> None:
    made, timeline = _planned(ranks=64)
    lines = ascii_timeline(made, timeline, cost=COST, width=80, max_lines=10).splitlines()
    assert sum("|" in line for line in lines) == 10
    assert any("in all)" in line for line in lines)


def test_left_out_ranks_are_named() -> None:
    """Every rank is on a line or in a gap that says so, in order."""
    for ranks, options in ((64, {}), (40, {"pp_size": 2})):
        made, timeline = _planned(ranks=ranks, **options)
        text = ascii_timeline(made, timeline, cost=COST, width=80, max_lines=10)
        body = [line for line in text.splitlines() if "|" in line or line.endswith("not shown")]
        rows: list[int] = []
        for line in body:
            stage, name = 0, line.replace(" : not shown", "").split("|")[0]
            ends = []
            for part in name.split(" to "):
                stage = int(part.split(":")[0].split()[1]) if "stage" in part else 0
                ends += [stage * ranks + int(r) for r in part.split(":")[-1].strip().split("-")]
            rows += range(ends[0], ends[-1] + 1)
        assert rows == list(range(timeline.num_ranks * timeline.num_stages))
        assert any("not shown" in line for line in body)


def test_neighbors_are_apart_unless_they_share_a_ring(monkeypatch, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib import collections

    from hdp.scheduler.render.figure import draw_plans, figure_class

    figure_class()  # imports what derives from PolyCollection
    shapes: list[np.ndarray] = []
    make = collections.PolyCollection
    monkeypatch.setattr(
        collections, "PolyCollection", lambda c, **k: shapes.extend(c) or make(c, **k)
    )
    rings = [[0, 1], *([r] for r in range(64))]
    lists = [[[0], [1 + r]] if r < 2 else [[1 + r]] for r in range(64)]
    made = StepPlan.from_lists([9000, *[5000] * 64], rings, lists, max_tokens_per_rank=8192)
    draw_plans([("a", made, simulate(made, COST))], tmp_path / "a.png", cost=COST)
    heights = [float(np.ptp(shape[:, 1])) for shape in shapes]
    assert max(heights) == pytest.approx(1.8), "the ring is one block"
    assert sum(abs(height - 0.8) < 1e-9 for height in heights) >= 64, "all others have a gap"


def test_idle_time_is_blank() -> None:
    made = StepPlan.from_lists([9, 1], [[0], [1]], [[[0]], [[1]]], max_tokens_per_rank=16)
    cost = CostModel.from_coefficients(quadratic_s=0.0, linear_s=1.0)
    text = ascii_timeline(made, simulate(made, cost), cost=cost, width=40)
    busy, idle = text.splitlines()[:2]
    assert busy.count("=") > 8 * idle.count("=") > 0


def test_more_long_sequences_than_letters() -> None:
    made = plan([20_000] * 60, hdp_size=8, max_tokens_per_rank=8192, cost=COST)
    text = ascii_timeline(made, simulate(made, COST), cost=COST, width=100)
    assert "# 8 more long ones" in text


def test_summary_adds_up() -> None:
    made, timeline = _planned("static")
    summary = summarize(made, COST, timeline)
    assert summary["step_s"] == timeline.makespan_s == pytest.approx(made.predicted_s)
    assert summary["gap"] == pytest.approx(made.predicted_s / made.lower_bound_s - 1)
    assert summary["bubble"] == pytest.approx(1 - timeline.busy_s.mean() / timeline.makespan_s)
    ring_steps = sum(n * (len(made.ring(s)) - 1) for s, n in enumerate(made.seqlens.tolist()))
    assert kv_token_steps(made) == ring_steps
    assert summary["sent_bytes"] == ring_steps * 1e6


def test_gathered_rings_are_told() -> None:
    """In the table, in the legend, and in what travels: a quarter of the keys is seen by nobody."""
    cost = CostModel.from_coefficients(
        quadratic_s=0.0, linear_s=1e-3, ring_step_s=0.1, kv_bytes_per_token=1.0
    )
    made = plan([1000], hdp_size=8, max_tokens_per_rank=500, cost=cost)
    timeline = simulate(made, cost)
    summary = summarize(made, cost, timeline)
    assert summary["gathered_rings"] == 1 and summary["sent_bytes"] == 1000 * 7 * 3 / 4
    assert "  of them gathered" in table([summary])
    assert "A 1000 on 8, gathered" in ascii_timeline(made, timeline, cost=cost, width=60)
    around = plan([1000], hdp_size=2, max_tokens_per_rank=500, cost=cost)
    assert "gathered" not in table([summarize(around, cost, simulate(around, cost))])
    assert "gathered" not in ascii_timeline(around, simulate(around, cost), cost=cost, width=60)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.0, "0 s"),
        (12.3456, "12.3 s"),
        (0.0123, "12.3 ms"),
        (1234.5, "1,234 s"),
        (0.9997, "1.00 s"),
        (0.9991, "999 ms"),
    ],
)
def test_seconds(value: float | None, text: str) -> None:
    assert seconds_text(value) == text


def test_numbers_as_text() -> None:
    assert [tokens_text(n) for n in (900, 1024, 1536, 12_288, 2**21)] == [
        "900", "1K", "1.5K", "12K", "2M",
    ]  # fmt: skip
    assert [bytes_text(n) for n in (12, 1500, 2.5e9, 3e12)] == ["12 B", "1.5 kB", "2.5 GB", "3 TB"]


def test_tables() -> None:
    rows = [["", "a"], ["time", "1 s"], ["x", "100 s"]]
    assert align(rows).splitlines() == [
        "           a",
        "------------",
        "time     1 s",
        "x      100 s",
    ]
    assert markdown(rows).splitlines()[:2] == ["|  | a |", "|---|---:|"]


# ---- pictures ----


@pytest.mark.parametrize("ranks", [1, 8, 200])
@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_pictures_are_drawn(tmp_path, ranks: int, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    from hdp.scheduler.render.figure import draw_plans

    seqlens = draw("lognormal", num_sequences=4 * ranks, seed=2, max_length=8192 * ranks)
    plans = []
    for policy in ("static", "hdp"):
        made = plan(seqlens, hdp_size=ranks, max_tokens_per_rank=8192, cost=COST, policy=policy)
        plans.append((policy, made, simulate(made, COST)))
    path = tmp_path / f"plans{suffix}"
    draw_plans(plans, path, cost=COST, title="one batch")
    assert path.stat().st_size > 5_000
    if suffix == ".svg":
        text = path.read_text()
        assert text.count("<svg") == 1


def test_pipelines_are_drawn_by_stage(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    from hdp.scheduler.render.figure import draw_plans

    made, timeline = _planned(pp_size=2, ranks=4)
    draw_plans([("pipeline", made, timeline)], tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5_000


def test_a_measured_ring_has_one_label_per_rank_and_no_speed_up(tmp_path, monkeypatch) -> None:
    """It is a block per wait, a hundred on a real step; planned and measured are one plan."""
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    from hdp.scheduler.render.figure import draw_plans

    made = StepPlan.from_lists([9000], [[0, 1]], [[[0]], [[0]]], max_tokens_per_rank=8192)
    spans = tuple(
        Span(rank=rank, start_s=i + rank / 2, end_s=i + rank / 2 + 0.4, kind="compute", name="0")
        for rank in (0, 1)
        for i in range(3)
    )
    texts: list[str] = []
    write, title = Axes.text, Axes.set_title
    monkeypatch.setattr(Axes, "text", lambda *a, **k: texts.append(a[3]) or write(*a, **k))
    monkeypatch.setattr(Axes, "set_title", lambda *a, **k: texts.append(a[1]) or title(*a, **k))
    measured = Timeline(spans=spans, num_ranks=2)
    slow = Timeline(
        spans=(Span(rank=0, start_s=0.0, end_s=9.0, kind="compute", name="0"),), num_ranks=2
    )
    draw_plans([("planned", made, slow), ("measured", made, measured)], tmp_path / "a.png")
    labels = [text for text in texts if text.startswith("8.8K")]
    assert len(labels) == 1 + 2, texts
    assert not any("faster" in text for text in texts)


def test_bad_pictures_are_clear_errors(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    from hdp.scheduler.render.figure import draw_plans

    with pytest.raises(ValueError, match=r"use one of .png"):
        draw_plans([("a", *_planned())], tmp_path / "a.bmp")
    with pytest.raises(ValueError, match="no plans"):
        draw_plans([], tmp_path / "a.png")
