"""From where pieces were put to the columns of a StepPlan.

Policies decide two things, each in flat arrays: the ring of every sequence, and for every
(sequence, rank of its ring) the index of the microbatch in that rank's list. The rest follows.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .plan import StepPlan


def assemble(
    seqlens: np.ndarray,
    *,
    hdp_size: int,
    ring_offsets: np.ndarray,
    ring_ranks: np.ndarray,
    index: np.ndarray,
    ratio: np.ndarray | None = None,
    min_microbatches: int = 1,
    **fields: Any,
) -> StepPlan:
    """StepPlan from rings and microbatch indices.

    seqlens (num_seqs,); ring_offsets (num_seqs + 1,) and ring_ranks (num_entries,) as in StepPlan;
    index (num_entries,): for each entry of ring_ranks the local index of its microbatch there. An
    index that nothing uses below a used one is an empty microbatch. ratio (num_entries,): offload
    ratio of the microbatch; its pieces must agree. Ranks get at least `min_microbatches`.
    """
    degrees = np.diff(ring_offsets)
    seq = np.repeat(np.arange(len(seqlens)), degrees)
    local = np.repeat(degrees == 1, degrees)
    counts = np.full(hdp_size, max(min_microbatches, 1), dtype=np.int64)
    np.maximum.at(counts, ring_ranks, index + 1)
    microbatch_offsets = np.concatenate([[0], np.cumsum(counts)])
    microbatch = microbatch_offsets[ring_ranks] + index
    order = np.argsort(microbatch * 2 + local, kind="stable")
    filled = np.bincount(microbatch, minlength=microbatch_offsets[-1])
    ratios = np.zeros(microbatch_offsets[-1])
    if ratio is not None:
        ratios[microbatch] = ratio
    return StepPlan(
        hdp_size=hdp_size,
        seqlens=seqlens,
        ring_offsets=ring_offsets,
        ring_ranks=ring_ranks,
        microbatch_offsets=microbatch_offsets,
        piece_offsets=np.concatenate([[0], np.cumsum(filled)]),
        piece_seqs=seq[order],
        offload_ratio=ratios,
        **fields,
    )
