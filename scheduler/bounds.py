"""Lower bounds: no plan can finish a step earlier. The gap to them comes with every plan.

* work      every job costs at least min over d of d * piece_s(d) rank-seconds, every microbatch
            fixed_s, and there are at least max(1, tokens / capacity) microbatches per rank on
            average: their sum over hdp_size ranks
* longest   every job takes at least min over d of piece_s(d), plus fixed_s
"""

from __future__ import annotations

import numpy as np

from .jobs import Batch
from .memory import min_degrees


def lower_bound_s(batch: Batch) -> float:
    """Seconds below which no valid plan can finish (module docstring)."""
    cost, ranks = batch.cost, batch.hdp_size
    low = min_degrees(batch)
    seconds = batch.seconds(low)
    microbatches = max(1.0, float(batch.job_tokens.sum()) / (batch.max_tokens_per_rank * ranks))
    work_s = float((seconds * low).sum()) / ranks + cost.fixed_s * microbatches
    best_s = np.minimum(seconds, batch.job_sum(cost.piece_s(batch.seqlens, ranks)))
    return max(work_s, float(best_s.max()) + cost.fixed_s)
