"""token_rows(): whole sequences from what each rank computed for its parts.

`forward_step` returns rows of a rank's microbatches. Generalized advantages run along a whole
sequence, and columns of the next plan are whole sequences, too, so the parts are put together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hdp.data.feed import StepBatch
from hdp.distributed.mesh import HDPMesh


def token_rows(mesh: HDPMesh, step: StepBatch, outputs: Sequence[Tensor]) -> list[np.ndarray]:
    """One (seqlen,) float64 array per sequence of the step, on all ranks. Collective.

    mesh: of the step's ranks. outputs: (total_tokens,) for each of this rank's microbatches, as
    `forward_step` returns them. Like a column of `Sample`, entry p is about token p: a row predicts
    the token after it. Entry 0
    is 0. Costs one all-reduce of 8 bytes per token of the step.
    """
    seqlens = step.plan.seqlens
    starts = np.concatenate([[0], np.cumsum(seqlens)])
    whole = torch.zeros(int(starts[-1]) + 1, dtype=torch.float64, device=mesh.device)
    for batch, output in zip(step.batches, outputs, strict=True):
        row = 0
        for place, start, stop in batch.layout.spans():
            rows = output[row : row + stop - start].detach()
            row += stop - start
            if place >= len(batch.seqs):  # padding
                continue
            seq = batch.seqs[place]
            stop = min(stop, int(seqlens[seq]) - 1)  # the last row predicts nothing
            if stop > start:
                at = int(starts[seq]) + 1
                whole[at + start : at + stop] = rows[: stop - start].double()
    dist.all_reduce(whole, group=mesh.hdp_group)
    return np.split(whole[:-1].cpu().numpy(), starts[1:-1])
