"""Memory: the fewest ranks that hold a job, and how much must be offloaded (ByteScale Eq. 3).

A rank holds max_tokens_per_rank tokens. With offload, a share r of a microbatch's tokens sends its
activations to the host, except those of two layers; of n tokens, n * (1 - r * o) stay, with
o = `CostModel.offloadable`. This gives the paper's D(s), with two corrections: temporary buffers
never move, which lowers o, and ranks that share a host link split its bandwidth, so forward hides
less (`CostModel.hidden_ratio`).

1. r_max = the ratio whose copies forward's compute hides, at most 1.
2. D = the smallest degree whose fullest shard fits at r_max, with what leaves fitting in host
   memory.
3. r = the smallest ratio that fits at the chosen degree, for the least traffic. It is 0 where
   offload saves no rank, which is the paper's lower limit on r.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from hdp.scheduler.costs.cost_model import CostModel
from hdp.scheduler.validate import MOST_TOKENS

from .batch import Batch


def _hidden_ratio(batch: Batch) -> np.ndarray:
    """(num_jobs,) float64: offload ratio whose copies each job's compute hides; may exceed 1.

    Copies go out during forward and come back during backward. As in Eq. 3, compute is that of one
    rank: it divides by the degree, and so do the bytes. What a ring adds (ring steps, small shards)
    hides nothing here.
    """
    cost = batch.cost
    one_way_s = min(cost.forward_share, 1.0 - cost.forward_share)
    seconds = one_way_s * cost.unit_s(batch.job_squares, batch.job_tokens, 1)
    with np.errstate(divide="ignore", over="ignore"):  # a copy may take no time
        return seconds / (batch.job_tokens * cost.host_s_per_token)


def _capacity(batch: Batch, ratio: Any) -> np.ndarray:
    """int64, shape of `ratio`: tokens that a rank can hold at offload ratios up to `ratio`.

    Host memory adds at most host_memory_bytes / bytes per token to max_tokens_per_rank.
    """
    device, cost = batch.max_tokens_per_rank, batch.cost
    bytes_per_token = cost.activation_bytes_per_token + cost.temporary_bytes_per_token
    limit = device / (1.0 - np.minimum(ratio, 1.0) * cost.offloadable)
    limit = np.minimum(limit, device + cost.host_memory_bytes / bytes_per_token)
    return np.floor(np.minimum(limit, MOST_TOKENS)).astype(np.int64)


def max_shard_tokens(batch: Batch) -> np.ndarray:
    """(num_jobs,) int64: tokens that a rank can hold if each job has a microbatch to itself."""
    if not batch.offload or batch.cost.offloadable == 0.0:
        return np.full(batch.num_jobs, batch.max_tokens_per_rank, dtype=np.int64)
    return _capacity(batch, _hidden_ratio(batch))


def shard_capacity(seqlens: np.ndarray, *, max_tokens_per_rank: int, cost: CostModel) -> np.ndarray:
    """(num_seqs,) int64: most tokens of each sequence on one rank under plan(offload=True)."""
    batch = Batch.check(
        seqlens,
        hdp_size=1,
        max_tokens_per_rank=max_tokens_per_rank,
        cost=cost,
        offload=True,
    )
    return max_shard_tokens(batch)


def max_pack_tokens(batch: Batch) -> int:
    """Tokens that a microbatch of local jobs can hold, whatever the jobs.

    Every token hides at least as much as one of a very short sequence. More tokens per microbatch
    only save fixed_s, so with fixed_s = 0 local jobs are not offloaded.
    """
    cost = batch.cost
    if not batch.offload or cost.offloadable == 0.0 or cost.fixed_s == 0.0:
        return batch.max_tokens_per_rank
    one_way_s = min(cost.forward_share, 1.0 - cost.forward_share)
    token_s = one_way_s * (cost.linear_s + cost.quadratic_s * cost.small_shard_tokens)
    ratio = token_s / cost.host_s_per_token if cost.host_s_per_token > 0 else 1.0
    return int(_capacity(batch, ratio))


def least_microbatches(batch: Batch) -> int:
    """Fewest microbatches, over all ranks, of any plan whose host copies are hidden.

    Bounded by tokens, and by jobs of more than half a microbatch: two local ones cannot share a
    microbatch, and any other takes at least two.
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
    if batch.has_units:
        degree = _rounded_up(batch, degree, limit)
    worst = int(np.argmax(degree))
    if degree[worst] > batch.hdp_size:
        tokens = int(batch.job_tokens[worst])
        members = int(batch.job_offsets[worst + 1] - batch.job_offsets[worst])
        what = "sequence" if members == 1 else f"unit of {members} sequences"
        remedy = "raise max_tokens_per_rank or hdp_size"
        if members > limit[worst]:  # each sequence has a token on some rank, however many there are
            raise ValueError(
                f"{what} of {tokens} tokens fits on no number of ranks: the fullest holds at least "
                f"a token of each, more than its {limit[worst]}; raise max_tokens_per_rank or "
                "split the unit"
            )
        if not batch.offload and batch.cost.offloadable > 0:
            remedy += ", or allow offload"
        raise ValueError(
            f"{what} of {tokens} tokens needs {degree[worst]} ranks of {limit[worst]}, "
            f"hdp_size={batch.hdp_size}; {remedy}"
        )
    return degree


def _rounded_up(batch: Batch, degree: np.ndarray, limit: np.ndarray) -> np.ndarray:
    """(num_jobs,) int64: the fewest ranks, at least `degree`, on which each unit fits.

    The shards of its sequences are rounded up one by one. More ranks never make the fullest one
    fuller, so bisection finds it; hdp_size + 1 where all ranks are too few.
    """
    low = degree
    high = np.maximum(degree, batch.hdp_size + 1)
    while bool((open_ := low < high).any()):
        middle = (low + high) // 2
        fits = batch.tokens_per_rank(middle) <= limit
        high = np.where(open_ & fits, middle, high)
        low = np.where(open_ & ~fits, middle + 1, low)
    return low


def least_ratio(batch: Batch, tokens: np.ndarray) -> np.ndarray:
    """float64, shape of `tokens`: the smallest offload ratio at which the tokens fit on a rank."""
    over = tokens > batch.max_tokens_per_rank
    ratio = np.zeros(len(tokens))
    if over.any():
        kept = batch.max_tokens_per_rank / tokens[over]
        ratio[over] = np.minimum((1.0 - kept) / batch.cost.offloadable, 1.0)
    return ratio
