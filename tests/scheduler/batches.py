"""Batches and clusters for the planner's tests, as hypothesis strategies."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from hdp.scheduler import CostModel

COMPUTE_ONLY = CostModel.from_coefficients(quadratic_s=5.128e-9, linear_s=1.84e-4)
WITH_COMM = CostModel.from_coefficients(
    quadratic_s=5.128e-9,
    linear_s=1.84e-4,
    fixed_s=0.02,
    small_shard_tokens=700,
    ring_step_s=2e-3,
    kv_bytes_per_token=524288,
    intra_node_bytes_per_s=150e9,
    inter_node_bytes_per_s=40e9,
    activation_bytes_per_token=5e6,
    temporary_bytes_per_token=1e5,
    num_layers=32,
    host_bytes_per_s=50e9,
    reduce_s=0.1,
)
POLICY_NAMES = (
    "hdp",
    "static",
    "bytescale",
    "bytescale-naive",
    "bytescale-dp",
    "bytescale-pp",
)


def lognormal(count: int, *, median: float = 1100, sigma: float = 1.7, seed: int = 0) -> np.ndarray:
    """(count,) int64 lengths in [1, 256K]; the first is 256K."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(np.exp(rng.normal(np.log(median), sigma, count)), 1, 262144)
    lengths[0] = 262144
    return lengths.astype(np.int64)


@st.composite
def clusters(draw: st.DrawFn) -> dict[str, Any]:
    """hdp_size, max_tokens_per_rank and ranks_per_node of plan()."""
    size = draw(st.integers(1, 24))
    nodes = st.sampled_from([None, *(d for d in range(1, size + 1) if size % d == 0)])
    return {
        "hdp_size": size,
        "max_tokens_per_rank": draw(st.sampled_from([1, 3, 64, 1000, 8192])),
        "ranks_per_node": draw(nodes),
    }


@st.composite
def batches(draw: st.DrawFn, pipelines: bool = True) -> tuple[list[int], dict[str, Any]]:
    """(lengths, arguments of plan()) that some plan can hold."""
    arguments = draw(clusters())
    most = arguments["hdp_size"] * arguments["max_tokens_per_rank"]
    lengths = draw(
        st.lists(
            st.one_of(st.integers(1, most), st.integers(1, max(1, most // 20)), st.just(most)),
            min_size=1,
            max_size=40,
        )
    )
    arguments["cost"] = draw(st.sampled_from([COMPUTE_ONLY, WITH_COMM]))
    arguments["offload"] = draw(st.booleans())
    arguments["equal_counts"] = draw(st.booleans())
    if pipelines:
        arguments["pp_size"] = draw(st.sampled_from([1, 1, 2, 3]))
    return lengths, arguments
