"""Ring or gather: when a ring may be gathered, and when that is faster.

Plans decide by this rule (policies/to_step_plan.py), and the planner's prices contain it
(`CostModel.unit_s`). The runtime does what the plan says: no rank decides for itself.

A ring may be gathered if it holds one sequence, lies inside a node, and

1. there is something to save: ring steps, or small shards that cost more than the keys that no
   block hides
2. all keys of a layer fit MAX_GATHERED_BYTES
3. from GATHER_LEAST_RANKS on every further rank makes it faster, on which degrees.py relies
   (`test_gathered_time_never_rises`). Where keys travel so slowly that it does not, a ring of two
   ranks ends sooner anyway (`test_where_gathering_does_not_scale_two_ranks_win`)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .cost_model import GATHER_LEAST_RANKS, CostModel

MAX_GATHERED_BYTES = 1 << 30  # of one layer's keys, values and their gradients, at once


def may_gather(cost: CostModel, seqlen: Any) -> np.ndarray:
    """bool: whether a ring of this one sequence, inside a node, may be gathered. Broadcasts."""
    seqlen = np.asarray(seqlen, dtype=np.float64)
    key_s = cost.kv_bytes_per_token / cost.intra_node_bytes_per_s
    small_s = cost.quadratic_s * cost.small_shard_tokens
    if cost.ring_step_s == 0.0 and key_s >= 2 * small_s:  # 1
        return np.zeros(seqlen.shape, dtype=bool)
    # forward and backward: keys and values twice, their gradients in fp32 once
    num_bytes = seqlen * 2 * cost.kv_bytes_per_token / cost.num_layers
    falls = key_s <= cost.quadratic_s * seqlen / 2 + 2 * small_s + cost.linear_s
    return falls & (num_bytes <= MAX_GATHERED_BYTES)  # 3, 2


def gathers(cost: CostModel, seqlen: Any, degree: Any, across_nodes: Any = False) -> np.ndarray:
    """bool: whether a ring of this one sequence may be gathered and is faster so. Broadcasts."""
    faster = cost.piece_s(seqlen, degree, gathered=True) < cost.piece_s(seqlen, degree)
    inside = (np.asarray(degree) >= GATHER_LEAST_RANKS) & ~np.asarray(across_nodes)
    return faster & inside & may_gather(cost, seqlen)
