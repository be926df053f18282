"""Colors of sequences, the same in every figure: strong for long ones, pale for short ones.

A sequence is long if no single rank can hold it, so it is on several ranks in every plan, always in
the same color. Sequences of adjacent lengths get hues far apart.
"""

from __future__ import annotations

import colorsys

import numpy as np

from hdp.scheduler.step_plan import StepPlan

# Strong hues for long sequences, in order of length; adjacent ones differ.
STRONG = (
    "#d1495b", "#00798c", "#edae49", "#30638e", "#7b4b94", "#3f9b57", "#e07a3f", "#b5477f",
    "#4c6fbf", "#8a9a2b", "#a1503c", "#2a9d8f",
)  # fmt: skip


def colors_of(plan: StepPlan) -> np.ndarray:
    """(num_seqs, 3) float64 RGB of each sequence."""
    order = np.argsort(-plan.seqlens, kind="stable")
    place = np.empty(plan.num_seqs, dtype=np.int64)
    place[order] = np.arange(plan.num_seqs)
    strong = np.array([rgb(color) for color in STRONG])[place % len(STRONG)]
    # Golden-ratio steps around the color circle: adjacent lengths get hues far apart.
    hue = (place * 0.61803398875) % 1.0
    light = 0.80 + 0.08 * ((place * 0.7548776662) % 1.0)
    soft = [pale(h, v) for h, v in zip(hue.tolist(), light.tolist(), strict=True)]
    return np.where(is_long(plan)[:, None], strong, np.array(soft).reshape(-1, 3))


def is_long(plan: StepPlan) -> np.ndarray:
    """(num_seqs,) bool: sequences to show in a strong color.

    If one rank can hold every sequence: those on several ranks and at least 4x the median.
    """
    long = plan.seqlens > plan.max_tokens_per_rank
    if not long.any():
        long = (plan.degrees > 1) & (plan.seqlens >= 4 * np.median(plan.seqlens))
    return long


def pale(hue: float, lightness: float = 0.83) -> tuple[float, float, float]:
    """RGB of a soft color; hue in [0, 1)."""
    return colorsys.hls_to_rgb(hue, lightness, 0.34)


def rgb(color: str) -> tuple[float, ...]:
    """Hexadecimal color (#rrggbb) as three numbers in [0, 1]."""
    return tuple(int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
