"""Fit a CostModel to measured microbatches.

A microbatch's time is linear in five sums over its pieces (a piece of L tokens on d ranks), and so
are the cost model's coefficients:

    seconds = quadratic_s * sum L^2 / d  +  small * sum L  +  linear_s * sum L / d
              + ring_step_s * (d - 1)  +  fixed_s

with small = quadratic_s * small_shard_tokens, as long as no transfer is exposed. Where one is, the
ring takes d - 1 transfers instead of the d - 1 blocks that they outlast, which is linear too. So
the fit guesses which microbatches have exposed transfers, solves, and corrects the guess until it
agrees with the solution.

The fit minimizes *relative* errors, since a short microbatch matters as much as a long one, and
keeps every coefficient >= 0. Of all subsets of coefficients it takes the best one whose
unconstrained solution is non-negative, which is the exact optimum of the constrained problem
(`test_fit_is_the_optimum`).

`fit_line` does the same for a link: seconds = latency + bytes / bandwidth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from .cost_model import CostModel

_TERMS = ("quadratic_s", "small_shard_tokens", "linear_s", "ring_step_s", "fixed_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """A measured microbatch: `pieces` are (seqlen, degree), all rings the same ring."""

    pieces: tuple[tuple[int, int], ...]
    seconds: float  # forward + backward, waiting for the ring included
    across_nodes: bool = False  # whether the ring's ranks are on more than one node

    @property
    def degree(self) -> int:
        return max((d for _, d in self.pieces), default=1)

    @property
    def features(self) -> list[float]:
        """The five sums of the module docstring."""
        return [
            sum(n * n / d for n, d in self.pieces),
            float(sum(n for n, _ in self.pieces)),
            sum(n / d for n, d in self.pieces),
            float(self.degree - 1),
            1.0,
        ]

    @property
    def on_ring(self) -> np.ndarray:
        """(2,): the first two sums, over the pieces on the ring only."""
        ring = [(n, d) for n, d in self.pieces if d > 1]
        return np.array([sum(n * n / d for n, d in ring), float(sum(n for n, _ in ring))])

    def exposed_s(self, cost: CostModel) -> float:
        """Transfers minus the blocks that hide them, over all ring steps; not clipped at 0."""
        attention_s = cost.quadratic_s * float(self.on_ring @ (1.0, cost.small_shard_tokens))
        transfer_s = cost.transfer_s(self.on_ring[1], self.degree, self.across_nodes)
        return (self.degree - 1) * (float(transfer_s) - attention_s / self.degree)

    def predicted_s(self, cost: CostModel) -> float:
        """Seconds that `cost` predicts for this microbatch."""
        small = cost.quadratic_s * cost.small_shard_tokens
        terms = [cost.quadratic_s, small, cost.linear_s, cost.ring_step_s, cost.fixed_s]
        return float(np.dot(self.features, terms)) + max(self.exposed_s(cost), 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A fitted cost model and its errors on the observations."""

    cost: CostModel
    relative_errors: np.ndarray  # (num_observations,) float64: predicted / measured - 1


def fit_cost(
    observations: Sequence[Observation],
    base: CostModel,
    *,
    name: str = "",
    known_links: bool = False,
    without: Sequence[str] = (),
) -> Fit:
    """Fit the time coefficients to measurements; all other fields are taken from `base`.

    without: names of coefficients fixed at 0: attention alone, for example, has no "fixed_s".

    known_links: keep kv_bytes_per_token and the bandwidths of `base`, which were measured.
    Otherwise transfers count as hidden or as part of the fitted terms, and the bandwidths become
    infinite if ring microbatches were measured. Without observations on more than one rank, the
    ring's coefficients (small_shard_tokens, ring_step_s, bandwidths) stay those of `base`.
    Raises ValueError for fewer observations than coefficients, and for times that are not positive
    or do not grow with the tokens.
    """
    seconds = np.array([o.seconds for o in observations], dtype=np.float64)
    if not (np.isfinite(seconds).all() and (seconds > 0).all()):
        raise ValueError(f"measured seconds must be positive and finite, got {seconds.tolist()}")
    on_rings = any(o.degree > 1 for o in observations)
    # On one rank L and L / d are the same: only the sum of their coefficients is identifiable.
    identifiable = range(5) if on_rings else (0, 2, 4)
    if not on_rings and "linear_s" in without:
        identifiable = (0, 1, 4)
    columns = [column for column in identifiable if _TERMS[column] not in without]
    if len(observations) < len(columns):
        raise ValueError(
            f"{len(observations)} observations cannot determine {len(columns)} coefficients: "
            "measure more lengths"
        )
    base = replace(base, name=name or base.name)
    if on_rings and not known_links:
        base = replace(base, intra_node_bytes_per_s=math.inf, inter_node_bytes_per_s=math.inf)
    best: Fit | None = None
    for exposed in (
        np.zeros(len(seconds), dtype=bool),
        np.array([o.degree > 1 for o in observations]),
    ):
        for _ in range(2 * len(seconds)):
            cost = _solve(observations, base, exposed, columns)
            errors = np.array([o.predicted_s(cost) for o in observations]) / seconds - 1.0
            if best is None or np.linalg.norm(errors) < np.linalg.norm(best.relative_errors):
                best = Fit(cost=cost, relative_errors=errors)
            late = np.array([o.exposed_s(cost) for o in observations]) / seconds
            wrong = np.where((late > 0) != exposed, np.abs(late), 0.0)
            if not wrong.any():
                break
            exposed[np.argmax(wrong)] ^= True  # one at a time: flipping all at once may cycle
    assert best is not None
    return best


def fit_line(num_bytes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """(latency in s, bytes per s) of a link, from message times for at least two sizes.

    Minimizes relative errors, as above. If times do not grow with size (small messages, noise), the
    largest message's whole time is attributed to its bytes, which never overstates the bandwidth.
    """
    sizes, times = np.asarray(num_bytes, dtype=float), np.asarray(seconds, dtype=float)
    if len(set(num_bytes)) < 2 or not (times > 0).all():
        raise ValueError(
            f"a bandwidth needs two message sizes and positive times, got {num_bytes}, {seconds}"
        )
    latency_s, per_byte = _non_negative(
        np.stack([np.ones_like(sizes), sizes], axis=1) / times[:, None], np.ones_like(times)
    ).tolist()
    if per_byte <= 0:
        largest = int(np.argmax(sizes))
        return 0.0, float(sizes[largest] / times[largest])
    return latency_s, 1 / per_byte


def _solve(
    observations: Sequence[Observation],
    base: CostModel,
    exposed: np.ndarray,
    columns: Sequence[int],
) -> CostModel:
    """The best coefficients, assuming the `exposed` observations have exposed transfers."""
    seconds = np.array([o.seconds for o in observations])
    features = np.array([o.features for o in observations])
    known_s = np.zeros(len(seconds))
    for i, o in enumerate(observations):
        if exposed[i]:
            features[i, :2] -= (o.degree - 1) / o.degree * o.on_ring
            transfer_s = base.transfer_s(o.on_ring[1], o.degree, o.across_nodes)
            known_s[i] = (o.degree - 1) * float(transfer_s)
    if 1 not in columns:  # fixed ratio to the quadratic term, from `base`
        features[:, 0] += base.small_shard_tokens * features[:, 1]
    relative, target = features / seconds[:, None], 1.0 - known_s / seconds
    found = np.zeros(5)
    found[columns] = _non_negative(relative[:, columns], target)
    if found[1] > 0 and found[0] == 0:  # noise: no attention, so no small-shard cost
        others = [column for column in columns if column != 1]
        found[1] = 0.0
        found[others] = _non_negative(relative[:, others], target)
    quadratic_s, small, linear_s, ring_step_s, fixed_s = found.tolist()
    if not quadratic_s + linear_s > 0:
        raise ValueError(
            f"times {seconds.tolist()} do not grow with tokens: measure longer sequences"
        )
    changes = {"quadratic_s": quadratic_s, "linear_s": linear_s, "fixed_s": fixed_s}
    if 1 in columns:
        changes["small_shard_tokens"] = small / quadratic_s if quadratic_s > 0 else 0.0
    if 3 in columns:
        changes["ring_step_s"] = ring_step_s
    return replace(base, **changes)


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
