"""Riders, orders of pipelines, and the last local jobs: what is done to a good plan at the end."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdp.scheduler import CostModel, plan
from hdp.scheduler.policies.batch import Batch
from hdp.scheduler.policies.hdp.backfill import backfilled
from hdp.scheduler.policies.hdp.degrees import Degrees
from hdp.scheduler.policies.hdp.list_schedule import Limits, build_plan, schedule_jobs
from hdp.scheduler.policies.hdp.lower_bound import lower_bound_ticks
from hdp.scheduler.policies.hdp.lpt import fill, longest_first
from hdp.scheduler.policies.hdp.reorder import pipeline_orders
from tests.scheduler.batches import WITH_COMM, batches

PER_MICROBATCH = CostModel.from_coefficients(quadratic_s=0.0, linear_s=1e-6, fixed_s=1.0)


def test_locals_ride_where_they_fit() -> None:
    """10 tokens on two ranks of 8 leave 3 on each: both sequences of 3 ride there."""
    made = plan([10, 3, 3], hdp_size=2, max_tokens_per_rank=8, cost=PER_MICROBATCH).validate()
    assert made.num_microbatches.tolist() == [1, 1]
    assert made.predicted_s == pytest.approx(1.0, rel=1e-4)
    # 4 do not fit beside the ring.
    made = plan([10, 4, 4], hdp_size=2, max_tokens_per_rank=8, cost=PER_MICROBATCH).validate()
    assert made.num_microbatches.tolist() == [2, 2]


def test_riders_are_left_out_when_ranks_would_wait() -> None:
    """Without fixed_s a rider saves nothing."""
    free = replace(PER_MICROBATCH, fixed_s=0.0)
    made = plan([10, 3, 3], hdp_size=2, max_tokens_per_rank=8, cost=free).validate()
    assert made.predicted_s == pytest.approx(made.lower_bound_s)


@given(batches(pipelines=False))
def test_riders_keep_capacity_and_order(case) -> None:
    lengths, arguments = case
    arguments["cost"] = WITH_COMM
    degrees = Degrees(Batch.check(lengths, **arguments))
    bound = lower_bound_ticks(degrees)
    made = schedule_jobs(degrees, Limits(target=bound, degree=bound, coarse=bound // 4))
    assert made is not None
    for riding in backfilled(degrees, made):
        plan_ = build_plan(degrees.batch, riding).validate()
        assert (
            plan_.num_microbatches.sum() <= build_plan(degrees.batch, made).num_microbatches.sum()
        )


@given(batches(pipelines=False), st.sampled_from([2, 3]))
def test_orders_keep_what_is_in_them(case, stages: int) -> None:
    """Other orders hold the same microbatches, and shared ones still have one index."""
    lengths, arguments = case
    batch = Batch.check(lengths, pp_size=stages, **arguments)
    degrees = Degrees(batch)
    bound = lower_bound_ticks(degrees)
    limit = max(bound // stages, 1)
    made = schedule_jobs(
        degrees, Limits(target=bound, degree=limit, coarse=limit, microbatch=limit)
    )
    assert made is not None

    def contents(made_plan) -> list[set[frozenset[int]]]:
        return [
            {frozenset(p.seq for p in mb.pieces) for mb in made_plan.microbatches(rank)}
            - {frozenset()}
            for rank in range(batch.hdp_size)
        ]

    before = contents(build_plan(batch, made))
    for ordered in pipeline_orders(made, batch.hdp_size, batch.seconds(made.degree)):
        assert contents(build_plan(batch, ordered).validate()) == before


def test_fill_evens_out_what_lpt_leaves() -> None:
    """Two ranks and jobs of 3, 3, 2, 2, 2: LPT ends at 7, and 6 | 6 is possible."""
    ticks, start = np.array([3, 3, 2, 2, 2]), np.zeros(2, dtype=np.int64)
    assert longest_first(start, ticks)[1].tolist() == [7, 5]
    assert np.bincount(fill(start, ticks), weights=ticks).tolist() == [6, 6]


@given(
    st.lists(st.integers(1, 1000), max_size=60),
    st.lists(st.integers(0, 500), min_size=1, max_size=10),
)
def test_fill_is_no_worse_than_lpt(ticks: list[int], load: list[int]) -> None:
    falling = np.array(sorted(ticks, reverse=True), dtype=np.int64)
    start = np.array(load, dtype=np.int64)
    ranks = fill(start, falling)
    ends = start + np.bincount(ranks, weights=falling, minlength=len(load)).astype(np.int64)
    assert ends.max() <= longest_first(start, falling)[1].max()
