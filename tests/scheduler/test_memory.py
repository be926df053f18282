"""Offload in plans: what leaves a rank fits in its host memory, and is what Eq. 3 allows."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hdp.scheduler import POLICIES, plan
from hdp.scheduler.policies.batch import Batch
from hdp.scheduler.policies.memory import max_pack_tokens
from tests.scheduler.batches import WITH_COMM, batches


def host_bytes(made, cost):
    """Of each microbatch: two layers' activations never leave."""
    moving = (cost.num_layers - 2) / cost.num_layers * cost.activation_bytes_per_token
    return made.microbatch_tokens * made.offload_ratio * moving


@settings(max_examples=150, deadline=None)
@given(batches(), st.sampled_from([0.0, 1e6, 1e9, 20e9]), st.sampled_from(["hdp", "bytescale"]))
def test_no_microbatch_sends_more_than_host_memory_takes(drawn, most, policy):
    lengths, arguments = drawn
    cost = replace(WITH_COMM, host_memory_bytes=most)
    made = plan(lengths, **{**arguments, "cost": cost, "offload": True}, policy=policy).validate()
    assert (host_bytes(made, cost) <= most * (1 + 1e-9) + 1e-3).all()


def test_more_host_memory_means_fewer_ranks():
    """256K tokens at 8K a rank: 32 ranks, or fewer by what the host takes."""
    bytes_per_token = WITH_COMM.activation_bytes_per_token + WITH_COMM.temporary_bytes_per_token
    degrees = []
    for tokens_on_host in (0, 8192, 24576, 1 << 30):
        cost = replace(WITH_COMM, host_memory_bytes=tokens_on_host * bytes_per_token)
        options = {"hdp_size": 64, "max_tokens_per_rank": 8192, "cost": cost, "offload": True}
        made = plan([262144] * 4, **options, policy="bytescale")
        degrees.append(int(made.degrees.max()))
    assert degrees[:3] == [32, 16, 8] and degrees[3] < 8


def test_local_jobs_are_packed_beyond_a_rank_only_where_that_saves_fixed_time():
    """More tokens per microbatch save nothing but `fixed_s`."""
    for fixed_s, larger in ((0.0, False), (1e-3, True)):
        cost = replace(WITH_COMM, fixed_s=fixed_s)
        batch = Batch.check(
            [4096] * 8, hdp_size=2, max_tokens_per_rank=8192, cost=cost, offload=True
        )
        assert (max_pack_tokens(batch) > 8192) is larger


@pytest.mark.parametrize("policy", POLICIES)
def test_without_host_memory_offload_changes_nothing(policy):
    cost = replace(WITH_COMM, host_memory_bytes=0.0)
    options = {"hdp_size": 8, "max_tokens_per_rank": 8192, "cost": cost, "policy": policy}
    lengths = [40000, 9000, 500, 8000, 30]
    assert not plan(lengths, **options, offload=True).offload_ratio.any()
