"""plan(): every policy makes valid, reproducible plans; bad input is refused with a remedy."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdp.scheduler import POLICIES, CostModel, StepPlan, plan, simulate
from tests.scheduler.batches import COMPUTE_ONLY, POLICY_NAMES, WITH_COMM, batches, lognormal


def test_policy_names() -> None:
    assert set(POLICY_NAMES) == set(POLICIES)


def keeps_to_nodes(made: StepPlan, node: int | None) -> bool:
    """Whether each ring is inside a node, or has whole ones."""
    node = node or made.hdp_size
    for seq, degree in enumerate(made.degrees.tolist()):
        nodes = len({rank // node for rank in made.ring(seq)})
        if nodes != (1 if degree <= node else degree / node):
            return False
    return True


@pytest.mark.parametrize("policy", POLICY_NAMES)
@given(case=batches())
def test_plans_are_valid(policy: str, case) -> None:
    lengths, arguments = case
    made = plan(lengths, policy=policy, **arguments).validate()
    assert made.policy.startswith(policy)
    assert made.seqlens.tolist() == lengths
    assert simulate(made, arguments["cost"]).makespan_s == pytest.approx(made.predicted_s)
    if keeps_to_nodes(made, arguments["ranks_per_node"]):  # what the bound is for
        assert made.predicted_s >= made.lower_bound_s * (1 - 1e-9)
    if arguments["equal_counts"]:
        assert len(set(made.num_microbatches.tolist())) == 1


@given(case=batches())
def test_one_multi_rank_piece_per_microbatch(case) -> None:
    lengths, arguments = case
    made = plan(lengths, **arguments)
    owner = np.repeat(np.arange(len(made.offload_ratio)), np.diff(made.piece_offsets))
    wide = made.degrees[made.piece_seqs] > 1
    assert np.bincount(owner[wide], minlength=1).max() <= 1


@given(case=batches())
def test_rings_keep_to_nodes(case) -> None:
    """A ring stays inside a node where it fits, else it has whole nodes."""
    lengths, arguments = case
    assert keeps_to_nodes(plan(lengths, **arguments), arguments["ranks_per_node"])


@given(case=batches())
def test_policies_do_not_change_the_arguments(case) -> None:
    lengths, arguments = case
    array = np.array(lengths)
    array.setflags(write=False)
    assert plan(array, **arguments) == plan(lengths, **arguments)


@pytest.mark.parametrize("policy", POLICY_NAMES)
@given(
    pairs=st.lists(st.tuples(st.integers(1, 900), st.integers(1, 900)), min_size=1, max_size=12),
    stages=st.sampled_from([1, 2]),
    cost=st.sampled_from([COMPUTE_ONLY, WITH_COMM]),
)
def test_units_stay_together(policy: str, pairs, stages: int, cost) -> None:
    lengths = [length for pair in pairs for length in pair]
    units = [index for index, _ in enumerate(pairs) for _ in range(2)]
    made = plan(lengths, hdp_size=8, max_tokens_per_rank=300, cost=cost, units=units,
                policy=policy, pp_size=stages).validate()  # fmt: skip
    for rank in range(8):
        for microbatch in made.microbatches(rank):
            seqs = {piece.seq for piece in microbatch.pieces}
            assert all(seq ^ 1 in seqs for seq in seqs)
    for seq in range(0, len(lengths), 2):
        assert made.ring(seq) == made.ring(seq + 1)


def test_units_need_not_be_neighbours() -> None:
    made = plan([10, 20, 30, 40], hdp_size=2, max_tokens_per_rank=50, cost=COMPUTE_ONLY,
                units=[7, -3, 7, -3]).validate()  # fmt: skip
    assert made.ring(0) == made.ring(2) and made.ring(1) == made.ring(3)


# ---- the same plan everywhere ----

_PROGRAM = """
import sys; sys.path.insert(0, {path!r})
from tests.scheduler.batches import WITH_COMM, lognormal
from hdp.scheduler import plan
for arguments in ({{}}, {{"pp_size": 2}}, {{"ranks_per_node": 8}}, {{"policy": "bytescale"}}):
    made = plan(lognormal(700), hdp_size=64, max_tokens_per_rank=16384, cost=WITH_COMM,
                **arguments)
    print(made.digest)
"""


def test_same_bytes() -> None:
    """Other processes, hash seeds and thread counts make the same plan, byte for byte."""
    path = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    outputs = set()
    for seed, threads in (("0", "1"), ("1", "4")):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads}
        environment["NPY_DISABLE_CPU_FEATURES"] = "AVX512F AVX512_SKX" if seed == "1" else ""
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _PROGRAM.format(path=path)],
            env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        outputs.add(done.stdout)
    assert len(outputs) == 1
    mine = plan(lognormal(700), hdp_size=64, max_tokens_per_rank=16384, cost=WITH_COMM)
    assert mine.digest == outputs.pop().split()[0]


def test_order_of_the_batch_does_not_change_the_time() -> None:
    lengths = lognormal(300)
    arguments: dict[str, Any] = {"hdp_size": 32, "max_tokens_per_rank": 16384, "cost": COMPUTE_ONLY}
    forward = plan(lengths, **arguments).predicted_s
    assert plan(lengths[::-1], **arguments).predicted_s == pytest.approx(forward, rel=1e-3)


# ---- few sequences ----


def test_rings_widen_where_it_pays() -> None:
    """One sequence that would fit one rank gets all of them when communication is free."""
    made = plan([8000], hdp_size=7, max_tokens_per_rank=8192, cost=COMPUTE_ONLY)
    assert made.degrees.tolist() == [7]


def test_rings_stay_narrow_where_it_does_not() -> None:
    slow = replace(WITH_COMM, ring_step_s=0.1)
    made = plan([100, 90], hdp_size=8, max_tokens_per_rank=8192, cost=slow)
    assert made.degrees.tolist() == [1, 1]
    assert (made.num_microbatches == 1).all()  # six ranks run an empty microbatch


def test_times_far_apart() -> None:
    """A ring step of a second beside tokens of a microsecond, on 10,000 ranks: ticks do not
    overflow."""
    cost = CostModel.from_coefficients(quadratic_s=0.0, linear_s=1e-6, ring_step_s=1.0)
    made = plan([1, 1, 1], hdp_size=10_000, max_tokens_per_rank=4, cost=cost).validate()
    assert made.degrees.tolist() == [1, 1, 1]
    made = plan([20_000, 1], hdp_size=10_000, max_tokens_per_rank=4, cost=cost).validate()
    assert made.degrees.tolist() == [5000, 1]
    assert made.gap < 1e-3


def test_one_token() -> None:
    for policy in POLICY_NAMES:
        made = plan([1], hdp_size=3, max_tokens_per_rank=1, cost=WITH_COMM, policy=policy)
        made.validate()


# ---- offload ----


def test_offload_saves_ranks() -> None:
    lengths = [262144] + [2000] * 100
    arguments: dict[str, Any] = {"hdp_size": 64, "max_tokens_per_rank": 8192, "cost": WITH_COMM}
    for policy in ("hdp", "bytescale-naive"):
        without = plan(lengths, policy=policy, **arguments)
        made = plan(lengths, policy=policy, offload=True, **arguments).validate()
        assert without.offload_ratio.max() == 0.0
        if policy == "bytescale-naive":
            assert made.degrees[0] < without.degrees[0] == 32
            assert 0.5 < made.offload_ratio.max() <= 1.0
            assert made.microbatch_tokens.max() > 8192
            assert made.notes["ranks_saved"] == 32 - made.degrees[0]
        assert made.predicted_s >= made.lower_bound_s


# ---- static ----


def test_static_is_packed_zigzag() -> None:
    made = plan([100, 30, 20, 900], hdp_size=8, max_tokens_per_rank=300, cost=COMPUTE_ONLY,
                policy="static", cp_size=4).validate()  # fmt: skip
    assert made.degrees.tolist() == [4, 4, 4, 4]
    assert {made.ring(seq) for seq in range(4)} <= {(0, 1, 2, 3), (4, 5, 6, 7)}
    assert made.notes == {"cp_size": 4}
    least = plan([900], hdp_size=12, max_tokens_per_rank=200, cost=COMPUTE_ONLY, policy="static")
    assert least.notes == {"cp_size": 6}  # 5 ranks would do and do not divide 12


# ---- bad input ----


def scaled(linear_s: float) -> CostModel:
    return CostModel.from_coefficients(quadratic_s=0.0, linear_s=linear_s)


GOOD: dict[str, Any] = {"hdp_size": 8, "max_tokens_per_rank": 8192, "cost": COMPUTE_ONLY}


@pytest.mark.parametrize(
    ("lengths", "change", "message"),
    [
        ([70000], {}, "sequence of 70000 tokens needs 9 ranks of 8192, hdp_size=8; raise max_tok"),
        ([70000], {"cost": WITH_COMM}, "raise max_tokens_per_rank or hdp_size, or allow offload"),
        ([40000, 40000], {"units": [1, 1]}, "unit of 2 sequences of 80000 tokens needs 10 ranks"),
        ([], {}, "empty batch"),
        ([10, 0], {}, r"seqlens\[1\] is 0"),
        ([10, -5], {}, r"seqlens\[1\] is -5"),
        ([10.5], {}, "seqlens must be integers, got float64"),
        ([float("nan")], {}, "seqlens must be integers"),
        (["a"], {}, "seqlens must be integers"),
        ([[1, 2]], {}, r"one-dimensional, got shape \(1, 2\)"),
        ([2**63], {}, "does not fit in int64"),
        ([2**62], {"max_tokens_per_rank": 2**53}, r"the sum must be at most 2\*\*53"),
        ([2**52] * 4, {"max_tokens_per_rank": 2**53}, r"4 sequences of 1.8e\+16 tokens"),
        (np.array([5], dtype="timedelta64[s]"), {}, "seqlens must be integers, got timedelta64"),
        (np.array([True, False]), {}, "seqlens must be integers, got bool"),
        ([10], {"hdp_size": 2**40}, "hdp_size=1099511627776 must be at most 16777216"),
        ([10], {"max_tokens_per_rank": 2**70}, "max_tokens_per_rank=.* must be at most"),
        ([10], {"pp_size": 10**6}, "pp_size=1000000 must be at most 1024; did you pass another"),
        (
            [10],
            {"cost": scaled(5e-324)},
            "cost model gives .* seconds .*10 tokens.: check its coef",
        ),
        ([10**6], {"cost": scaled(1e308), "hdp_size": 999}, "cost model gives inf seconds for the"),
        ([10], {"hdp_size": 0}, "hdp_size=0 must be an integer >= 1"),
        ([10], {"hdp_size": 2.0}, "hdp_size=2.0 must be an integer"),
        ([10], {"hdp_size": True}, "hdp_size=True must be an integer"),
        ([10], {"max_tokens_per_rank": -1}, "max_tokens_per_rank=-1"),
        ([10], {"pp_size": 0}, "pp_size=0"),
        ([10], {"ranks_per_node": 3}, "hdp_size=8 is not a multiple of ranks_per_node=3"),
        ([10], {"ranks_per_node": 0}, "ranks_per_node=0"),
        ([10], {"policy": "best"}, "unknown policy 'best'; choose one of hdp"),
        ([10], {"units": [1, 2]}, "2 units for 1 sequences"),
        ([10], {"cost": 3.0}, "cost must be a CostModel, not float"),
        ([10], {"policy": "static", "cp_size": 3}, "hdp_size=8 is not divisible by cp_size=3"),
        ([10], {"policy": "static", "cp_size": 0}, "cp_size=0"),
        ([40000], {"policy": "static", "cp_size": 4}, "needs 5 ranks of 8192, cp_size=4; raise"),
        ([10], {"cp_size": 4}, "cp_size=4 applies to the static policy"),
    ],
)
def test_bad_input(lengths, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(lengths, **{**GOOD, **change})


@pytest.mark.parametrize("policy", POLICY_NAMES)
@given(case=batches(), multiple=st.integers(1, 4), together=st.booleans())
def test_demands_on_the_counts(policy: str, case, multiple: int, together: bool) -> None:
    """Counts are a multiple, rings end together, and equal counts are aligned."""
    lengths, arguments = case
    demands = {"multiple": multiple, "ends_together": together}
    made = plan(lengths, policy=policy, **{**arguments, **demands}).validate()
    assert not (made.num_microbatches % multiple).any()
    assert made.ends_together or not together
    if arguments["equal_counts"]:
        assert made.aligned and made.ends_together
    if made.aligned:
        assert len(set(made.num_microbatches.tolist())) == 1


def test_a_ring_that_ends_on_one_of_its_ranks_is_followed_by_an_empty_microbatch() -> None:
    """bytescale gives rank 1 local work after the ring and rank 0 none."""
    options = {"hdp_size": 2, "max_tokens_per_rank": 10, "cost": COMPUTE_ONLY}
    made = plan([20, 9], policy="bytescale", **options)
    assert made.num_microbatches.tolist() == [2, 1] and not made.ends_together
    together = plan([20, 9], policy="bytescale", ends_together=True, **options)
    assert together.num_microbatches.tolist() == [2, 2] and together.ends_together
    even = plan([20, 9], policy="bytescale", ends_together=True, multiple=2, **options)
    assert even.num_microbatches.tolist() == [2, 2]
