"""Corrections for a rollout engine whose probabilities differ from the trainer's.

A rollout is sampled by an engine with other kernels, other numerics or older weights. Its tokens
are weighed by how likely the trainer's old policy is to have drawn them: exp(old - rollout).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from .sequences import row_seqs, sequence_sums

if TYPE_CHECKING:
    from hdp.attention.comm import RingComm
    from hdp.data.pack import PackedBatch

Level = Literal["token", "sequence", "geometric"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutCorrection:
    """A detached factor per token: the importance weight rho, bounded.

    level: rho of each token; of the whole "sequence" (the product over its tokens); or the
        "geometric" mean over its tokens.
    high: rho above it counts as `high` (TIS, truncated importance sampling; verl's default is 2).
    low: rho below it counts as 0.
    drop: rho outside [low, high] counts as 0 instead (IcePop; a masked sequence for the others).

    Raises ValueError unless 0 <= low < high.
    """

    level: Level = "token"
    high: float = 2.0
    low: float = 0.0
    drop: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.low < self.high:
            raise ValueError(f"low={self.low} must be in [0, high={self.high})")

    @property
    def needs_ring(self) -> bool:
        """Whether it adds up whole sequences."""
        return self.level != "token"

    def weights(
        self, log_ratio: Tensor, labeled: Tensor, batch: PackedBatch, comm: RingComm | None
    ) -> Tensor:
        """(total_tokens,) factors. log_ratio: old - rollout, 0 where not labeled."""
        if self.needs_ring:
            columns = torch.stack([log_ratio, labeled.to(log_ratio.dtype)], dim=1)
            sums = sequence_sums(columns, batch, comm)
            total, count = sums[:, 0], sums[:, 1]
            of_seq = total if self.level == "sequence" else total / count.clamp(min=1.0)
            log_ratio = spread(of_seq, batch)
        rho = log_ratio.clamp(-20.0, 20.0).exp()  # beyond, every bound has long been passed
        inside = (rho >= self.low) & (rho <= self.high)
        bounded = rho if self.drop else rho.clamp(max=self.high)
        return torch.where(inside if self.drop else rho >= self.low, bounded, 0.0)


def spread(per_seq: Tensor, batch: PackedBatch) -> Tensor:
    """(total_tokens,): each row's entry of a (len(batch.seqs),) tensor; 0 for padding."""
    padded = torch.cat([per_seq, per_seq.new_zeros(1)])
    return padded[row_seqs(batch).clamp(max=len(per_seq))]
