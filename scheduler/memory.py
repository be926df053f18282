"""What fits: the fewest ranks that hold a job, and what must go to the host (ByteScale Eq. 3).

A rank holds max_tokens_per_rank tokens. With offload a share r of a microbatch's tokens sends its
activations to the host, except those of two layers; what stays of n tokens is n * (1 - r * o),
o = `CostModel.offloadable`. The paper's D(s) follows, with two corrections: temporary buffers never
move and make o smaller, and ranks that share a host link divide its bandwidth, so that forward
hides less (`CostModel.hidden_ratio`).

1. r_max = what forward's compute hides, at most 1.
2. D = the smallest degree whose fullest shard fits at r_max.
3. r = the smallest ratio that still fits on the degree that is used: the least traffic. It is 0
   where offload saves no rank, which is the paper's lower limit on r.
"""

from __future__ import annotations

import numpy as np

from .jobs import Batch


def max_shard_tokens(batch: Batch) -> np.ndarray:
    """(num_jobs,) int64: tokens that a rank can hold if its microbatch is this job's alone."""
    capacity = batch.max_tokens_per_rank
    share = batch.cost.offloadable
    if not batch.offload or share == 0.0:
        return np.full(batch.num_jobs, capacity, dtype=np.int64)
    forward_s = batch.cost.forward_share * batch.job_sum(batch.cost.compute_s(batch.seqlens, 1))
    copies_s = batch.job_tokens * batch.cost.host_s_per_token
    ratio = np.minimum(forward_s / copies_s, 1.0)
    return np.floor(capacity / (1.0 - ratio * share)).astype(np.int64)


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


def least_ratio(batch: Batch, degree: np.ndarray) -> np.ndarray:
    """(num_jobs,) float64: smallest offload ratio with which each job fits on `degree` ranks."""
    shard = batch.tokens_per_rank(degree)
    over = shard > batch.max_tokens_per_rank
    ratio = np.zeros(batch.num_jobs)
    if over.any():
        kept = batch.max_tokens_per_rank / shard[over]
        ratio[over] = np.minimum((1.0 - kept) / batch.cost.offloadable, 1.0)
    return ratio
