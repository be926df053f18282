"""Ring or gather: when a ring may be gathered, and when that is faster.

Each plan fixes the mode of every ring by this rule (policies/to_step_plan.py), and the planner's
prices include it (`CostModel.unit_s`). The runtime follows the plan: no rank decides for itself.

A ring may be gathered if it holds one sequence, lies inside a node, and

1. there is something to save: ring steps, or small shards that cost more than the exposed transfer
   of keys
2. all keys of a layer fit in MAX_GATHERED_BYTES
3. from GATHER_LEAST_RANKS on, every added rank makes it faster; degrees.py relies on this
   (`test_gathered_time_never_rises`). Where the link is too slow for that, a ring of two ranks
   finishes sooner anyway (`test_where_gathering_does_not_scale_two_ranks_win`)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .cost_model import GATHER_LEAST_RANKS, CostModel

MAX_GATHERED_BYTES = 1 << 30  # of one layer's keys, values and their gradients, at once


def may_gather(cost: CostModel, seqlen: Any) -> np.ndarray:
    """bool: whether a ring of one such sequence, inside a node, may be gathered. Broadcasts."""
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
    """bool: whether a ring of one such sequence may be gathered and is then faster. Broadcasts."""
    faster = cost.piece_s(seqlen, degree, gathered=True) < cost.piece_s(seqlen, degree)
    inside = (np.asarray(degree) >= GATHER_LEAST_RANKS) & ~np.asarray(across_nodes)
    return faster & inside & may_gather(cost, seqlen)
