"""What the search's parts are for: each test fails when its part does nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdp.scheduler import CostModel, plan
from hdp.scheduler.policies.hdp import search
from hdp.scheduler.policies.hdp.ring_placement import JoinedColumns
from tests.scheduler.batches import COMPUTE_ONLY, WITH_COMM, lognormal


@given(
    st.lists(st.integers(0, 50), min_size=2, max_size=6),
    st.integers(1, 400),
    st.integers(0, 20),
    st.data(),
)
def test_joined_columns_take_the_cheapest_degree(loads, work, per_rank, data) -> None:
    """Against the least loaded ranks at every degree: the later end of the ring or of the highest
    rank, and the time that the ring takes from its ranks, spread over all of them."""
    size = len(loads)
    low = data.draw(st.integers(1, size))
    ticks = [0, *(work // degree + per_rank * (degree - 1) for degree in range(1, size + 1))]
    load = np.array(loads, dtype=np.int64)

    def price(ranks: tuple[int, ...]) -> int:
        end = max(loads[rank] for rank in ranks) + ticks[len(ranks)]
        taken = sum(end - loads[rank] for rank in ranks)
        return max(end, max(loads)) + taken // size

    joined = JoinedColumns(
        load,
        np.zeros(size, dtype=np.int64),
        node=size,
        ticks_at=lambda ring, degrees: np.array(ticks)[degrees],
    )
    ring = joined.place(0, low, size)
    ranks = tuple(rank for first, width in ring.spans for rank in range(first, first + width))
    assert len(ranks) == ring.degree
    rising = sorted(range(size), key=lambda rank: loads[rank])
    cheapest = min(price(tuple(rising[:degree])) for degree in range(low, size + 1))
    assert price(ranks) == cheapest


def test_joined_columns_are_wider_where_that_is_sooner() -> None:
    joined = JoinedColumns(
        np.zeros(4, dtype=np.int64),
        np.zeros(4, dtype=np.int64),
        node=4,
        ticks_at=lambda ring, degrees: 100 // degrees,
    )
    assert joined.place(0, 1, 4).degree == 4


def test_some_rank_has_two_of_three_jobs() -> None:
    """Three sequences on two ranks, and a ring is no remedy: the bound is two of them, not 1.5."""
    cost = CostModel.from_coefficients(quadratic_s=0.0, linear_s=0.1, ring_step_s=1e3)
    made = plan([10, 10, 10], hdp_size=2, max_tokens_per_rank=10, cost=cost)
    assert made.lower_bound_s == pytest.approx(2.0, rel=1e-3)
    assert made.predicted_s == pytest.approx(2.0, rel=1e-3)


@pytest.mark.parametrize(
    ("count", "size", "cost"), [(300, 32, WITH_COMM), (500, 64, COMPUTE_ONLY), (500, 64, WITH_COMM)]
)
def test_pipelines_try_several_limits(monkeypatch, count: int, size: int, cost) -> None:
    """The limit that promises most is not the best: these plans end over 1 % sooner."""
    batch = {"hdp_size": size, "max_tokens_per_rank": 16384, "cost": cost, "pp_size": 4}
    several = plan(lognormal(count), **batch)
    monkeypatch.setattr(search, "_LIMITS", 1)
    assert several.predicted_s < 0.99 * plan(lognormal(count), **batch).predicted_s


def test_orders_help_pipelines(monkeypatch) -> None:
    """Other orders of the same microbatches end this step over 3 % sooner."""
    batch = {"hdp_size": 16, "max_tokens_per_rank": 32768, "cost": COMPUTE_ONLY, "pp_size": 4}
    ordered = plan(lognormal(300), **batch)
    monkeypatch.setattr(search, "pipeline_orders", lambda *arguments: iter(()))
    assert ordered.predicted_s < 0.97 * plan(lognormal(300), **batch).predicted_s
