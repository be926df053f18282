"""Build a StepPlan from what a policy decided.

A policy decides two things, each in flat arrays: the ring of every sequence, and for every
(sequence, rank of its ring) the index of the microbatch in that rank's list. Everything else is
derived, including which rings are gathered: under any policy, those for which it is faster.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hdp.scheduler.costs.cost_model import GATHER_LEAST_RANKS
from hdp.scheduler.costs.gathering import gathers, may_gather
from hdp.scheduler.step_plan import StepPlan

from .batch import Batch, check_size
from .memory import least_ratio


def assemble(
    batch: Batch,
    *,
    policy: str,
    degree: np.ndarray,
    ring_ranks: np.ndarray,
    index: np.ndarray,
    notes: dict[str, Any] | None = None,
) -> StepPlan:
    """Build a StepPlan from rings and microbatch indices.

    degree (num_seqs,) and ring_ranks (sum of degree,) give the ring of each sequence; index
    (sum of degree,) is the local index, on each rank of ring_ranks, of the microbatch that holds
    the sequence. Unused indices are closed up, except with pp_size > 1 (a shared microbatch needs
    one index on all ranks) or equal counts, where they become empty microbatches; `_counts` adds
    those that the batch demands at the end. Such a plan promises to be aligned. Microbatches over
    the capacity get the smallest offload ratio at which they fit; notes["ranks_saved"] counts the
    ranks that offload saves, summed over sequences. A sequence alone on its ring, inside a node, is
    gathered where that is faster (costs/gathering.py).
    """
    check_size(batch, degree)
    seq = np.repeat(np.arange(batch.num_seqs), degree)
    if not batch.same_index:
        index = _closed_up(ring_ranks, index, batch.hdp_size)
    counts = _counts(batch, degree, ring_ranks, index)
    microbatch_offsets = np.concatenate([[0], np.cumsum(counts)])
    microbatch = microbatch_offsets[ring_ranks] + index
    local = np.repeat(degree == 1, degree)
    order = np.argsort(microbatch * 2 + local, kind="stable")
    num_pieces = np.bincount(microbatch, minlength=microbatch_offsets[-1])
    ratio = np.zeros(microbatch_offsets[-1])
    if batch.offload:
        shards = -(-batch.seqlens // degree)  # of the fullest rank: all ranks of a ring agree
        tokens = np.bincount(microbatch, weights=np.repeat(shards, degree), minlength=len(ratio))
        ratio = least_ratio(batch, tokens)
        alone = -(-batch.seqlens // batch.max_tokens_per_rank)
        notes = {**(notes or {}), "ranks_saved": int(np.maximum(alone - degree, 0).sum())}
    return StepPlan(
        policy=policy,
        hdp_size=batch.hdp_size,
        max_tokens_per_rank=batch.max_tokens_per_rank,
        pp_size=batch.pp_size,
        aligned=batch.equal_counts or (batch.pp_size > 1 and len(set(counts.tolist())) == 1),
        ranks_per_node=batch.ranks_per_node,
        seqlens=batch.seqlens,
        ring_offsets=np.concatenate([[0], np.cumsum(degree)]),
        ring_ranks=ring_ranks,
        microbatch_offsets=microbatch_offsets,
        piece_offsets=np.concatenate([[0], np.cumsum(num_pieces)]),
        piece_seqs=seq[order],
        gathered=_gathered(batch, degree, ring_ranks, microbatch),
        offload_ratio=ratio,
        offloadable=batch.cost.offloadable if batch.offload else 0.0,
        notes=notes or {},
    )


def _counts(
    batch: Batch, degree: np.ndarray, ring_ranks: np.ndarray, index: np.ndarray
) -> np.ndarray:
    """(hdp_size,) int64: microbatches of each rank, empty ones at the end included.

    A rank whose last microbatch is a ring that goes on to another microbatch elsewhere ends with an
    empty one where `ends_together` is demanded. Other rings still end where they ended, since a
    microbatch has one ring: one pass is enough.
    """
    counts = np.ones(batch.hdp_size, dtype=np.int64)
    np.maximum.at(counts, ring_ranks, index + 1)
    if batch.equal_counts:
        counts[:] = counts.max()
    counts = -(-counts // batch.multiple) * batch.multiple
    if not batch.ends_together:
        return counts
    ends = index == counts[ring_ranks] - 1
    starts = np.cumsum(degree) - degree
    num_ends = np.add.reduceat(ends.astype(np.int64), starts)
    split = np.repeat((num_ends > 0) & (num_ends < degree), degree)
    counts[ring_ranks[split & ends]] += batch.multiple
    return counts


def _gathered(
    batch: Batch, degree: np.ndarray, ring_ranks: np.ndarray, microbatch: np.ndarray
) -> np.ndarray:
    """(num_seqs,) bool: whether the ring of each sequence is gathered."""
    gathered = np.zeros(batch.num_seqs, dtype=bool)
    some = np.flatnonzero(degree >= GATHER_LEAST_RANKS)
    some = some[may_gather(batch.cost, batch.seqlens[some])]
    if not len(some):
        return gathered
    starts = np.cumsum(degree) - degree
    node = batch.ranks_per_node or batch.hdp_size
    nodes = ring_ranks // node
    first, last = (f.reduceat(nodes, starts)[some] for f in (np.minimum, np.maximum))
    on_ring = np.bincount(microbatch[np.repeat(degree > 1, degree)])
    alone = on_ring[microbatch[starts[some]]] == 1  # what holds on one rank holds on all
    faster = gathers(batch.cost, batch.seqlens[some], degree[some], first != last)
    gathered[some] = alone & faster
    return gathered


def _closed_up(ranks: np.ndarray, index: np.ndarray, hdp_size: int) -> np.ndarray:
    """Renumber the microbatches of every rank as 0, 1, .. without gaps."""
    width = int(index.max()) + 1
    used = np.zeros(hdp_size * width, dtype=bool)
    used[ranks * width + index] = True
    dense = np.cumsum(used.reshape(hdp_size, width), axis=1) - 1
    return dense[ranks, index]
