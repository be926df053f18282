"""Offload in plans: what leaves a rank fits in its host memory, and is what Eq. 3 allows."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hdp.scheduler import POLICIES, plan
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


@pytest.mark.parametrize("policy", POLICIES)
def test_without_host_memory_offload_changes_nothing(policy):
    cost = replace(WITH_COMM, host_memory_bytes=0.0)
    options = {"hdp_size": 8, "max_tokens_per_rank": 8192, "cost": cost, "policy": policy}
    lengths = [40000, 9000, 500, 8000, 30]
    assert not plan(lengths, **options, offload=True).offload_ratio.any()
