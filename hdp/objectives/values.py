"""The critic's loss: values per token against returns, with PPO's clip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .objective import Share

if TYPE_CHECKING:
    from hdp.data.feed import StepBatch
    from hdp.data.pack import PackedBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueLoss:
    """0.5 max((V - R)^2, (V_old + clip(V - V_old, -clip, clip) - R)^2), the mean over label tokens.

    The model returns a value per token, (total_tokens,): at row i, of the state before the token
    that row predicts. Columns returns and, with a clip, old_values. clip: None: no clip; verl's
    default is 0.5. The column loss_weights replaces the mean. Raises ValueError unless clip > 0.
    """

    clip: float | None = None

    def __post_init__(self) -> None:
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip={self.clip} must be above 0, or None for no clip")

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that samples must have."""
        return ("returns",) if self.clip is None else ("returns", "old_values")

    def __call__(self, output: Tensor, batch: PackedBatch, step: StepBatch, /) -> Share:
        """The microbatch's share of the loss and of the metrics; see `Objective`."""
        labeled = batch.labels >= 0
        returns = torch.where(labeled, batch.columns["returns"].to(output.dtype), 0.0)
        scale = torch.full_like(returns, 1.0 / step.num_loss_tokens)
        if "loss_weights" in batch.columns:
            scale = batch.columns["loss_weights"].to(output.dtype)
        scale = torch.where(labeled, scale, 0.0)
        errors = (output - returns).square()
        clipped = torch.zeros_like(labeled)
        if self.clip is not None:
            old = torch.where(labeled, batch.columns["old_values"].to(output.dtype), 0.0)
            near = old + (output - old).clamp(-self.clip, self.clip)
            bounded = (near - returns).square()
            clipped = (bounded > errors) & labeled
            errors = torch.maximum(errors, bounded)
        loss = 0.5 * (scale * errors).sum()
        metrics = {
            "tokens": labeled.sum(),
            "clipped": clipped.sum(),
            "squared_error": (errors.detach() * labeled).sum(),
        }
        return loss, metrics
