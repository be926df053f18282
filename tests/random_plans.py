"""Random valid plans: any degree, ring order and mode, unequal and empty microbatches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hdp.scheduler import StepPlan


def random_plan(seqlens: Sequence[int], hdp_size: int, seed: int) -> StepPlan:
    """A valid plan drawn at random, with just enough capacity for its fullest microbatch.

    Rings are appended to all their ranks in one global order, which makes the order acyclic.
    """
    rng = np.random.default_rng(seed)
    microbatches: list[list[list[int]]] = [[] for _ in range(hdp_size)]
    rings: list[list[int]] = [[] for _ in seqlens]
    for seq in rng.permutation(len(seqlens)).tolist():
        degree = int(rng.integers(1, hdp_size + 1)) if rng.random() < 0.6 else 1
        rings[seq] = rng.permutation(hdp_size)[:degree].tolist()
        if degree > 1:
            for rank in rings[seq]:
                microbatches[rank].append([seq])
        else:
            mine = microbatches[rings[seq][0]]
            if mine and rng.random() < 0.7:
                mine[int(rng.integers(len(mine)))].append(seq)
            else:
                mine.append([seq])
    for mine in microbatches:
        if not mine or rng.random() < 0.2:
            mine.insert(int(rng.integers(len(mine) + 1)), [])
    gathered = [len(ring) > 1 and rng.random() < 0.5 for ring in rings]
    plan = StepPlan.from_lists(seqlens, rings, microbatches, max_tokens_per_rank=1 << 40)
    return StepPlan.from_lists(
        seqlens,
        rings,
        microbatches,
        gathered=gathered,
        max_tokens_per_rank=max(1, int(plan.microbatch_tokens.max(initial=0))),
        policy="random",
    ).validate()
