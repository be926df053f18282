"""Compare training steps under HDP and static context parallelism: same batches, same run.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 tools/bench_step.py

Each batch has one long document and several short ones. A static mesh can handle them in two ways:
every sequence on one rank (static:1), where the others wait for the rank with the long one, or
every sequence on several ranks (static:2), where short ones communicate needlessly. All policies
train each batch in turn, in an order that rotates from batch to batch, so noise affects all alike.
All columns are each policy's medians over the batches: tokens/s is median tokens over median
seconds, and speedup is the first policy's median seconds over this one's, so the two always agree.
On a CPU, use 2 ranks with one thread each on two cores: with more ranks than cores, the time one
rank waits goes to the others.

The learning rate is practically 0, so that every policy sees the same weights; losses must agree.

With `--lengths 32768 131072` it runs a different benchmark, full steps of one sequence per rank, by
length: MFU, memory, and a fitted prediction (step_lengths.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch

from hdp import console
from hdp.config import TrainConfig
from hdp.data.feed import StepBatch, StepFeed
from hdp.distributed.mesh import HDPMesh
from hdp.distributed.watchdog import Watchdog
from hdp.training.observe import Observer
from hdp.training.setup import Run, set_up
from hdp.training.step import train_step


@dataclass(frozen=True, slots=True, kw_only=True)
class OneLongEach:
    """A sampler: batch i is the i-th long document plus as many short ones as fit."""

    seqlens: np.ndarray
    batch_tokens: int
    long_tokens: int  # documents of at least this length are the long ones
    short_tokens: int  # documents of at most this length are the short ones

    def batch_at(self, position: tuple[int, int]) -> tuple[np.ndarray, tuple[int, int]]:
        order = np.random.default_rng(0).permutation(len(self.seqlens))
        long = order[self.seqlens[order] >= self.long_tokens]
        short = order[self.seqlens[order] <= self.short_tokens]
        if not len(long) or not len(short):
            raise SystemExit(
                f"found {len(long)} documents of at least {self.long_tokens} tokens and "
                f"{len(short)} of at most {self.short_tokens}, need one of each: change "
                "--long-tokens or --short-tokens"
            )
        first = long[position[1] % len(long)]
        start = position[1] * 97 % len(short)
        others = np.roll(short, -start)
        room = self.batch_tokens - self.seqlens[first]
        others = others[np.cumsum(self.seqlens[others]) <= room]
        return np.concatenate([[first], others]), (0, position[1] + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Measurements of one policy on one batch."""

    step_s: float
    predicted_s: float
    bubble: float
    planned_bubble: float
    bytes_sent: int
    num_tokens: int
    loss: float


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--policies",
        default="static:1,static:2,hdp",
        help="policies in order; static:K uses K ranks per sequence; ratios are to the first",
    )
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--long-tokens", type=int, default=4096, help="length of the long document")
    parser.add_argument(
        "--short-tokens", type=int, default=512, help="maximum length of short ones"
    )
    parser.add_argument("--batch-tokens", type=int, default=12288)
    parser.add_argument("--max-tokens-per-rank", type=int, default=4096)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--cost", help="cost model: a file from `hdp profile`, or a preset")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    config = TrainConfig(
        model=args.model,
        data=args.data,
        max_length=args.long_tokens,
        overlong="truncate",
        max_tokens_per_rank=args.max_tokens_per_rank,
        batch_tokens=args.batch_tokens,
        cost=args.cost,
        device=args.device,
        lr=1e-30,  # must be positive; weights do not change
        weight_decay=0.0,
    )
    device = None if args.device == "auto" else args.device
    with HDPMesh.create(device=device) as mesh, Watchdog.start(mesh, timeout_s=3600) as watchdog:
        run = set_up(config, mesh, watchdog)
        rows = bench(run, args)
        if run.is_main:
            report(run, args, rows)


def bench(run: Run, args: argparse.Namespace) -> dict[str, list[Row]]:
    """Run all policies on all batches, after one warm-up batch each."""
    sampler = OneLongEach(
        seqlens=run.dataset.seqlens,
        batch_tokens=args.batch_tokens,
        long_tokens=args.long_tokens,
        short_tokens=args.short_tokens,
    )
    policies = args.policies.split(",")
    feeds = {}
    for policy in policies:
        name, _, cp_size = policy.partition(":")
        options = dataclasses.replace(
            run.config, policy=name, cp_size=int(cp_size) if cp_size else None
        )
        planner = dataclasses.replace(run, config=options)
        feeds[policy] = StepFeed(
            run.dataset,
            sampler,
            planner.plan,
            rank=run.mesh.hdp_rank,
            position=(0, 0),
            device=run.mesh.device,
        )
    observer = Observer(run)
    rows: dict[str, list[Row]] = {policy: [] for policy in policies}
    for batch in range(args.batches + 1):
        shift = batch % len(policies)
        for policy in policies[shift:] + policies[:shift]:
            step = feeds[policy].make((0, batch))
            row = measure(run, observer, step)
            if batch:
                rows[policy].append(row)
    return rows


def measure(run: Run, observer: Observer, step: StepBatch) -> Row:
    """Measure one step: forward, backward, reduction, optimizer."""
    began = time.perf_counter()
    result = train_step(run.context, step)
    step_s = time.perf_counter() - began
    metrics = observer.measure(1, step, result, lr=0.0, step_s=step_s, total_tokens=0)
    return Row(
        step_s=step_s,
        predicted_s=metrics.planned_s,
        bubble=metrics.bubble,
        planned_bubble=metrics.planned_bubble,
        bytes_sent=metrics.bytes_sent,
        num_tokens=metrics.num_tokens,
        loss=metrics.loss,
    )


COLUMNS = ("policy", "tokens/s", "step s", "plan s", "bubble", "plan", "MB sent", "speedup")


def medians_table(rows: dict[str, list[Row]]) -> list[list[str]]:
    """One row per policy with COLUMNS from its medians; speedup is over the first policy."""
    middle = {policy: medians(mine) for policy, mine in rows.items()}
    first = next(iter(middle.values()))
    return [
        [
            policy,
            f"{row.num_tokens / row.step_s:,.0f}",
            f"{row.step_s:.3f}",
            f"{row.predicted_s:.3f}",
            f"{row.bubble:.1%}",
            f"{row.planned_bubble:.1%}",
            f"{row.bytes_sent / 1e6:.1f}",
            f"{first.step_s / row.step_s:.2f}x",
        ]
        for policy, row in middle.items()
    ]


def medians(rows: Sequence[Row]) -> Row:
    """The median of each field."""
    names = [field.name for field in dataclasses.fields(Row)]
    return Row(**{name: median(getattr(row, name) for row in rows) for name in names})


def report(run: Run, args: argparse.Namespace, rows: dict[str, list[Row]]) -> None:
    """Print the table; fail if the policies' losses differ."""
    base = next(iter(rows.values()))
    title = (
        f"{run.mesh.hdp_size} ranks on {run.mesh.device.type}, medians over {args.batches} batches "
        f"of {args.batch_tokens:,} tokens, one document of {args.long_tokens:,} in each; tokens/s "
        "and speedup are ratios of these medians"
    )
    console.print_table(COLUMNS, medians_table(rows), title=title)
    for policy, mine in rows.items():
        worst = max(abs(m.loss - b.loss) / b.loss for m, b in zip(mine, base, strict=True))
        tolerance = 1e-5 if run.mesh.device.type == "cpu" else 1e-2
        assert worst < tolerance, f"{policy}: losses differ by {worst:.2e} from the baseline's"


if __name__ == "__main__":
    if "--lengths" in sys.argv:
        sys.path.insert(0, str(Path(__file__).parent))
        import step_lengths

        step_lengths.main()
    else:
        try:
            main()
        except ValueError as error:  # invalid lengths, data or model
            raise SystemExit(f"bench_step: {error}") from None
