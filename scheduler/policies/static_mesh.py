"""static: DP x CP with packed zigzag, the baseline for HDP.

The mesh is fixed: ranks [g * cp_size, (g + 1) * cp_size) form ring g, and every sequence, however
short, is split over all ranks of one ring (with cp_size 1 it is local).

1. Pack: best fit, longest first. A pack is one microbatch of a whole ring; its fullest rank holds
   at most max_tokens_per_rank tokens.
2. Deal the packs to the rings round-robin, in the order in which they were opened.

A pack of one sequence is gathered where that is faster, as under every policy, so that comparisons
with HDP measure the mesh and not the attention.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hdp.scheduler.plain import whole
from hdp.scheduler.step_plan import StepPlan
from hdp.scheduler.validate import MOST_RANKS

from .batch import Batch, check_size
from .memory import min_degrees
from .packing import best_fit
from .to_step_plan import assemble


def plan_static(batch: Batch, *, cp_size: int | None = None) -> StepPlan:
    """Static plan; cp_size defaults to the smallest divisor of hdp_size that holds every job."""
    batch = replace(batch, offload=False)  # the baseline does not offload
    ranks = batch.hdp_size
    need = int(min_degrees(batch).max())
    if cp_size is None:
        cp_size = next(d for d in range(need, ranks + 1) if ranks % d == 0)
    cp_size = whole("cp_size", cp_size, most=MOST_RANKS)
    if ranks % cp_size:
        raise ValueError(f"hdp_size={ranks} is not divisible by cp_size={cp_size}")
    if cp_size < need:
        raise ValueError(
            f"a sequence or unit of {int(batch.job_tokens.max())} tokens needs {need} ranks of "
            f"{batch.max_tokens_per_rank}, cp_size={cp_size}; raise cp_size to {need} or more"
        )
    check_size(batch, np.full(batch.num_seqs, cp_size))
    # 1. Pack whole jobs. ceil() per sequence is exact for one sequence and safe for several.
    shard = batch.tokens_per_rank(np.full(batch.num_jobs, cp_size))
    packs = best_fit(shard, batch.max_tokens_per_rank)
    # 2. Deal.
    num_rings = ranks // cp_size
    pack = batch.by_seq(packs)
    first_rank = (pack % num_rings) * cp_size
    return assemble(
        batch,
        policy="static",
        degree=np.full(batch.num_seqs, cp_size),
        ring_ranks=(first_rank[:, None] + np.arange(cp_size)).ravel(),
        index=np.repeat(pack // num_rings, cp_size),
        notes={"cp_size": cp_size},
    )
