"""Columns, joins and fill: the parts of the hdp policy by themselves."""

from __future__ import annotations

import heapq

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdp.scheduler.policies.batch import Batch
from hdp.scheduler.policies.hdp.degrees import Degrees, Widening
from hdp.scheduler.policies.hdp.list_schedule import Limits, schedule_jobs
from hdp.scheduler.policies.hdp.lower_bound import lower_bound_ticks
from hdp.scheduler.policies.hdp.lpt import longest_first
from hdp.scheduler.policies.hdp.ring_placement import GuillotineColumns
from hdp.scheduler.policies.packing import best_fit, best_fit_by_rank
from tests.scheduler.batches import COMPUTE_ONLY, WITH_COMM, batches, lognormal

sizes = st.lists(st.integers(1, 100), min_size=0, max_size=200)


def placed(degree: list[int], ticks: list[int], ranks: int, node: int, target: int):
    columns = GuillotineColumns(
        num_ranks=ranks,
        node=node,
        target=target,
        cap=np.array(degree),
        ticks_at=lambda ring, _: ticks[ring],
    )
    late = columns.place(np.array(degree, dtype=np.int64), np.array(ticks, dtype=np.int64), 0)
    return columns, late


@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 30)), max_size=40),
    st.sampled_from([(12, 12), (12, 4), (12, 2), (7, 7)]),
)
def test_columns_are_even(rings, machine) -> None:
    """All ranks of a column have the same rings below, so rings never wait; depths are dense."""
    ranks, node = machine
    degree = [d if d <= node else -(-d // node) * node for d, _ in rings]
    ticks = [t for _, t in rings]
    columns, late = placed(degree, ticks, ranks, node, 60)
    below: list[list[int]] = [[] for _ in range(ranks)]
    for ring, at in sorted(columns.rings.items(), key=lambda item: item[1].depth):
        mine = [r for first, size in at.spans for r in range(first, first + size)]
        assert len(mine) == at.degree == degree[ring]
        assert len({tuple(below[r]) for r in mine}) == 1
        assert at.depth == len(below[mine[0]])
        for r in mine:
            below[r].append(ring)
    load, depth = columns.tops()
    assert len(load) == len(depth) == ranks
    for r in range(ranks):
        assert depth[r] == len(below[r])
        assert load[r] == sum(ticks[ring] for ring in below[r]) <= 60
    assert sorted([*columns.rings, *late]) == list(range(len(rings)))


@pytest.mark.parametrize(("local_work", "degree"), [(0, 6), (60, 5)])
def test_a_useless_rest_is_not_split_off(local_work: int, degree: int) -> None:
    """Rings of 5 on 6 ranks leave one: with nothing for it to do they take all six."""
    columns = GuillotineColumns(
        num_ranks=6,
        node=6,
        target=50 + local_work // 6,
        cap=np.array([6, 6]),
        ticks_at=lambda _, d: 150 // d,
    )
    columns.place(np.array([5, 5]), np.array([30, 30]), local_work)
    assert columns.rings[0].degree == degree


@given(sizes, st.lists(st.integers(0, 300), min_size=1, max_size=12))
def test_longest_first_is_lpt(ticks: list[int], load: list[int]) -> None:
    falling = np.array(sorted(ticks, reverse=True), dtype=np.int64)
    ranks, loads = longest_first(np.array(load, dtype=np.int64), falling)
    heap = [(x, r) for r, x in enumerate(load)]
    heapq.heapify(heap)
    for size in falling.tolist():
        low, rank = heap[0]
        heapq.heapreplace(heap, (low + size, rank))
    assert sorted(loads.tolist()) == sorted(x for x, _ in heap)
    assert (np.bincount(ranks, weights=falling, minlength=len(load)) + load == loads).all()


@given(sizes, st.integers(1, 5), st.booleans())
def test_best_fit_by_rank_is_best_fit(tokens: list[int], ranks: int, opened: bool) -> None:
    size = np.array(tokens, dtype=np.int64)
    rank = np.arange(len(size)) % ranks
    room = np.array([[30, 7]] * ranks) if opened else None
    bins, num_bins = best_fit_by_rank(rank, size, 100, ranks, opened=room)
    for r in range(ranks):
        first = [] if room is None else room[r].tolist()
        alone = best_fit(size[rank == r], 100, first)
        assert bins[rank == r].tolist() == alone.tolist()
        assert num_bins[r] == max(alone.tolist(), default=-1) + 1 - min(
            len(first), max(alone.tolist(), default=-1) + 1
        )
        filled = np.bincount(alone, weights=size[rank == r], minlength=1)
        assert (filled[len(first) :] <= 100).all() and (filled[: len(first)] <= 30).all()


def test_best_fit_by_rank_takes_both_ways() -> None:
    """Ranks with very many jobs are packed one by one: same bins."""
    rng = np.random.default_rng(0)
    size = rng.integers(1, 200, 1200)
    bins, _ = best_fit_by_rank(np.zeros(1200, dtype=np.int64), size, 1000, 1)
    assert bins.tolist() == best_fit(size, 1000).tolist()


@given(batches())
def test_fit_is_the_least_degree_in_time(case) -> None:
    lengths, arguments = case
    batch = Batch.check(lengths, **arguments)
    degrees = Degrees(batch)
    widening = Widening(degrees, np.arange(batch.num_jobs))
    node = batch.ranks_per_node or batch.hdp_size
    legal = [d for d in range(1, batch.hdp_size + 1) if d <= node or d % node == 0]
    for target in (1, int(degrees.low_ticks.max()), int(np.median(degrees.low_ticks)) // 2 + 1):
        fitted, ticks = widening.fit(target)
        for job in range(batch.num_jobs):
            some = [d for d in legal if d >= degrees.low[job]]
            times = {d: int(degrees.ticks(job, d)) for d in some}
            good = [d for d in some if times[d] <= target]
            assert times[int(fitted[job])] == ticks[job]
            if good:
                assert fitted[job] == good[0]
            else:
                assert ticks[job] == min(times.values())


def test_attempts_end_when_they_say() -> None:
    for cost in (COMPUTE_ONLY, WITH_COMM):
        batch = Batch.check(lognormal(500), hdp_size=64, max_tokens_per_rank=16384, cost=cost)
        degrees = Degrees(batch)
        bound = lower_bound_ticks(degrees)
        for head_room, grain, coarse in ((1.0, 1.0, 2.0), (1.05, 0.3, 0.1), (1.3, 0.1, 0.05)):
            target = int(bound * head_room)
            limits = Limits(target=target, degree=int(target * grain), coarse=int(target * coarse))
            made = schedule_jobs(degrees, limits)
            assert made is not None and made.end >= bound
            assert made.end <= 1.6 * bound
