"""What fits: the fewest ranks that hold a job, and what must go to the host (ByteScale Eq. 3).

A rank holds max_tokens_per_rank tokens. With offload a share r of a microbatch's tokens sends its
activations to the host, except those of two layers; what stays of n tokens is n * (1 - r * o),
o = `CostModel.offloadable`. The paper's D(s) follows, with two corrections: temporary buffers never
move and make o smaller, and ranks that share a host link divide its bandwidth, so that forward
hides less (`CostModel.hidden_ratio`).

1. r_max = what forward's compute hides, at most 1.
2. D = the smallest degree whose fullest shard fits at r_max; what leaves fits in host memory.
3. r = the smallest ratio that still fits on the degree that is used: the least traffic. It is 0
   where offload saves no rank, which is the paper's lower limit on r.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from hdp.scheduler.costs.cost_model import CostModel

from .batch import Batch


def _hidden_ratio(batch: Batch) -> np.ndarray:
    """(num_jobs,) float64: offload ratio that each job's work hides; may exceed 1.

    Copies go out during forward and come back during backward. The work is that of one rank, as in
    Eq. 3: it divides by the degree, and so do the bytes. What a ring adds (its steps, its small
    shards) is not counted on.
    """
    cost = batch.cost
    one_way_s = min(cost.forward_share, 1.0 - cost.forward_share)
    seconds = one_way_s * cost.unit_s(batch.job_squares, batch.job_tokens, 1)
    return seconds / (batch.job_tokens * cost.host_s_per_token)


def _capacity(batch: Batch, ratio: Any) -> np.ndarray:
    """int64: tokens that a rank can hold at offload ratios up to `ratio`, like `ratio`.

    Beside the tokens that it holds anyway, host memory takes host_memory_bytes / bytes per token.
    """
    device, cost = batch.max_tokens_per_rank, batch.cost
    bytes_per_token = cost.activation_bytes_per_token + cost.temporary_bytes_per_token
    limit = device / (1.0 - np.minimum(ratio, 1.0) * cost.offloadable)
    return np.floor(np.minimum(limit, device + cost.host_memory_bytes / bytes_per_token)).astype(
        np.int64
    )


def max_shard_tokens(batch: Batch) -> np.ndarray:
    """(num_jobs,) int64: tokens that a rank can hold if its microbatch is this job's alone."""
    if not batch.offload or batch.cost.offloadable == 0.0:
        return np.full(batch.num_jobs, batch.max_tokens_per_rank, dtype=np.int64)
    return _capacity(batch, _hidden_ratio(batch))


def shard_capacity(seqlens: np.ndarray, *, max_tokens_per_rank: int, cost: CostModel) -> np.ndarray:
    """(num_seqs,) int64: most tokens of each that a rank can hold, for plan(offload=True)."""
    batch = Batch.check(
        seqlens,
        hdp_size=1,
        max_tokens_per_rank=max_tokens_per_rank,
        cost=cost,
        offload=True,
    )
    return max_shard_tokens(batch)


def max_pack_tokens(batch: Batch) -> int:
    """Tokens that a rank can hold of any local jobs together.

    Any token hides at least what one of a very short sequence does. More tokens in a microbatch
    only save fixed_s, so without it nothing goes to the host.
    """
    cost = batch.cost
    if not batch.offload or cost.offloadable == 0.0 or cost.fixed_s == 0.0:
        return batch.max_tokens_per_rank
    one_way_s = min(cost.forward_share, 1.0 - cost.forward_share)
    token_s = one_way_s * (cost.linear_s + cost.quadratic_s * cost.small_shard_tokens)
    return int(_capacity(batch, token_s / cost.host_s_per_token))


def least_microbatches(batch: Batch) -> int:
    """No plan has fewer microbatches, over all ranks, if its host copies are hidden.

    By tokens; and by jobs of more than half a microbatch: of those that are local no two share one,
    the others take at least two each.
    """
    tokens, capacity = batch.job_tokens, batch.max_tokens_per_rank
    kept, most = float(tokens.sum()), float(capacity)
    if batch.offload and batch.cost.offloadable > 0.0:
        hidden = min(float((_hidden_ratio(batch) * tokens).sum()), kept)
        kept -= batch.cost.offloadable * hidden
        most = capacity / (1.0 - batch.cost.offloadable)
    large = int((tokens > most / 2).sum())
    return max(math.ceil(kept / capacity * (1 - 1e-9)), -(-2 * large // 3))


def min_degrees(batch: Batch) -> np.ndarray:
    """(num_jobs,) int64: the fewest ranks whose memory holds each job.

    Raises ValueError for a job that hdp_size ranks cannot hold.
    """
    limit = max_shard_tokens(batch)
    degree = -(-batch.job_tokens // limit)
    while batch.has_units:  # the shards of a unit's sequences are rounded up one by one
        over = (batch.tokens_per_rank(degree) > limit) & (degree <= batch.hdp_size)
        if not over.any():
            break
        degree = degree + over
    worst = int(np.argmax(degree))
    if degree[worst] > batch.hdp_size:
        tokens = int(batch.job_tokens[worst])
        members = int(batch.job_offsets[worst + 1] - batch.job_offsets[worst])
        what = "sequence" if members == 1 else f"unit of {members} sequences"
        remedy = "raise max_tokens_per_rank or hdp_size"
        if not batch.offload and batch.cost.offloadable > 0:
            remedy += ", or allow offload"
        raise ValueError(
            f"{what} of {tokens} tokens needs {degree[worst]} ranks of {limit[worst]}, "
            f"hdp_size={batch.hdp_size}; {remedy}"
        )
    return degree


def least_ratio(batch: Batch, tokens: np.ndarray) -> np.ndarray:
    """float64, like `tokens`: the smallest offload ratio with which so many tokens fit a rank."""
    over = tokens > batch.max_tokens_per_rank
    ratio = np.zeros(len(tokens))
    if over.any():
        kept = batch.max_tokens_per_rank / tokens[over]
        ratio[over] = np.minimum((1.0 - kept) / batch.cost.offloadable, 1.0)
    return ratio
