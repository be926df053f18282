"""The paper's algorithms: what it says of them, on cases small enough to follow."""

from __future__ import annotations

import numpy as np
import pytest

from hdp.scheduler import CostModel, StepPlan, plan
from tests.scheduler.batches import COMPUTE_ONLY, WITH_COMM, lognormal


def degrees(lengths: list[int], **arguments) -> list[int]:
    return plan(lengths, **{"cost": COMPUTE_ONLY, **arguments}).validate().degrees.tolist()


def test_ranks_by_memory_alone() -> None:
    """768K takes 96 ranks of 8K, beside 32 sequences of 8K (section 5.1)."""
    lengths = [786432] + [8192] * 32
    made = plan(lengths, hdp_size=128, max_tokens_per_rank=8192, cost=COMPUTE_ONLY,
                policy="bytescale-naive").validate()  # fmt: skip
    assert made.degrees.tolist() == [96] + [1] * 32
    assert (made.num_microbatches == 1).all()


def test_time_steps_of_figure_8() -> None:
    """Time steps of 4 ranks: one group of 4, then two of 2, then 1 + 2 + 1."""
    made = plan([32, 16, 16, 8, 16, 8], hdp_size=4, max_tokens_per_rank=8, cost=COMPUTE_ONLY,
                policy="bytescale-naive").validate()  # fmt: skip
    steps = [[mb.pieces[0].seq for mb in made.microbatches(rank)] for rank in range(4)]
    assert steps == [[0, 1, 3], [0, 1, 4], [0, 2, 4], [0, 2, 5]]


def test_short_ones_are_packed() -> None:
    made = plan([5, 3, 4, 4, 2, 6], hdp_size=3, max_tokens_per_rank=8, cost=COMPUTE_ONLY,
                policy="bytescale-naive").validate()  # fmt: skip
    assert made.microbatch_tokens.tolist() == [8, 8, 8]


def test_dp_balance_evens_out_time() -> None:
    arguments = {"hdp_size": 64, "max_tokens_per_rank": 16384, "cost": COMPUTE_ONLY}
    naive = plan(lognormal(1024), policy="bytescale-naive", **arguments)
    balanced = plan(lognormal(1024), policy="bytescale-dp", **arguments)
    assert balanced.degrees.tolist() == naive.degrees.tolist()
    assert balanced.predicted_s < naive.predicted_s
    counts = balanced.num_microbatches
    assert counts.max() > counts.min()  # ranks run different numbers of microbatches


def test_dp_balance_goes_from_long_to_short() -> None:
    made = plan(lognormal(300), hdp_size=32, max_tokens_per_rank=16384, cost=COMPUTE_ONLY,
                policy="bytescale-dp").validate()  # fmt: skip
    for rank in range(32):
        longest = [max(p.seqlen for p in mb.pieces) for mb in made.microbatches(rank)]
        assert longest == sorted(longest, reverse=True)


def test_pp_balance_mixes_lengths() -> None:
    """It draws from all buckets in turn, so that the first microbatches are of all lengths."""
    made = plan(lognormal(400), hdp_size=16, max_tokens_per_rank=16384, cost=COMPUTE_ONLY,
                policy="bytescale-pp", pp_size=4).validate()  # fmt: skip
    first = [max((p.seqlen for p in made.microbatches(r)[0].pieces), default=0) for r in range(16)]
    assert made.policy == "bytescale-pp"
    assert len(set(made.num_microbatches.tolist())) > 1
    assert max(first) == 262144


@pytest.mark.parametrize(("stages", "name"), [(1, "bytescale-dp"), (2, "bytescale-pp")])
def test_bytescale_is_what_the_paper_uses(stages: int, name: str) -> None:
    arguments = {"hdp_size": 16, "max_tokens_per_rank": 16384, "cost": COMPUTE_ONLY}
    made: StepPlan = plan(lognormal(60), policy="bytescale", pp_size=stages, **arguments)
    assert made == plan(lognormal(60), policy=name, pp_size=stages, **arguments)


def test_eq_3() -> None:
    """D(s) with all of the tokens offloaded keeps (2 + 0 * (l - 2)) / l of them: 1/16 at l = 32."""
    cost = CostModel.from_coefficients(
        quadratic_s=1.0, linear_s=1.0, activation_bytes_per_token=1.0, num_layers=32,
        host_bytes_per_s=1e9,
    )  # fmt: skip
    made = plan([32 * 8192], hdp_size=64, max_tokens_per_rank=8192, cost=cost, offload=True,
                policy="bytescale-naive").validate()  # fmt: skip
    assert made.degrees.tolist() == [2]
    assert made.offload_ratio.max() == pytest.approx(1.0)
    # With a third of the capacity more, less has to travel: the smallest ratio that fits is taken.
    made = plan([24 * 8192], hdp_size=64, max_tokens_per_rank=8192, cost=cost, offload=True,
                policy="bytescale-naive").validate()  # fmt: skip
    assert made.degrees.tolist() == [2]
    assert made.offload_ratio.max() == pytest.approx((1 - 1 / 12) * 32 / 30)


def test_offload_only_where_it_is_hidden() -> None:
    """Links that are shared by eight hide an eighth."""
    lengths = [131072, 65536, 8000]
    ratios = []
    for sharing in (1, 8):
        cost = CostModel.from_coefficients(
            quadratic_s=5e-9, linear_s=1e-5, activation_bytes_per_token=5e6, num_layers=32,
            host_bytes_per_s=50e9, ranks_per_host_link=sharing,
        )  # fmt: skip
        made = plan(lengths, hdp_size=32, max_tokens_per_rank=8192, cost=cost, offload=True,
                    policy="bytescale-naive").validate()  # fmt: skip
        hidden = cost.hidden_ratio(np.array(lengths))
        used = [0.0] * 3
        for rank in range(32):
            for microbatch in made.microbatches(rank):
                for piece in microbatch.pieces:
                    used[piece.seq] = microbatch.offload_ratio
        assert (np.array(used) <= hidden + 1e-9).all()
        ratios.append(made.degrees.tolist())
    assert ratios[0][0] < ratios[1][0] <= 16


def test_with_communication() -> None:
    made = plan(lognormal(200), hdp_size=32, max_tokens_per_rank=16384, cost=WITH_COMM,
                policy="bytescale").validate()  # fmt: skip
    assert made.predicted_s > made.lower_bound_s
