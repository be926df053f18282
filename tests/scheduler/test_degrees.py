"""Degrees by bisection are those that trying every legal degree would find."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hdp.scheduler.policies.batch import Batch
from hdp.scheduler.policies.hdp.degrees import Degrees, Widening
from tests.scheduler.batches import clusters
from tests.scheduler.test_cost_model import costs


def legal(degrees: Degrees, low: int) -> np.ndarray:
    """All degrees from `low` on that keep to nodes."""
    node, size = degrees.node, degrees.batch.hdp_size
    some = [*range(1, node + 1), *range(2 * node, size + 1, node)]
    return np.array([degree for degree in some if degree >= low])


@settings(max_examples=300)
@given(clusters(), costs(), st.data())
def test_fit_and_cap_are_those_of_all_degrees(cluster, cost, data) -> None:
    most = cluster["hdp_size"] * cluster["max_tokens_per_rank"]
    lengths = data.draw(st.lists(st.integers(1, most), min_size=1, max_size=6))
    degrees = Degrees(Batch.check(lengths, cost=cost, **cluster))
    widening = Widening(degrees, np.arange(len(lengths)))
    every = [legal(degrees, low) for low in widening.low.tolist()]
    ticks = [degrees.ticks(job, some) for job, some in enumerate(every)]
    best = [int(t.min()) for t in ticks]
    np.testing.assert_allclose(widening.best_ticks, best, atol=1)
    # A tick is rounded: what lies within two of it may fall to either side.
    share = data.draw(st.floats(0.5, 3.0))
    target = int(share * max(best)) + 1
    degree, took = widening.fit(target)
    for job, (some, t) in enumerate(zip(every, ticks, strict=True)):
        assert took[job] == t[some == degree[job]][0]
        in_time = some[t <= target - 2]
        if len(in_time):
            assert degree[job] <= in_time[0] and took[job] <= target, f"job {job}"
        else:
            assert took[job] <= best[job] + 2
        fewer = t[some < degree[job]]
        assert (fewer > target - 2).all(), f"job {job}: fewer ranks would do"
