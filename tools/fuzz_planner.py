"""Fuzz the planner with random batches on random clusters: no crashes, no invalid or poor plans.

    python tools/fuzz_planner.py --cases 100000

Each case draws lengths (several distributions, with or without an outlier), a cluster (any size,
with or without nodes), a cost model (from free communication to communication only), and sometimes
units, offload, pipeline stages or equal counts. It then plans with `hdp`, validates the plan, and
checks that the predicted time is not below the lower bound and, without pipeline stages, at most
`--limit` times that bound. Cases are seeded by their number: `--first N --cases 1` repeats case N.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import numpy as np

from hdp.scheduler import CostModel, StepPlan, plan


def draw_lengths(rng: np.random.Generator, count: int, most: int) -> np.ndarray:
    """(count,) int64 lengths in [1, most]."""
    lengths: np.ndarray
    shape = rng.integers(0, 6)
    if shape == 0:
        lengths = rng.integers(1, most + 1, count)
    elif shape == 1:
        lengths = np.exp(rng.normal(np.log(max(most / 50, 2)), rng.uniform(0.2, 2.0), count))
    elif shape == 2:
        lengths = np.full(count, rng.integers(1, most + 1))
    elif shape == 3:
        long = rng.random(count) < 0.1
        lengths = np.where(long, rng.uniform(most / 2, most, count), rng.uniform(1, 50, count))
    elif shape == 4:
        lengths = most / (1 + rng.pareto(1.0, count) * 10)
    else:
        lengths = np.full(count, most) // rng.integers(1, 5, count)
    lengths = np.clip(lengths, 1, most).astype(np.int64)
    if rng.random() < 0.3:
        lengths[0] = most
    return lengths


def draw_cost(rng: np.random.Generator) -> CostModel:
    """Coefficients over several orders of magnitude, with terms randomly absent."""

    def maybe(low: float, high: float, share: float = 0.6) -> float:
        return (
            float(np.exp(rng.uniform(np.log(low), np.log(high)))) if rng.random() < share else 0.0
        )

    intra = float(np.exp(rng.uniform(np.log(1e9), np.log(1e12))))
    return CostModel.from_coefficients(
        quadratic_s=maybe(1e-10, 1e-7, 0.9),
        linear_s=maybe(1e-6, 1e-3, 0.9) or 1e-5,
        fixed_s=maybe(1e-4, 1.0),
        small_shard_tokens=maybe(10, 5000),
        ring_step_s=maybe(1e-5, 1e-1, 0.4),
        kv_bytes_per_token=maybe(1e3, 1e6),
        intra_node_bytes_per_s=intra,
        inter_node_bytes_per_s=intra * float(rng.uniform(0.05, 1.0)),
        activation_bytes_per_token=maybe(1e4, 1e7),
        temporary_bytes_per_token=maybe(1e3, 1e6),
        num_layers=int(rng.integers(1, 80)),
        host_bytes_per_s=maybe(1e9, 1e11),
        ranks_per_host_link=int(rng.integers(1, 5)),
        reduce_s=maybe(1e-3, 1.0, 0.2),
    )


def draw_case(number: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Lengths and arguments of plan() for one case."""
    rng = np.random.default_rng([20250228, number])
    size = int(rng.choice([1, 2, 3, 5, 7, 8, 12, 16, 24, 31, 64, 100, 256]))
    node = None
    if rng.random() < 0.4:
        node = int(rng.choice([d for d in range(1, size + 1) if size % d == 0]))
    capacity = int(rng.choice([1, 7, 100, 1024, 8192, 30000]))
    most = max(1, int(size * capacity * rng.choice([0.01, 0.1, 0.5, 1.0])))
    count = int(rng.integers(1, rng.choice([3, 20, 200, 1000]) + 1))
    lengths = draw_lengths(rng, count, most)
    units = None
    if rng.random() < 0.2 and capacity >= 100:  # pairs that fit together
        units = np.arange(count) // 2
        lengths = np.minimum(lengths, max(1, (size - 2) * capacity // 2))
    arguments = {
        "hdp_size": size,
        "max_tokens_per_rank": capacity,
        "cost": draw_cost(rng),
        "units": units,
        "ranks_per_node": node,
        "pp_size": int(rng.choice([1, 1, 1, 2, 4])),
        "offload": bool(rng.random() < 0.3),
        "equal_counts": bool(rng.random() < 0.1),
    }
    return lengths, arguments


def run_case(number: int) -> tuple[float, StepPlan]:
    """(predicted time over the lower bound, plan). Raises if the plan is wrong."""
    lengths, arguments = draw_case(number)
    drawn = plan(lengths, **arguments).validate()
    assert drawn.predicted_s > 0, f"predicted {drawn.predicted_s} s"
    bound_s = drawn.lower_bound_s
    assert drawn.predicted_s >= bound_s * (1 - 1e-6), (
        f"predicted {drawn.predicted_s} s is below the lower bound of {bound_s} s"
    )
    return drawn.predicted_s / bound_s, drawn


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--limit", type=float, default=2.0)
    arguments = parser.parse_args()
    begun = time.perf_counter()
    ratios: list[float] = []
    failures = 0
    for number in range(arguments.first, arguments.first + arguments.cases):
        if number % 5_000 == 0 and number > arguments.first:
            worst = max(ratios, default=0.0)
            print(f"{number - arguments.first} cases, {failures} failures, worst {worst:.3f}",
                  flush=True)  # fmt: skip
        try:
            ratio, step_plan = run_case(number)
        except Exception as error:
            failures += 1
            print(f"case {number}: {type(error).__name__}: {error}", flush=True)
            continue
        if step_plan.pp_size == 1:
            ratios.append(ratio)
            if ratio > arguments.limit:
                failures += 1
                print(f"case {number}: {ratio:.3f} x the lower bound", flush=True)
    spread = np.quantile(ratios, [0.5, 0.9, 0.99, 1.0]).round(4).tolist() if ratios else []
    print(
        f"{arguments.cases} cases in {time.perf_counter() - begun:.0f} s, {failures} failures; "
        f"over the lower bound at p50, p90, p99, max: {spread}"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
