"""The simulator: by hand, against itself in another way, and as the verifier of deadlocks."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given

from hdp.scheduler import CostModel, StepPlan, finish_s, plan, simulate
from hdp.scheduler.rendezvous import meetings
from hdp.scheduler.simulation.events import Operations, run_flat
from hdp.scheduler.simulation.one_f_one_b import run_1f1b
from hdp.scheduler.simulation.simulator import microbatch_times
from tests.scheduler.batches import POLICY_NAMES, WITH_COMM, batches, lognormal
from tests.scheduler.event_loop import EventLoop, events_1f1b, program_1f1b

# One second per token, whatever else.
TOKEN_S = CostModel.from_coefficients(quadratic_s=0.0, linear_s=1.0)


def test_rings_wait_for_their_ranks() -> None:
    """Rank 0 is 3 s alone, then 2 s on a ring with rank 1, which waits for it and goes on."""
    made = StepPlan.from_lists(
        [3, 4, 1], [[0], [0, 1], [1]], [[[0], [1]], [[1], [2]]], max_tokens_per_rank=9
    ).validate()
    timeline = simulate(made, TOKEN_S)
    spans = [(s.rank, s.kind, s.start_s, s.end_s) for s in timeline.spans]
    assert spans == [
        (0, "compute", 0.0, 3.0),
        (0, "compute", 3.0, 5.0),
        (0, "wait", 5.0, 6.0),
        (1, "wait", 0.0, 3.0),
        (1, "compute", 3.0, 5.0),
        (1, "compute", 5.0, 6.0),
    ]
    assert timeline.makespan_s == finish_s(made, TOKEN_S) == 6.0
    assert timeline.busy_s.tolist() == [5.0, 3.0]
    assert timeline.bubble.tolist() == pytest.approx([1 / 6, 1 / 2])


def test_a_ring_lasts_as_long_as_its_slowest_rank() -> None:
    """Rank 1 has a rider of 3 s beside the ring's 2 s."""
    made = StepPlan.from_lists(
        [4, 3], [[0, 1], [1]], [[[0]], [[0, 1]]], max_tokens_per_rank=9
    ).validate()
    assert [(s.kind, s.start_s, s.end_s) for s in simulate(made, TOKEN_S).of_rank(0)] == [
        ("compute", 0.0, 2.0),
        ("wait", 2.0, 5.0),
    ]


def test_parts_of_a_microbatch() -> None:
    cost = CostModel.from_coefficients(
        quadratic_s=0.0, linear_s=1.0, fixed_s=0.5, kv_bytes_per_token=1.0,
        intra_node_bytes_per_s=4.0, inter_node_bytes_per_s=2.0, activation_bytes_per_token=3.0,
        num_layers=3, host_bytes_per_s=1.0, reduce_s=2.0,
    )  # fmt: skip
    made = StepPlan.from_lists(
        [4], [[0, 1]], [[[0]], [[0]]], max_tokens_per_rank=9, offload_ratio=[[1.0], [0.0]],
        offloadable=0.3,
    )  # fmt: skip
    timeline = simulate(made, cost)
    # 0.5 fixed + 2 tokens; 2 tokens over 4 per second; 2 bytes out under 2/3 s, back under 4/3 s.
    offload_s = (2 - 2 / 3) + (2 - 4 / 3)
    assert timeline.seconds("compute") == pytest.approx([2.5, 2.5])
    assert timeline.seconds("comm") == pytest.approx([0.5, 0.5])
    assert timeline.seconds("offload") == pytest.approx([offload_s, 0.0])
    assert timeline.seconds("wait") == pytest.approx([0.0, offload_s])
    # The ring is the last microbatch of both: the reduction starts with its backward.
    assert timeline.seconds("reduce") == pytest.approx([0.0, 0.0])
    assert timeline.makespan_s == pytest.approx(3.0 + offload_s)


def test_links_across_nodes() -> None:
    cost = CostModel.from_coefficients(
        quadratic_s=0.0, linear_s=1.0, kv_bytes_per_token=1.0,
        intra_node_bytes_per_s=4.0, inter_node_bytes_per_s=2.0,
    )  # fmt: skip
    made = StepPlan.from_lists(
        [4, 4], [[0, 1], [1, 2]], [[[0]], [[0], [1]], [[1]], [[]]], max_tokens_per_rank=9,
        ranks_per_node=2,
    ).validate()  # fmt: skip
    assert microbatch_times(made, cost).comm_s.tolist() == [0.5, 0.5, 1.0, 1.0, 0.0]


def test_reduction_overlaps_with_a_local_end() -> None:
    """Backward of the last microbatches starts after 1/3 of them: the later one at 2 + 1."""
    cost = CostModel.from_coefficients(quadratic_s=0.0, linear_s=1.0, reduce_s=2.5)
    made = StepPlan.from_lists(
        [4, 3, 1], [[0, 1], [0], [1]], [[[0], [1]], [[0], [2]]], max_tokens_per_rank=9
    ).validate()
    assert made.ends_together
    assert finish_s(made, cost) == pytest.approx(2 + 1 + 2.5)
    turned = StepPlan.from_lists(
        [4, 3, 1], [[0, 1], [0], [1]], [[[1], [0]], [[0], [2]]], max_tokens_per_rank=9
    ).validate()
    assert not turned.ends_together
    assert finish_s(turned, cost) == pytest.approx(3 + 2 + 1 + 2.5)


# ---- pipelines ----


def test_1f1b_of_equal_microbatches() -> None:
    """n microbatches on p stages take (n + p - 1) microbatches' time."""
    for stages in (2, 3, 5):
        for count in (1, 2, 4, 9):
            made = StepPlan.from_lists(
                [6] * count, [[0]] * count, [[[m] for m in range(count)]],
                max_tokens_per_rank=6, pp_size=stages,
            )  # fmt: skip
            assert finish_s(made, TOKEN_S) == pytest.approx(6 * (count + stages - 1))
            assert simulate(made, TOKEN_S).makespan_s == pytest.approx(6 * (count + stages - 1))


def test_1f1b_program() -> None:
    assert program_1f1b(0, 3, 2, 0) == [(0, "F"), (1, "F"), (0, "B"), (2, "F"), (1, "B"), (2, "B")]
    assert program_1f1b(0, 2, 2, 1) == [(0, "F"), (0, "B"), (1, "F"), (1, "B")]
    assert program_1f1b(0, 1, 4, 0) == [(0, "F"), (0, "B")]


def equal(operations: Operations, events: Operations) -> None:
    """Both have the same operations at the same times, in whatever order."""
    order, events_order = (
        np.lexsort((one.microbatch, one.stage, one.part)) for one in (operations, events)
    )
    for name in ("microbatch", "stage", "part"):
        assert (getattr(operations, name)[order] == getattr(events, name)[events_order]).all()
    for name in ("ready_s", "start_s", "own_s", "end_s"):
        np.testing.assert_allclose(
            getattr(operations, name)[order],
            getattr(events, name)[events_order],
            rtol=1e-9,
            atol=1e-12,
        )


@given(batches(pipelines=False))
def test_1f1b_two_ways(case) -> None:
    """The columnar walk and the event loop, operation by operation."""
    lengths, arguments = case
    share = arguments["cost"].forward_share
    for policy in ("hdp", "bytescale-pp", "static"):
        for stages in (2, 3):
            made = plan(lengths, policy=policy, pp_size=stages, **arguments)
            times = microbatch_times(made, arguments["cost"]).total_s
            events = events_1f1b(made, times, share)
            equal(run_1f1b(made, times, share), events)
            end_s = float(events.end_s.max()) + arguments["cost"].reduce_s
            assert finish_s(made, arguments["cost"]) == pytest.approx(end_s, rel=1e-9)


@given(batches(pipelines=False))
def test_flat_two_ways(case) -> None:
    """The columnar walk of plans without stages against the event loop, operation by operation."""
    lengths, arguments = case
    for policy in POLICY_NAMES:
        made = plan(lengths, policy=policy, **arguments)
        times = microbatch_times(made, arguments["cost"]).total_s
        offsets = made.microbatch_offsets.tolist()
        programs = [[(m, "") for m in range(first, stop)] for first, stop in pairwise(offsets)]
        equal(run_flat(made, times), EventLoop(made, programs, {"": times.tolist()}).run())


def test_deadlock_is_found() -> None:
    circle = StepPlan.from_lists(
        [4, 4, 4], [[0, 1], [1, 2], [2, 0]], [[[0], [2]], [[1], [0]], [[2], [1]]],
        max_tokens_per_rank=9,
    )  # fmt: skip
    for run in (simulate, finish_s):
        with pytest.raises(ValueError, match="deadlock: rank 0 at microbatch 0; rank 1 at"):
            run(circle, TOKEN_S)


def test_ragged_counts_deadlock_under_1f1b() -> None:
    """The smallest case: ranks {0, 1}, {0}, {0, 1} with two stages."""
    lists = [[[0], [1], [2]], [[0], [2]]]
    flat = StepPlan.from_lists([4, 2, 4], [[0, 1], [0], [0, 1]], lists, max_tokens_per_rank=9)
    assert simulate(flat.validate(), TOKEN_S).makespan_s == 6.0
    ragged = StepPlan.from_lists(
        [4, 2, 4], [[0, 1], [0], [0, 1]], lists, max_tokens_per_rank=9, pp_size=2
    )
    with pytest.raises(ValueError, match="deadlock: rank 0 stage 0 at"):
        simulate(ragged, TOKEN_S)
    with pytest.raises(ValueError, match="same_index_under_pp"):
        ragged.validate()


def test_meetings() -> None:
    made = StepPlan.from_lists(
        [4, 1, 1], [[0, 1], [0], [1]], [[[1], [0]], [[0, 2]]], max_tokens_per_rank=9
    )
    assert meetings(made).tolist() == [-1, 0, 0]


@pytest.mark.parametrize("stages", [1, 2])
def test_spans_do_not_overlap(stages: int) -> None:
    made = plan(lognormal(80), hdp_size=20, max_tokens_per_rank=16384, cost=WITH_COMM,
                pp_size=stages)  # fmt: skip
    timeline = simulate(made, WITH_COMM)
    assert timeline.num_stages == stages
    for rank in range(20):
        for stage in range(stages):
            mine = [s for s in timeline.of_rank(rank) if s.stage == stage]
            assert mine[0].start_s == 0.0
            assert mine[-1].end_s == pytest.approx(timeline.makespan_s)
            for before, after in pairwise(mine):
                assert after.start_s == pytest.approx(before.end_s, abs=1e-9)
    times = microbatch_times(made, WITH_COMM)
    assert timeline.busy_s.sum() == pytest.approx(times.compute_s.sum())
