"""hdp: any degree for each sequence, chosen by work and by memory."""

from __future__ import annotations

from heapq import heapify, heapreplace

import numpy as np

from .assemble import assemble
from .jobs import Batch
from .memory import least_ratio, min_degrees
from .packing import best_fit
from .plan import StepPlan


def plan_hdp(batch: Batch) -> StepPlan:
    """List scheduling of moldable tasks: rings first, long ones first, then local pieces."""
    ranks, capacity = batch.hdp_size, batch.max_tokens_per_rank
    low = min_degrees(batch)
    degree = _degrees(batch, low)
    seconds = batch.job_sum(batch.cost.piece_s(batch.seqlens, batch.by_seq(degree)))
    load, depth = np.zeros(ranks), np.zeros(ranks, dtype=np.int64)
    rings: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * batch.num_jobs
    index: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * batch.num_jobs
    wide = np.flatnonzero(degree > 1)
    for job in wide[np.lexsort((-seconds[wide], -degree[wide]))].tolist():
        chosen = np.sort(np.argsort(load, kind="stable")[: degree[job]])
        load[chosen] = load[chosen].max() + seconds[job]
        if batch.pp_size > 1:
            depth[chosen] = depth[chosen].max()
        rings[job], index[job] = chosen, depth[chosen].copy()
        depth[chosen] += 1
    heap = [(float(x), r) for r, x in enumerate(load)]
    heapify(heap)
    local: list[list[int]] = [[] for _ in range(ranks)]
    single = np.flatnonzero(degree == 1)
    for job in single[np.argsort(-seconds[single], kind="stable")].tolist():
        at_s, rank = heap[0]
        heapreplace(heap, (at_s + float(seconds[job]), rank))
        local[rank].append(job)
    tokens = np.minimum(batch.job_tokens, capacity)
    for rank, jobs in enumerate(local):
        bins = best_fit(tokens[jobs], capacity)
        for job, b in zip(jobs, bins, strict=True):
            rings[job], index[job] = np.array([rank]), depth[rank : rank + 1] + b
    by_seq = batch.by_seq(np.arange(batch.num_jobs)).tolist()
    return assemble(
        batch,
        policy="hdp",
        degree=batch.by_seq(degree),
        ring_ranks=np.concatenate([rings[j] for j in by_seq]),
        index=np.concatenate([index[j] for j in by_seq]),
        ratio=batch.by_seq(least_ratio(batch, degree)),
    )


def _degrees(batch: Batch, low: np.ndarray) -> np.ndarray:
    """Fewest ranks by memory, widened until no job is longer than the mean load."""
    seqlens, cost = batch.seqlens, batch.cost
    seconds = batch.job_sum(cost.piece_s(seqlens, batch.by_seq(low)))
    target_s = float((seconds * low).sum()) / batch.hdp_size
    wanted = np.ceil(seconds * low / target_s).astype(np.int64)
    return np.clip(np.maximum(wanted, low), 1, batch.hdp_size)
