"""Synthetic runs: folders as `hdp train` leaves them, of any length and number of ranks.

    python -m tests.report.synthetic FOLDER --steps 300 --ranks 64

writes one, to look at its report in a browser.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from dataclasses import asdict
from pathlib import Path

import numpy as np

from hdp.config import TrainConfig
from hdp.report.trace import Trace
from hdp.scheduler import CostModel, Span, StepPlan, Timeline, plan, simulate


def rows(steps: int, ranks: int, seed: int = 0, every: int = 1) -> list[dict]:
    """Rows of metrics: a loss that falls, a gradient norm with a spike, idle ranks, evaluations."""
    rng = random.Random(seed)
    made: list[dict] = []
    for step in range(every, steps + 1, every):
        loss = 2.2 + 6.0 * math.exp(-8.0 * step / max(steps, 8)) + rng.gauss(0, 0.06)
        idle = [
            min(1.0, max(0.0, 0.02 + 0.04 * (rank % 7 == 3) + rng.gauss(0, 0.006)))
            for rank in range(ranks)
        ]
        step_s = 3.1 + rng.gauss(0, 0.08)
        made.append(
            {
                **{"step": step, "loss": loss, "lr": 3e-4 * min(1.0, step / 10)},
                "grad_norm": 90.0 if step == steps // 2 else 0.8 + abs(rng.gauss(0, 0.2)),
                **{"num_tokens": 65536, "num_loss_tokens": 65000, "num_seqs": 40},
                **{"total_tokens": 65536 * step, "hdp_size": ranks, "step_s": step_s},
                **{"tokens_per_s_per_rank": 65536 / step_s / ranks, "mfu": 0.41},
                **{"bubble": sum(idle) / ranks, "planned_bubble": 0.018, "planned_s": 2.9},
                **{"bytes_sent": 10**8, "mem_bytes": int((40 + step / steps) * 2**30)},
                **{"host_bytes": 0, "data_wait_s": 0.0, "rings": {"1": 38, "2": 1, "4": 1}},
                **{"idle": [round(share, 3) for share in idle], "shared_cores": False},
            }
        )
        if step % max(1, steps // 10 // every * every) == 0:
            made.append({"step": step, "eval_loss": loss + 0.12, "eval_loss_tokens": 10_000})
    return made


def planned(ranks: int, seed: int = 0) -> tuple[StepPlan, CostModel]:
    """A plan with long and short sequences."""
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.lognormal(8.0, 1.4, size=6 * ranks).astype(int) + 16, 16384 * ranks)
    lengths[0] = 16384 * max(1, ranks // 2)
    cost = CostModel.preset("h200")
    return plan(lengths, hdp_size=ranks, max_tokens_per_rank=16384, cost=cost), cost


def trace(step: int, ranks: int, seed: int = 0) -> Trace:
    """A trace whose measured side is the planned one, later by a random part."""
    step_plan, cost = planned(ranks, seed)
    timeline = simulate(step_plan, cost)
    rng = random.Random(seed)
    late = [1.0 + 0.06 * rng.random() for _ in range(ranks)]
    spans = tuple(
        Span(
            rank=span.rank,
            kind=span.kind,
            name=span.name,
            start_s=span.start_s * late[span.rank],
            end_s=span.end_s * late[span.rank],
        )
        for span in timeline.spans
    )
    return Trace(
        step=step,
        plan=step_plan,
        seq_ids=np.arange(step_plan.num_seqs) + 1000,
        names=[f"data/{seq % 97}.txt" for seq in range(step_plan.num_seqs)],
        cost=cost,
        planned=timeline,
        measured=Timeline(spans=spans, num_ranks=ranks, title="measured"),
    )


def write_run(folder: Path, *, steps: int, ranks: int, wanted: int | None = None) -> Path:
    """Write a run of `steps` of `wanted` steps (None: all) with a trace of its third one."""
    folder.mkdir(parents=True, exist_ok=True)
    config = TrainConfig(steps=wanted or steps, lr=1e-3, run_dir=str(folder), trace_step=3)
    (folder / "config.json").write_text(config.to_json() + "\n")
    text = "".join(json.dumps(row) + "\n" for row in rows(steps, min(ranks, 64)))
    (folder / "metrics.jsonl").write_text(text)
    (folder / "trace_3.json").write_text(trace(3, ranks).to_json())
    for step in (max(1, steps // 2), steps):
        (folder / "checkpoints" / f"step-{step:08}").mkdir(parents=True, exist_ok=True)
    assert asdict(config)["steps"] == (wanted or steps)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--wanted", type=int)
    options = parser.parse_args()
    print(write_run(options.folder, **{k: v for k, v in vars(options).items() if k != "folder"}))
