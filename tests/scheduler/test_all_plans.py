"""Plans and bounds against the best of all plans, in batches small enough to try them all."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hdp.scheduler import CostModel, StepPlan, finish_s, plan
from hdp.scheduler.costs.gathering import may_gather
from hdp.scheduler.policies.batch import Batch
from hdp.scheduler.policies.memory import min_degrees
from hdp.scheduler.simulation.simulator import microbatch_times
from tests.scheduler.all_plans import all_plans


def copies_are_hidden(made: StepPlan, cost: CostModel) -> bool:
    """Eq. 3: behind what the kernels of the microbatch's tokens would take on one rank."""
    one_way_s = min(cost.forward_share, 1 - cost.forward_share)
    hidden = one_way_s * cost.compute_s(made.seqlens, 1) / cost.host_s_per_token / made.degrees
    owner = np.repeat(np.arange(len(made.offload_ratio)), np.diff(made.piece_offsets))
    most = np.bincount(owner, hidden[made.piece_seqs], minlength=len(made.offload_ratio))
    return bool((made.offload_ratio * made.microbatch_tokens <= most + 1e-9).all())


def best_s(
    lengths: list[int], cost: CostModel, *, least_degrees: Any = 1, **arguments: Any
) -> float:
    """Of plans whose host copies are hidden."""
    best = math.inf
    for made in all_plans(lengths, may_gather=may_gather(cost, lengths).tolist(), **arguments):
        if (made.degrees < least_degrees).any():
            continue
        if made.offload_ratio.any() and not copies_are_hidden(made, cost):
            continue
        try:
            if made.pp_size > 1:
                made.validate()
            best = min(best, finish_s(made, cost))
        except ValueError:  # a deadlock, or an index that differs
            continue
    return best


def draw(seed: int) -> tuple[list[int], CostModel, dict[str, Any]]:
    rng = np.random.default_rng(seed)
    size = int(rng.integers(1, 4))
    capacity = int(rng.choice([1, 7, 100]))
    most = size * capacity if rng.random() < 0.5 else capacity
    lengths = rng.integers(1, most + 1, int(rng.integers(1, {1: 5, 2: 4, 3: 3}[size]))).tolist()

    def some(low: float, high: float, share: float) -> float:
        return float(low * (high / low) ** rng.random()) if rng.random() < share else 0.0

    cost = CostModel.from_coefficients(
        quadratic_s=some(1e-8, 1e-4, 0.8),
        linear_s=some(1e-6, 1e-3, 0.9) or 1e-5,
        fixed_s=some(1e-5, 1.0, 0.6),
        small_shard_tokens=some(1, 100, 0.5),
        ring_step_s=some(1e-5, 1e-1, 0.4),
        kv_bytes_per_token=some(1e3, 1e8, 0.5),
        intra_node_bytes_per_s=1e11,
        inter_node_bytes_per_s=1e10,
        reduce_s=some(1e-4, 1.0, 0.3),
    )
    nodes = [None, *(n for n in range(1, size + 1) if size % n == 0)]
    return (
        lengths,
        cost,
        {
            "hdp_size": size,
            "max_tokens_per_rank": capacity,
            "ranks_per_node": nodes[int(rng.integers(len(nodes)))],
            "pp_size": int(rng.choice([1, 1, 2])) if size < 3 else 1,
        },
    )


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_bound_and_plan_beside_the_best_of_all_plans(first: int) -> None:
    """No plan beats the bound, and ours is no more than 30 % above the best one."""
    over = []
    for seed in range(first, first + 50):
        lengths, cost, arguments = draw(seed)
        made = plan(lengths, cost=cost, **arguments).validate()
        best = best_s(lengths, cost, **arguments)
        assert made.lower_bound_s <= best * (1 + 1e-9), f"seed {seed}"
        assert best * (1 - 1e-6) <= made.predicted_s <= 1.3 * best, f"seed {seed}"
        over.append(made.predicted_s / best)
    assert np.mean(over) < 1.02


def test_no_plan_with_hidden_copies_beats_the_bound() -> None:
    saved = 0
    for seed in range(100):
        lengths, cost, arguments = draw(seed)
        rng = np.random.default_rng([seed, 1])
        cost = replace(
            cost,
            num_layers=int(rng.integers(3, 9)),
            activation_bytes_per_token=1e6,
            host_bytes_per_s=float(10 ** rng.uniform(8, 12)),
            forward_share=float(rng.choice([0.2, 1 / 3, 0.7])),
        )
        made = plan(lengths, cost=cost, offload=True, **arguments).validate()
        times = microbatch_times(made, cost)
        assert times.offload_s.max() <= 1e-9 * (1 + times.compute_s.max()), f"seed {seed}"
        alone = min_degrees(Batch.check(lengths, cost=cost, offload=True, **arguments))
        best = best_s(lengths, cost, least_degrees=alone, offloadable=cost.offloadable, **arguments)
        assert made.lower_bound_s <= best * (1 + 1e-9), f"seed {seed}"
        saved += made.notes["ranks_saved"]
    assert saved > 0


def coefficients(**others: float) -> CostModel:
    return CostModel.from_coefficients(quadratic_s=0.0, linear_s=1e-6, **others)


def test_a_short_sequence_rides_rather_than_widens() -> None:
    """A ring of its own ends the short one a little sooner and costs one more microbatch."""
    made = plan([2, 9], hdp_size=2, max_tokens_per_rank=7, cost=coefficients(fixed_s=1.0))
    assert made.num_microbatches.tolist() == [1, 1]
    assert made.predicted_s == pytest.approx(1.0, rel=1e-3)
    made = plan([7, 109], hdp_size=2, max_tokens_per_rank=100, pp_size=2,
                cost=coefficients(fixed_s=1.0)).validate()  # fmt: skip
    assert made.num_microbatches.tolist() == [1, 1]
    assert made.predicted_s == pytest.approx(2.0, rel=1e-3)


def test_pipelines_do_not_widen_where_microbatches_cost_more() -> None:
    made = plan([1, 1], hdp_size=2, max_tokens_per_rank=1, cost=coefficients(fixed_s=1.0),
                pp_size=2)  # fmt: skip
    assert made.degrees.tolist() == [1, 1]
    assert made.predicted_s == pytest.approx(2.0, rel=1e-3)


def test_the_widest_ring_ends_the_step_where_the_reduction_is_long() -> None:
    """[9] on few ranks, then [25] on all four: the reduction starts during the backward of 25."""
    cost = coefficients(ring_step_s=1e-6, reduce_s=1e-3)
    made = plan([9, 25], hdp_size=4, max_tokens_per_rank=7, cost=cost).validate()
    assert made.ends_together
    assert made.predicted_s <= best_s(
        [9, 25], cost, hdp_size=4, max_tokens_per_rank=7, ranks_per_node=None, pp_size=1
    ) * (1 + 1e-3)


def test_bound_knows_the_reduction() -> None:
    """One microbatch: its forward, then the reduction, which is longer than its backward."""
    cost = CostModel.from_coefficients(quadratic_s=0.0, linear_s=1.0, reduce_s=20.0)
    made = plan([9], hdp_size=1, max_tokens_per_rank=9, cost=cost)
    assert made.lower_bound_s == pytest.approx(3.0 + 20.0, rel=1e-3)
    assert made.predicted_s == pytest.approx(3.0 + 20.0)
    made = plan([9], hdp_size=1, max_tokens_per_rank=9, cost=cost, pp_size=2)
    assert made.lower_bound_s <= made.predicted_s == pytest.approx(2 * 9.0 + 20.0)
    assert made.gap < 1e-2
