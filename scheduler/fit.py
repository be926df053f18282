"""Fit a CostModel to measured microbatches.

A microbatch's time is linear in five sums over its pieces (a piece of L tokens on d ranks), and so
are the cost model's coefficients, as long as no transfer is exposed:

    seconds = quadratic_s * sum L^2 / d  +  small * sum L  +  linear_s * sum L / d
              + ring_step_s * (d - 1)  +  fixed_s

with small = quadratic_s * small_shard_tokens. Transfers that kernels do not hide fall into the same
sums: (d - 1) steps of L / d tokens are L - L / d.

The fit minimises *relative* errors, since a short microbatch matters as much as a long one, and
keeps every coefficient at 0 or above: of all subsets of coefficients it takes the best one whose
unconstrained solution is non-negative, which is the exact optimum of the constrained problem
(`test_fit_is_the_optimum`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from .cost import CostModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One kind of microbatch, measured: `pieces` (seqlen, degree) each, on the same ring if any."""

    pieces: tuple[tuple[int, int], ...]
    seconds: float  # forward + backward, waiting for the ring included

    @property
    def features(self) -> list[float]:
        """The five sums of the module docstring."""
        degree = max((d for _, d in self.pieces), default=1)
        return [
            sum(n * n / d for n, d in self.pieces),
            float(sum(n for n, _ in self.pieces)),
            sum(n / d for n, d in self.pieces),
            float(degree - 1),
            1.0,
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A fitted cost model and how well it explains what it was fitted to."""

    cost: CostModel
    relative_errors: np.ndarray  # (num_observations,) float64: predicted / measured - 1


def fit_cost(observations: Sequence[Observation], base: CostModel, *, name: str = "") -> Fit:
    """Coefficients of time from measurements; everything else as in `base`.

    Without observations on more than one rank, the ring's coefficients stay those of `base`.
    Transfers count as hidden or as part of the fitted terms: the bandwidths become infinite where
    ring microbatches were measured. Raises ValueError for fewer observations than coefficients, or
    times that are not positive.
    """
    seconds = np.array([o.seconds for o in observations], dtype=np.float64)
    if not (np.isfinite(seconds).all() and (seconds > 0).all()):
        raise ValueError(f"measured seconds must be positive and finite, got {seconds.tolist()}")
    features = np.array([o.features for o in observations], dtype=np.float64)
    on_rings = bool((features[:, 3] > 0).any()) if len(features) else False
    # On one rank L and L / d are the same: only their sum can be told.
    columns = [0, 1, 2, 3, 4] if on_rings else [0, 2, 4]
    if len(observations) < len(columns):
        raise ValueError(
            f"{len(observations)} observations cannot determine {len(columns)} coefficients: "
            "measure more lengths"
        )
    found = np.zeros(5)
    found[columns] = _non_negative(features[:, columns] / seconds[:, None], np.ones(len(seconds)))
    quadratic_s, small, linear_s, ring_step_s, fixed_s = found.tolist()
    changes: dict[str, float | str] = {
        "quadratic_s": quadratic_s,
        "linear_s": linear_s,
        "fixed_s": fixed_s,
        "name": name or base.name,
    }
    if on_rings:
        changes |= {
            "small_shard_tokens": small / quadratic_s if quadratic_s > 0 else 0.0,
            "ring_step_s": ring_step_s,
            "intra_node_bytes_per_s": float("inf"),
            "inter_node_bytes_per_s": float("inf"),
        }
    return Fit(
        cost=replace(base, **changes),  # type: ignore[arg-type]
        relative_errors=features @ found / seconds - 1.0,
    )


def _non_negative(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """argmin |matrix @ x - target| over x >= 0, exactly, for a handful of columns."""
    num_columns = matrix.shape[1]
    scale = np.maximum(np.abs(matrix).max(axis=0), 1e-300)
    best, best_error = np.zeros(num_columns), float(np.linalg.norm(target))
    for size in range(1, num_columns + 1):
        for chosen in map(list, combinations(range(num_columns), size)):
            solution, *_ = np.linalg.lstsq(matrix[:, chosen] / scale[chosen], target, rcond=None)
            if (solution < 0).any():
                continue
            error = float(np.linalg.norm(matrix[:, chosen] / scale[chosen] @ solution - target))
            if error < best_error:
                best_error = error
                best = np.zeros(num_columns)
                best[chosen] = solution / scale[chosen]
    return best
