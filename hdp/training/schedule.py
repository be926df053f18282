"""The learning rate as a pure function of the step: nothing to save, so nothing to lose on resume.

After a linear warm-up of `warmup_steps`, with p the share of the decay that is done:

    cosine      min + (peak - min) (1 + cos(pi p)) / 2      p from the warm-up to the last step
    linear      peak - (peak - min) p                       likewise
    constant    peak
    wsd         peak, then over the last `decay_share` of the steps
                min + (peak - min) (1 - sqrt(p))

WSD (warmup-stable-decay, MiniCPM, arXiv 2404.06395) needs no length in advance: until its decay
begins, a run may be continued with more --steps as if they had been planned from the start. Decay
by 1 - sqrt is the form that Haegele et al. (arXiv 2405.18392) found best.

    set_learning_rate(optimizer, learning_rate(config, step))
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from hdp.config import TrainConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Warm-up, then one of the shapes above; flat from `total_steps` on.

    Steps count from 0. Step 0 already has a nonzero rate, peak_lr / warmup_steps; step
    `warmup_steps` has peak_lr (test_schedule_corners).
    """

    peak_lr: float
    warmup_steps: int
    total_steps: int
    min_lr: float = 0.0
    kind: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    decay_share: float = 0.2  # of total_steps: how long wsd decays

    def __post_init__(self) -> None:
        if not (self.peak_lr > 0 and math.isfinite(self.peak_lr)):
            raise ValueError(f"peak_lr={self.peak_lr} must be positive and finite")
        if not 0 <= self.min_lr <= self.peak_lr:
            raise ValueError(f"min_lr={self.min_lr} must be in 0..peak_lr={self.peak_lr}")
        if self.total_steps < 1 or not 0 <= self.warmup_steps <= self.total_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps}, total_steps={self.total_steps}: need at least "
                "one step, and a warm-up no longer than the run"
            )
        if not 0 <= self.decay_share <= 1:
            raise ValueError(f"decay_share={self.decay_share} must be in [0, 1]")
        if self.kind not in ("cosine", "linear", "constant", "wsd"):
            raise ValueError(f"kind={self.kind!r} is not cosine, linear, constant or wsd")

    @property
    def decay_start(self) -> int:
        """The step from which on the rate falls; for wsd never before the warm-up ends."""
        if self.kind == "constant":
            return self.total_steps
        if self.kind == "wsd":
            decay_steps = round(self.decay_share * self.total_steps)
            return max(self.total_steps - decay_steps, self.warmup_steps)
        return self.warmup_steps

    def __call__(self, step: int) -> float:
        """Learning rate at `step`."""
        if step < 0:
            raise ValueError(f"step={step} is negative; steps count from 0")
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        if step < self.decay_start or self.kind == "constant":
            return self.peak_lr
        if step >= self.total_steps:
            return self.min_lr
        progress = (step - self.decay_start) / (self.total_steps - self.decay_start)
        return self.min_lr + (self.peak_lr - self.min_lr) * self._left(progress)

    def _left(self, progress: float) -> float:
        """How much of the way down is left: 1 at the start of the decay, 0 at its end."""
        if self.kind == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        if self.kind == "linear":
            return 1.0 - progress
        return 1.0 - math.sqrt(progress)


def schedule_of(config: TrainConfig) -> Schedule:
    """The run's schedule. A run shorter than its warm-up ends during it."""
    return Schedule(
        peak_lr=config.lr,
        warmup_steps=config.warmup_steps,
        total_steps=max(config.steps, config.warmup_steps),
        min_lr=config.lr * config.min_lr_ratio,
        kind=config.schedule,
        decay_share=config.decay_share,
    )


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate at the run's `step`, counted from 1."""
    return schedule_of(config)(step - 1)
