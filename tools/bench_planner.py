"""Compare planners on the same lengths and cost model, on one core.

    python tools/bench_planner.py                      # quality and planning time, all rows
    python tools/bench_planner.py --scale --plot scale.png
    python tools/bench_planner.py --communication      # the same with exposed P2P, nodes of 8
    python tools/bench_planner.py --pp-size 4          # 1F1B, compared with the paper's PP-balance

Quality is a plan's step time divided by a lower bound that no plan can beat (total work / ranks,
and the longest sequence's best time; compute only unless --communication). The cost model is that
of FlexSP's 7B GPT: 5.128e-6 L^2 + 0.184 L ms, divided by the degree. Step times of each planner
assume:

* ours, the paper's, static, greedy   ranks wait only for their ring partners
* megatron                            its own rule: a barrier over all ranks after each group
* groups (our adapter for Megatron)   a group starts when its ranks are free
* verl, trl                           static CP rings, each running its share sequentially

Planning time is the minimum of several runs, both wall time and process CPU time; on a shared
machine, the latter is what a dedicated core would need.

Peers are used if installed (`pip install megatron-core verl trl`, --no-deps is enough): only the
file with their planner is loaded, with stubs for imports that planning does not use. Missing peers
are skipped with a message.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from peer_planners import Case, Planner, planners

from hdp.doctor.machine import cpu_name
from hdp.profile.provenance import code_version
from hdp.scheduler import CostModel, plan
from hdp.scheduler.render.text import align, bytes_text, markdown, seconds_text
from hdp.scheduler.workloads.generate import BENCHMARK_SETS, BenchmarkSet, draw

COMPUTE_ONLY = CostModel.from_coefficients(quadratic_s=5.128e-9, linear_s=1.84e-4)
NODE = 8
# A 7B model's KV (32 layers, 8 KV heads of 128, bf16 and fp32 gradients) over NVLink and 400G NICs.
WITH_COMMUNICATION = replace(
    COMPUTE_ONLY,
    kv_bytes_per_token=32 * 2 * 8 * 128 * (2 + 2 + 4),
    intra_node_bytes_per_s=150e9,
    inter_node_bytes_per_s=40e9,
)
SCALE_RANKS = (64, 256, 1024, 4096, 12288)
SEQUENCES_PER_RANK = 8
PEER_MAX_RANKS = 1024  # above this, the Python peers take minutes to hours


# ---- quality ----


def timed(make: Callable[[], Any], repeats: int, limit_s: float = 5.0) -> tuple[Any, float, float]:
    """(result, least wall seconds, least CPU seconds) of `repeats` runs, or fewer if slow."""
    wall_s, cpu_s = [], []
    for _ in range(repeats):
        started, used = time.perf_counter(), time.process_time()
        result = make()
        wall_s.append(time.perf_counter() - started)
        cpu_s.append(time.process_time() - used)
        if sum(cpu_s) > limit_s:
            break
    return result, min(wall_s), min(cpu_s)


def measure(planner: Planner, case: Case, repeats: int) -> dict[str, float]:
    make, step_s = planner
    result, wall_s, cpu_s = timed(lambda: make(case), repeats)
    return {"step_s": step_s(case, result), "planning_s": wall_s, "planning_cpu_s": cpu_s}


def compare(
    rows: list[BenchmarkSet], cost: CostModel, node: int | None, repeats: int, pp_size: int = 1
) -> dict:
    found, missing = planners(pp_size)
    for line in missing:
        print(line)
    results: dict[str, dict[str, Any]] = {}
    for row in rows:
        case = Case(
            seqlens=row.seqlens(),
            hdp_size=row.hdp_size,
            max_tokens_per_rank=row.max_tokens_per_rank,
            cost=cost,
            ranks_per_node=node,
            pp_size=pp_size,
        )
        bound_s = found["hdp"][0](case).lower_bound_s
        cells: dict[str, Any] = {}
        for name, planner in found.items():
            is_peer = name in ("megatron", "verl KK", "trl BFD", "groups 2^k")
            if is_peer and row.hdp_size > PEER_MAX_RANKS:
                continue
            cells[name] = measure(planner, case, min(repeats, 3) if is_peer else repeats)
            cells[name]["ratio"] = cells[name]["step_s"] / bound_s
        results[row.label] = {"lower_bound_s": bound_s, "planners": cells}
        worst = max(cells.items(), key=lambda item: item[1]["ratio"])
        print(f"  {row.label}: hdp {cells['hdp']['ratio']:.3f}, worst {worst[0]}", file=sys.stderr)
    return results


def quality_table(results: dict, quantity: str) -> list[list[str]]:
    names = list(dict.fromkeys(n for row in results.values() for n in row["planners"]))
    titles = {
        "ratio": "step time / bound",
        "planning_s": "planning, wall",
        "planning_cpu_s": "planning, CPU",
    }
    table = [[titles[quantity], *names]]
    for label, row in results.items():
        cells = [label]
        for name in names:
            value = row["planners"].get(name)
            if value is None:
                cells.append("-")
            elif quantity == "ratio":
                cells.append(f"{value['ratio']:.3f}")
            else:
                cells.append(seconds_text(value[quantity]))
        table.append(cells)
    return table


# ---- scale ----


def scale(repeats: int) -> list[dict[str, Any]]:
    """Planning time and peak memory of `hdp`, each size in its own process."""
    rows = []
    for ranks in SCALE_RANKS:
        command = [sys.executable, __file__, "--one-scale", str(ranks), "--repeats", str(repeats)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout))
        print(f"  {ranks} ranks: {seconds_text(rows[-1]['planning_s'])}", file=sys.stderr)
    return rows


def scale_one(ranks: int, repeats: int) -> dict[str, Any]:
    seqlens = draw("lognormal", num_sequences=ranks * SEQUENCES_PER_RANK)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    made, wall_s, cpu_s = timed(
        lambda: plan(seqlens, hdp_size=ranks, max_tokens_per_rank=16384, cost=COMPUTE_ONLY), repeats
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "ranks": ranks,
        "sequences": len(seqlens),
        "planning_s": wall_s,
        "planning_cpu_s": cpu_s,
        "peak_bytes": peak * 1024,
        "peak_growth_bytes": (peak - before) * 1024,
        "ratio": made.predicted_s / made.lower_bound_s,
    }


def scale_table(rows: list[dict[str, Any]]) -> list[list[str]]:
    table = [
        [
            "ranks",
            "sequences",
            "planning, wall",
            "planning, CPU",
            "CPU per sequence",
            "peak memory",
            "time / bound",
        ]
    ]
    for row in rows:
        table.append(
            [
                f"{row['ranks']:,}",
                f"{row['sequences']:,}",
                seconds_text(row["planning_s"]),
                seconds_text(row["planning_cpu_s"]),
                seconds_text(row["planning_cpu_s"] / row["sequences"]),
                bytes_text(row["peak_bytes"]),
                f"{row['ratio']:.3f}",
            ]
        )
    return table


def draw_scale(rows: list[dict[str, Any]], path: str) -> None:
    """Plot planning time over ranks, log-log, with a line of slope 1 for comparison."""
    from matplotlib.figure import Figure

    ranks = np.array([row["ranks"] for row in rows], dtype=float)
    taken = np.array([row["planning_cpu_s"] for row in rows]) * 1e3
    figure = Figure(figsize=(6.4, 4.0), dpi=160)
    axes = figure.add_axes((0.12, 0.15, 0.84, 0.75))
    axes.loglog(ranks, taken, "o-", color="#00798c", label="hdp.scheduler.plan, one core")
    middle = len(ranks) // 2
    axes.loglog(ranks, taken[middle] * ranks / ranks[middle], "--", color="#9aa0a6", label="linear")
    axes.set_xlabel(f"ranks ({SEQUENCES_PER_RANK} sequences per rank)")
    axes.set_ylabel("planning, CPU time [ms]")
    axes.set_xticks(ranks, [f"{int(r):,}" for r in ranks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path)


# ---- command line ----


def environment(script: str = "tools/bench_planner.py") -> str:
    """Command, hardware, versions and commit of this run."""
    arguments = " ".join(["python", script, *sys.argv[1:]])
    versions = f"Python {platform.python_version()}, numpy {np.__version__}"
    return f"{arguments}\n{cpu_name()}, one core; {versions}; {code_version()}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", help="run only rows whose label contains this")
    parser.add_argument("--communication", action="store_true", help="exposed P2P, nodes of 8")
    parser.add_argument("--pp-size", type=int, default=1, help="pipeline stages")
    parser.add_argument("--scale", action="store_true", help="planning time by number of ranks")
    parser.add_argument("--plot", help="with --scale: write the plot to this file")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    parser.add_argument("--json", help="write the numbers to this file")
    parser.add_argument("--one-scale", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one_scale:
        print(json.dumps(scale_one(arguments.one_scale, arguments.repeats)))
        return 0
    with contextlib.suppress(AttributeError, OSError):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    show = markdown if arguments.markdown else align
    print(environment(), end="\n\n")
    if arguments.scale:
        rows = scale(arguments.repeats)
        print(show(scale_table(rows)))
        if arguments.plot:
            draw_scale(rows, arguments.plot)
        data: Any = rows
    else:
        cost = WITH_COMMUNICATION if arguments.communication else COMPUTE_ONLY
        sets = [r for r in BENCHMARK_SETS if not arguments.rows or arguments.rows in r.label]
        if not sets:
            labels = ", ".join(r.label for r in BENCHMARK_SETS)
            raise SystemExit(f"no label contains --rows {arguments.rows!r}; labels: {labels}")
        node = NODE if arguments.communication else None
        if arguments.pp_size > 1:
            sets = [r for r in sets if r.hdp_size <= PEER_MAX_RANKS]
        data = compare(sets, cost, node, arguments.repeats, arguments.pp_size)
        print("\n" + show(quality_table(data, "ratio")))
        print("\n" + show(quality_table(data, "planning_s")))
        print("\n" + show(quality_table(data, "planning_cpu_s")))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(data, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
