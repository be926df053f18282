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
from dataclasses import replace
from typing import Any

import numpy as np

from .cost import CostModel
from .jobs import Batch


def _hidden_ratio(batch: Batch, degree: Any) -> np.ndarray:
    """(num_jobs,) float64: offload ratio that each job hides on so many ranks; may exceed 1.

    Work and bytes both divide by the degree, but what a ring adds does not (its steps, its small
    shards): wide rings hide more. Copies go out during forward and come back during backward.
    """
    cost = batch.cost
    kernels = replace(cost, kv_bytes_per_token=0.0)  # waiting for KV hides no copies
    shorter = min(cost.forward_share, 1.0 - cost.forward_share)
    seconds = shorter * kernels.unit_s(batch.job_squares, batch.job_tokens, degree)
    return seconds * degree / (batch.job_tokens * cost.host_s_per_token)


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


def max_shard_tokens(batch: Batch, degree: Any) -> np.ndarray:
    """(num_jobs,) int64: tokens that a rank can hold if its microbatch is this job's alone, on so
    many ranks."""
    if not batch.offload or batch.cost.offloadable == 0.0:
        return np.full(batch.num_jobs, batch.max_tokens_per_rank, dtype=np.int64)
    return _capacity(batch, _hidden_ratio(batch, degree))


def shard_capacity(
    seqlens: np.ndarray, *, hdp_size: int, max_tokens_per_rank: int, cost: CostModel, offload: bool
) -> np.ndarray:
    """(num_seqs,) int64: most tokens of each sequence that one of all ranks can hold for plan()."""
    batch = Batch.check(
        seqlens,
        hdp_size=hdp_size,
        max_tokens_per_rank=max_tokens_per_rank,
        cost=cost,
        offload=offload,
    )
    return max_shard_tokens(batch, hdp_size)


def max_pack_tokens(batch: Batch) -> int:
    """Tokens that a rank can hold of any local jobs together.

    Any token hides at least what one of a very short sequence does. More tokens in a microbatch
    only save fixed_s, so without it nothing goes to the host.
    """
    cost = batch.cost
    if not batch.offload or cost.offloadable == 0.0 or cost.fixed_s == 0.0:
        return batch.max_tokens_per_rank
    shorter = min(cost.forward_share, 1.0 - cost.forward_share)
    token_s = shorter * (cost.linear_s + cost.quadratic_s * cost.small_shard_tokens)
    return int(_capacity(batch, token_s / cost.host_s_per_token))


def least_microbatches(batch: Batch) -> int:
    """No plan has fewer microbatches, over all ranks, if its host copies are hidden.

    By tokens; and by jobs of more than half a microbatch: of those that are local no two share one,
    the others take at least two each.
    """
    tokens, capacity = batch.job_tokens, batch.max_tokens_per_rank
    total = float(tokens.sum())
    least, most = total / capacity, float(capacity)
    if batch.offload and batch.cost.offloadable > 0.0:
        share = batch.cost.offloadable
        most = capacity / (1.0 - share)
        local = _hidden_ratio(batch, 1) * tokens
        # A ring hides more than its job alone, at most so much in each of its microbatches.
        wide = _hidden_ratio(batch, batch.hdp_size) * tokens
        more = float((wide - local).max()) / batch.hdp_size
        kept = total - share * min(float(local.sum()), total)
        least = max(kept / (capacity + share * more), total / most)
    large = int((tokens > most / 2).sum())
    return max(math.ceil(least * (1 - 1e-9)), -(-2 * large // 3))


def min_degrees(batch: Batch) -> np.ndarray:
    """(num_jobs,) int64: the fewest ranks whose memory holds each job.

    Raises ValueError for a job that hdp_size ranks cannot hold.
    """
    # More ranks hold less each, and hide no less of it: bisection.
    low = np.ones(batch.num_jobs, dtype=np.int64)
    high = np.full(batch.num_jobs, batch.hdp_size + 1)
    if not batch.offload and not batch.has_units:
        low = high = np.minimum(-(-batch.job_tokens // batch.max_tokens_per_rank), high)
    while bool((low < high).any()):
        middle = (low + high) // 2
        fits = batch.tokens_per_rank(middle) <= max_shard_tokens(batch, middle)
        low, high = np.where(fits, low, middle + 1), np.where(fits, middle, high)
    degree = high
    worst = int(np.argmax(degree))
    if degree[worst] > batch.hdp_size:
        tokens = int(batch.job_tokens[worst])
        members = int(batch.job_offsets[worst + 1] - batch.job_offsets[worst])
        what = "sequence" if members == 1 else f"unit of {members} sequences"
        remedy = "raise max_tokens_per_rank or hdp_size"
        if not batch.offload and batch.cost.offloadable > 0:
            remedy += ", or allow offload"
        limit = int(max_shard_tokens(batch, batch.hdp_size)[worst])
        raise ValueError(
            f"{what} of {tokens} tokens needs {max(-(-tokens // limit), batch.hdp_size + 1)} ranks "
            f"of {limit}, "
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
