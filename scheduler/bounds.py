"""Lower bounds: no plan can finish a step earlier. The gap to them comes with every plan.

* work      every job costs at least min over d of d * piece_s(d) rank-seconds, every microbatch
            fixed_s, and there are at least max(1, tokens / capacity) microbatches per rank on
            average: their sum over hdp_size ranks
* longest   every job takes at least min over d of piece_s(d), plus fixed_s
"""

from __future__ import annotations

import numpy as np

from .jobs import Batch


def min_degrees(batch: Batch) -> np.ndarray:
    """(num_jobs,) int64: the fewest ranks whose memory holds each job.

    Raises ValueError for a job that hdp_size ranks cannot hold.
    """
    capacity = batch.max_tokens_per_rank
    degree = -(-batch.job_tokens // capacity)
    while batch.has_units:  # shards of a unit are rounded up one by one
        over = batch.tokens_per_rank(degree) > capacity
        over &= degree <= batch.hdp_size
        if not over.any():
            break
        degree = degree + over
    worst = int(np.argmax(degree))
    if degree[worst] > batch.hdp_size:
        tokens = int(batch.job_tokens[worst])
        members = int(batch.job_offsets[worst + 1] - batch.job_offsets[worst])
        what = "sequence" if members == 1 else f"unit of {members} sequences"
        raise ValueError(
            f"{what} of {tokens} tokens needs {degree[worst]} ranks of {capacity}, "
            f"hdp_size={batch.hdp_size}; raise max_tokens_per_rank or hdp_size"
        )
    return degree


def lower_bound_s(batch: Batch) -> float:
    """Seconds below which no valid plan can finish (module docstring)."""
    cost, ranks = batch.cost, batch.hdp_size
    low = min_degrees(batch)
    seconds = batch.job_sum(cost.piece_s(batch.seqlens, batch.by_seq(low)))
    microbatches = max(1.0, float(batch.job_tokens.sum()) / (batch.max_tokens_per_rank * ranks))
    work_s = float((seconds * low).sum()) / ranks + cost.fixed_s * microbatches
    best_s = np.minimum(seconds, batch.job_sum(cost.piece_s(batch.seqlens, ranks)))
    return max(work_s, float(best_s.max()) + cost.fixed_s) + cost.reduce_s * 0.0
