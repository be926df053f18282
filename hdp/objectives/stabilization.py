"""The estimator's stabilization masks: which tokens keep their gradient, and how much of it.

A mask sees each token's detached importance ratio r, advantage A and log-probability. `keep` is the
factor 1_stable of the estimator; `value` is the paper's objective at that token, which is what the
reported loss adds up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Stabilization(Protocol):
    """A stabilization mask."""

    def keep(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        """The factor of each token's gradient."""
        ...

    def value(self, ratio: Tensor, advantages: Tensor, logprobs: Tensor) -> Tensor:
        """The objective at each token, to be maximized."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class NoMask:
    """Every token keeps its gradient."""

    def keep(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        """The factor of each token's gradient."""
        return torch.ones_like(ratio)

    def value(self, ratio: Tensor, advantages: Tensor, logprobs: Tensor) -> Tensor:
        """The objective at each token, to be maximized."""
        return ratio * advantages


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """PPO's clip (arXiv 1707.06347 Eq. 7): min(r A, clip(r, 1 - low, 1 + high) A).

    low, high: 0.2 in PPO and GRPO; DAPO's clip-higher is 0.2 and 0.28 (arXiv 2503.14476 Eq. 10).
    dual: for A < 0, the objective is at least dual * A (dual clip, arXiv 1912.09729 Eq. 5; verl's
    default is 3); None: no such bound.

    Raises ValueError unless 0 <= low <= 1, high >= 0 and dual > 1.
    """

    low: float = 0.2
    high: float = 0.2
    dual: float | None = None

    def __post_init__(self) -> None:
        if not (0.0 <= self.low <= 1.0 and self.high >= 0.0):
            raise ValueError(f"clip range low={self.low} must be in [0, 1], high={self.high} >= 0")
        if self.dual is not None and not self.dual > 1.0:
            raise ValueError(f"dual={self.dual} must be above 1, or None for no dual clip")

    def keep(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        """The factor of each token's gradient."""
        gone = (advantages > 0) & (ratio > 1 + self.high)
        gone |= (advantages < 0) & (ratio < 1 - self.low)
        if self.dual is not None:
            gone |= (advantages < 0) & (ratio > self.dual)
        return (~gone).to(ratio.dtype)

    def value(self, ratio: Tensor, advantages: Tensor, logprobs: Tensor) -> Tensor:
        """The objective at each token, to be maximized."""
        clipped = ratio.clamp(1 - self.low, 1 + self.high)
        value = torch.minimum(ratio * advantages, clipped * advantages)
        if self.dual is None:
            return value
        return torch.where(advantages < 0, torch.maximum(value, self.dual * advantages), value)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClippedWeight:
    """CISPO (arXiv 2506.13585 Eq. 4): clip(r, 1 - low, 1 + high) A weighs every token.

    The weight is clipped and not the objective, so no token loses its gradient. low: 1 means no
    lower bound, as in the paper.

    Raises ValueError unless 0 <= low <= 1 and high >= 0.
    """

    low: float = 1.0
    high: float = 0.28

    def __post_init__(self) -> None:
        if not (0.0 <= self.low <= 1.0 and self.high >= 0.0):
            raise ValueError(f"clip range low={self.low} must be in [0, 1], high={self.high} >= 0")

    def keep(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        """The factor of each token's gradient."""
        return ratio.clamp(1 - self.low, 1 + self.high) / ratio

    def value(self, ratio: Tensor, advantages: Tensor, logprobs: Tensor) -> Tensor:
        """The objective at each token, to be maximized."""
        return ratio.clamp(1 - self.low, 1 + self.high) * advantages * logprobs
