"""Fitting a cost model: it recovers what made the times, and is the constrained optimum."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdp.scheduler import CostModel, StepPlan
from hdp.scheduler.costs.fit import Observation, _non_negative, fit_cost, fit_line
from hdp.scheduler.simulation.simulator import microbatch_times

TRUE = CostModel.from_coefficients(
    quadratic_s=3e-9, linear_s=2e-5, fixed_s=4e-3, small_shard_tokens=300.0, ring_step_s=2e-3
)
SHAPES = [
    [(512, 1)],
    [(4096, 1)],
    [(1024, 1)] * 8,
    [(128, 1)] * 16,
    [(8192, 2)],
    [(2048, 2), (700, 2)],
    [(16384, 4)],
    [(1024, 4)],
]


def _plan(pieces, across_nodes=False) -> StepPlan:
    """One microbatch with these pieces, on every rank of the widest of them."""
    degree = max(d for _, d in pieces)
    rings = [list(range(d)) for _, d in pieces]
    everywhere = [[[s for s, ring in enumerate(rings) if r in ring]] for r in range(degree)]
    return StepPlan.from_lists(
        [n for n, _ in pieces],
        rings,
        everywhere,
        max_tokens_per_rank=10**6,
        ranks_per_node=1 if across_nodes else None,
    )


def _seconds(pieces, cost=TRUE, across_nodes=False) -> float:
    return float(microbatch_times(_plan(pieces, across_nodes), cost).total_s[0])


def _assert_same(cost, true) -> None:
    for field in ("quadratic_s", "linear_s", "fixed_s", "small_shard_tokens", "ring_step_s"):
        assert getattr(cost, field) == pytest.approx(getattr(true, field), rel=1e-6), field


def test_fit_recovers_the_coefficients():
    observations = [Observation(pieces=tuple(p), seconds=_seconds(p)) for p in SHAPES]
    fit = fit_cost(observations, CostModel.from_coefficients(quadratic_s=1.0, linear_s=1.0))
    assert np.abs(fit.relative_errors).max() < 1e-9
    _assert_same(fit.cost, TRUE)


def test_local_measurements_leave_the_ring_alone():
    base = CostModel.from_coefficients(quadratic_s=1.0, linear_s=1.0, ring_step_s=0.5)
    observations = [
        Observation(pieces=tuple(p), seconds=_seconds(p)) for p in SHAPES if p[0][1] == 1
    ]
    fit = fit_cost(observations, base)
    assert fit.cost.ring_step_s == 0.5
    assert np.abs(fit.relative_errors).max() < 1e-9


def test_what_small_shards_cost_is_not_counted_twice():
    """On one rank it looks linear; the base says how much of it is attention's."""
    observations = [
        Observation(pieces=tuple(p), seconds=_seconds(p)) for p in SHAPES if p[0][1] == 1
    ]
    base = replace(TRUE, quadratic_s=1.0, linear_s=1.0, fixed_s=0.0)
    _assert_same(fit_cost(observations, base).cost, TRUE)


@pytest.mark.parametrize("degrees", [(1,), (1, 2, 4)])
def test_attention_alone_has_no_linear_part(degrees):
    true = replace(TRUE, linear_s=0.0, fixed_s=0.0, ring_step_s=TRUE.ring_step_s * (4 in degrees))
    observations = [
        Observation(pieces=((n * d, d),), seconds=_seconds([(n * d, d)], true))
        for n in (128, 1024, 8192)
        for d in degrees
    ]
    base = CostModel.from_coefficients(quadratic_s=1.0, linear_s=1.0)
    _assert_same(fit_cost(observations, base, without=("linear_s", "fixed_s")).cost, true)


@pytest.mark.parametrize("bytes_per_s", [3e8, 1e9, 1e10])
def test_exposed_transfers_are_told_from_the_rest(bytes_per_s):
    """With measured links the other coefficients come out right, whatever part of it shows."""
    true = replace(
        TRUE,
        kv_bytes_per_token=6144.0,
        intra_node_bytes_per_s=bytes_per_s,
        inter_node_bytes_per_s=bytes_per_s / 4,
    )
    shapes = [*SHAPES, [(65536, 4)], [(512, 2)], [(2048, 4), (700, 1)]]
    observations = [
        Observation(pieces=tuple(p), seconds=_seconds(p, true, across), across_nodes=across)
        for p in shapes
        for across in (False, True)
    ]
    hidden = [o.exposed_s(true) <= 0 for o in observations if o.degree > 1]
    assert bytes_per_s == 1e10 or not all(hidden), "the case tests nothing"
    base = replace(true, quadratic_s=1.0, linear_s=1.0, small_shard_tokens=0.0, ring_step_s=0.0)
    fit = fit_cost(observations, base, known_links=True)
    assert np.abs(fit.relative_errors).max() < 1e-9
    _assert_same(fit.cost, true)
    for o in observations:
        assert o.predicted_s(fit.cost) == pytest.approx(o.seconds, rel=1e-9)


def test_unknown_links_become_free():
    base = replace(TRUE, kv_bytes_per_token=1e9, intra_node_bytes_per_s=1.0)
    observations = [Observation(pieces=tuple(p), seconds=_seconds(p)) for p in SHAPES]
    fit = fit_cost(observations, base)
    assert fit.cost.intra_node_bytes_per_s == math.inf
    assert np.abs(fit.relative_errors).max() < 1e-9


@given(st.floats(1e-6, 1e-3), st.floats(1e6, 1e12))
def test_a_line_is_found(latency_s, bytes_per_s):
    sizes = [2**n for n in range(10, 30, 4)]
    times = [latency_s + size / bytes_per_s for size in sizes]
    found = fit_line(sizes, times)
    for size, seconds in zip(sizes, times, strict=True):
        assert found[0] + size / found[1] == pytest.approx(seconds, rel=1e-6)


def test_a_line_needs_sizes_that_differ():
    with pytest.raises(ValueError, match="two message sizes"):
        fit_line([1024, 1024], [1.0, 1.0])


def test_times_of_messages_that_are_too_small_bound_the_bandwidth():
    assert fit_line([1, 2, 4096], [3.0, 2.0, 0.5]) == (0.0, 8192.0)


@given(st.integers(0, 10_000))
def test_fit_is_the_optimum(seed):
    """No non-negative point nearby is better (the problem is convex)."""
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(8, 3))
    target = rng.normal(size=8)
    x = _non_negative(matrix, target)
    assert (x >= 0).all()
    error = np.linalg.norm(matrix @ x - target)
    for _ in range(20):
        other = np.maximum(x + rng.normal(scale=0.05, size=3), 0)
        assert np.linalg.norm(matrix @ other - target) >= error - 1e-9


def test_noise_of_five_percent_is_averaged_out():
    rng = np.random.default_rng(0)
    observations = [
        Observation(pieces=tuple(p), seconds=_seconds(p) * (1 + 0.05 * rng.uniform(-1, 1)))
        for p in SHAPES * 4
    ]
    fit = fit_cost(observations, TRUE)
    for pieces in ([(3000, 1)], [(6000, 2)], [(256, 1)] * 10):
        assert _seconds(pieces, fit.cost) == pytest.approx(_seconds(pieces), rel=0.05)


def test_noise_that_hides_attention_leaves_a_model():
    """Times by tokens alone, whatever the degree: the small-shard term would fit best, but it is
    attention's."""
    observations = [
        Observation(pieces=((n, d),), seconds=1e-4 * n) for n in (300, 1000, 4000) for d in (1, 2)
    ]
    fit = fit_cost(observations, TRUE)
    assert fit.cost.quadratic_s + fit.cost.linear_s > 0
    predicted = [o.predicted_s(fit.cost) for o in observations]
    assert predicted == pytest.approx([o.seconds for o in observations], rel=0.5)


def test_bad_measurements_are_refused():
    with pytest.raises(ValueError, match="cannot determine 3 coefficients"):
        fit_cost([Observation(pieces=((5, 1),), seconds=1.0)], TRUE)
    with pytest.raises(ValueError, match="positive and finite"):
        fit_cost([Observation(pieces=((5, 1),), seconds=0.0)] * 5, TRUE)
    with pytest.raises(ValueError, match="measure longer sequences"):
        fit_cost([Observation(pieces=((n, 1),), seconds=1.0) for n in (1, 2, 3)], TRUE)
