"""The lower bound is one, on small cases against all plans; and plans are close to it."""

from __future__ import annotations

import math
from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hdp.scheduler import CostModel, plan
from hdp.scheduler.policies.batch import Batch
from hdp.scheduler.policies.hdp.degrees import Degrees
from hdp.scheduler.policies.hdp.lower_bound import needed_ticks
from tests.scheduler.batches import COMPUTE_ONLY, WITH_COMM, lognormal
from tests.scheduler.test_cost_model import costs


def best_of_all(lengths: list[int], size: int, capacity: int, cost: CostModel) -> float:
    """The finishing time of the best plan with a microbatch for each sequence: every ring of every
    sequence, in every order in which they can start."""
    subsets = [[r for r in range(size) if mask >> r & 1] for mask in range(1, 1 << size)]
    seconds = [[float(cost.piece_s(n, d + 1)) for d in range(size)] for n in lengths]
    best = math.inf
    for rings in product(subsets, repeat=len(lengths)):
        if any(-(-n // len(ring)) > capacity for n, ring in zip(lengths, rings, strict=True)):
            continue
        for order in permutations(range(len(lengths))):
            clock = [0.0] * size
            for seq in order:
                start = max(clock[rank] for rank in rings[seq])
                for rank in rings[seq]:
                    clock[rank] = start + seconds[seq][len(rings[seq]) - 1]
            best = min(best, max(clock))
    return best


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=3),
    st.integers(1, 3),
    st.integers(7, 20),
    costs(),
)
def test_bound_is_below_the_best_plan(lengths, size: int, capacity: int, cost) -> None:
    lengths = [min(n, size * capacity) for n in lengths]
    best_s = best_of_all(lengths, size, capacity, cost)
    made = plan(lengths, hdp_size=size, max_tokens_per_rank=capacity, cost=cost)
    assert made.lower_bound_s <= best_s * (1 + 1e-9)
    # Local pieces may share a microbatch in our plan; without fixed_s that is no gain.
    assert made.predicted_s >= best_s * (1 - 1e-6)
    assert made.predicted_s <= 1.5 * best_s


def test_bound_by_hand() -> None:
    """Once by work, once because no two of the sequences can run at once."""
    cost = CostModel.from_coefficients(quadratic_s=0.0, linear_s=1.0)
    made = plan([30, 30, 30], hdp_size=3, max_tokens_per_rank=30, cost=cost)
    assert made.lower_bound_s == pytest.approx(30.0)
    assert made.predicted_s == pytest.approx(30.0)
    # Each needs two of three ranks, and wider rings are no faster.
    stuck = CostModel.from_coefficients(quadratic_s=0.0, linear_s=1e-9, ring_step_s=1.0)
    made = plan([20, 20, 20], hdp_size=3, max_tokens_per_rank=10, cost=stuck)
    assert made.lower_bound_s == pytest.approx(3.0, rel=1e-3)
    assert made.predicted_s == pytest.approx(3.0, rel=1e-3)


def test_bound_counts_microbatches() -> None:
    cost = CostModel.from_coefficients(quadratic_s=0.0, linear_s=1e-9, fixed_s=1.0)
    made = plan([10] * 7, hdp_size=2, max_tokens_per_rank=20, cost=cost)
    assert made.lower_bound_s == pytest.approx(2.0)
    assert made.predicted_s == pytest.approx(2.0)


def test_needed_ticks_count_the_microbatches_of_local_jobs() -> None:
    """A ring of 2 and six local jobs of 10 ticks (+ 3 fixed) in microbatches of 20: 2 + 3."""
    cost = CostModel.from_coefficients(quadratic_s=0.0, linear_s=1.0, fixed_s=3.0)
    batch = Batch.check([20] + [10] * 6, hdp_size=2, max_tokens_per_rank=20, cost=cost)
    degrees = Degrees(batch)
    degree = np.array([2] + [1] * 6)
    one = round(1.0 / degrees.tick_s)
    want = math.ceil((80 * one + 3 * one * 5) / 2)
    got = needed_ticks(degrees, degree, degrees.ticks(slice(None), degree), 20 * one)
    assert got == pytest.approx(want, abs=8)  # ticks are rounded


CASES = [
    ("lognormal 512 / 64", lognormal(512), 64, 16384),
    ("lognormal 2048 / 64", lognormal(2048), 64, 16384),
    ("lognormal 4096 / 256", lognormal(4096), 256, 16384),
    ("lognormal 4096 / 1024", lognormal(4096), 1024, 16384),
    ("32K per rank / 64", lognormal(300, median=2048, sigma=1.5), 64, 32768),
    ("wikipedia 2048 / 100", lognormal(2048, median=500, sigma=1.1), 100, 16384),
]


@pytest.mark.parametrize(("name", "lengths", "size", "capacity"), CASES)
def test_plans_are_near_the_bound(name: str, lengths, size: int, capacity: int) -> None:
    for cost, limit in ((COMPUTE_ONLY, 1.02), (WITH_COMM, 1.05)):
        made = plan(lengths, hdp_size=size, max_tokens_per_rank=capacity, cost=cost).validate()
        assert made.predicted_s <= limit * (made.lower_bound_s + cost.reduce_s), name


def test_bimodal_is_near_the_bound() -> None:
    """A hard batch: 5 % long sequences, 512 in all, on 16 ranks."""
    rng = np.random.default_rng(0)
    long = rng.random(512) < 0.05
    lengths = np.where(long, rng.integers(32768, 262145, 512), rng.integers(256, 2049, 512))
    for size, limit in ((16, 1.02), (12, 1.02), (17, 1.03)):
        capacity = 16384 if size >= 16 else 22000
        made = plan(lengths, hdp_size=size, max_tokens_per_rank=capacity, cost=COMPUTE_ONLY)
        assert made.validate().predicted_s <= limit * made.lower_bound_s


@pytest.mark.parametrize("stages", [2, 4])
def test_pipelines_beat_the_papers_balance(stages: int) -> None:
    for cost in (COMPUTE_ONLY, WITH_COMM):
        arguments = {"hdp_size": 32, "max_tokens_per_rank": 16384, "cost": cost, "pp_size": stages}
        ours = plan(lognormal(512), **arguments)
        theirs = plan(lognormal(512), policy="bytescale-pp", **arguments)
        assert ours.predicted_s < 0.8 * theirs.predicted_s
