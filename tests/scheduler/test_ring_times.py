"""Pieces that share a ring in one microbatch are timed together, as the runtime runs them."""

from __future__ import annotations

import numpy as np
import pytest

from hdp.scheduler import CostModel, StepPlan, plan
from hdp.scheduler.simulation.simulator import microbatch_times
from hdp.scheduler.workloads.generate import draw

COST = CostModel.from_coefficients(
    quadratic_s=1e-6, linear_s=1e-5, fixed_s=0.5, ring_step_s=0.01, small_shard_tokens=10,
    kv_bytes_per_token=1e3, intra_node_bytes_per_s=1e6, inter_node_bytes_per_s=1e6,
)  # fmt: skip


def _ring(*seqlens: int) -> StepPlan:
    seqs = list(range(len(seqlens)))
    return StepPlan.from_lists(
        list(seqlens), [[0, 1]] * len(seqs), [[seqs], [seqs]], max_tokens_per_rank=10**6
    )


def test_pieces_of_a_ring_go_round_together() -> None:
    long, short = 100_000, 400
    assert COST.exposed_s(long, 2) == 0.0  # its blocks take longer than its transfer
    assert COST.exposed_s(short, 2) > 0.0
    times = microbatch_times(_ring(long, short), COST)
    assert times.comm_s.tolist() == [0.0, 0.0]
    # One step of the ring, not one per piece.
    kernels_s = COST.compute_s(long, 2) + COST.compute_s(short, 2) - COST.ring_step_s
    np.testing.assert_allclose(times.compute_s, kernels_s + COST.fixed_s)


def test_exposed_time_of_short_pieces_adds_up() -> None:
    times = microbatch_times(_ring(400, 600), COST)
    np.testing.assert_allclose(times.comm_s, float(COST.exposed_s(400, 2) + COST.exposed_s(600, 2)))


@pytest.mark.parametrize("policy", ["hdp", "bytescale"])
def test_one_ring_piece_costs_what_the_cost_model_says(policy: str) -> None:
    seqlens = draw("lognormal", num_sequences=60, seed=1, max_length=20_000)
    made = plan(seqlens, hdp_size=8, max_tokens_per_rank=4096, cost=COST, policy=policy)
    times = microbatch_times(made, COST)
    piece_s = COST.piece_s(made.seqlens, made.degrees)[made.piece_seqs]
    bounds = np.concatenate([[0.0], np.cumsum(piece_s)])[made.piece_offsets]
    np.testing.assert_allclose(times.total_s, np.diff(bounds) + COST.fixed_s)


def test_lower_bound_holds_for_packed_rings() -> None:
    for seed in range(20):
        seqlens = draw("lognormal", num_sequences=80, seed=seed, max_length=30_000)
        made = plan(seqlens, hdp_size=8, max_tokens_per_rank=4096, cost=COST, policy="static")
        assert made.predicted_s >= made.lower_bound_s * (1 - 1e-12)
