"""Measure this machine with this model, and fit the cost model that the planner takes.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 tools/profile_machine.py
    torchrun --standalone --nproc-per-node 8 examples/sft.py --cost cost.json ...

Every rank runs real training steps of one microbatch each: one long sequence, several, many short
ones, alone and on rings of 2, 4, ... ranks. Their times are fitted (scheduler/fit.py); a few other
shapes are measured too and only predicted: the last column of the table says how well. Time outside
of the microbatch (gathering parameters, reducing gradients, the optimizer) becomes `reduce_s`.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from statistics import median

import numpy as np
import torch
import torch.distributed as dist

from hdp import console
from hdp.config import TrainConfig
from hdp.data.feed import StepBatch
from hdp.data.pack import Sample, pack_microbatch
from hdp.mesh import HDPMesh
from hdp.run import Run, set_up
from hdp.scheduler import StepPlan
from hdp.scheduler.fit import Observation, fit_cost
from hdp.step import train_step
from hdp.watchdog import Watchdog

Shape = tuple[int, tuple[int, ...]]  # (degree, lengths of the whole sequences)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="cost.json", help="where the cost model goes")
    parser.add_argument("--model", default="demo", help="as for training")
    parser.add_argument("--data", default="stdlib", help="for the tokenizer of the demo model")
    parser.add_argument("--max-tokens-per-rank", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--activation-checkpointing", action="store_true")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if int(torch.get_num_threads()) > 1 and args.device != "cuda":
        torch.set_num_threads(1)
    capacity = args.max_tokens_per_rank
    config = TrainConfig(
        model=args.model,
        random_init=args.model != "demo",
        data=args.data,
        max_length=capacity,
        overlong="truncate",
        max_tokens_per_rank=capacity,
        device=args.device,
        activation_checkpointing=args.activation_checkpointing,
    )
    device = None if args.device == "auto" else args.device
    with HDPMesh.create(device=device) as mesh, Watchdog.start(mesh, timeout_s=3600) as watchdog:
        run = set_up(config, mesh, watchdog)
        fitted, held_out = shapes(capacity, mesh.hdp_size)
        measured = {shape: measure(run, shape, args.repeats) for shape in fitted + held_out}
        report(run, args, fitted, held_out, measured)


def shapes(capacity: int, num_ranks: int) -> tuple[list[Shape], list[Shape]]:
    """(shapes to fit, shapes to predict): fractions of what the ranks of a ring hold."""
    degrees = [1]
    while degrees[-1] * 2 <= num_ranks:
        degrees.append(degrees[-1] * 2)
    if degrees[-1] != num_ranks:
        degrees.append(num_ranks)
    fitted, held_out = [], []
    for d in degrees:
        room = capacity * d
        fitted += [
            (d, (room,)),
            (d, (room // 2,)),
            (d, (room // 8,)),
            (d, (room // 4,) * 4),
            (d, (room // 16,) * 16),
        ]
        held_out += [(d, (room * 3 // 4,)), (d, (room // 3, room // 5, room // 7))]
    return fitted, held_out


def measure(run: Run, shape: Shape, repeats: int) -> tuple[float, float]:
    """(seconds of the microbatch, seconds of the step around it), medians; mean over ranks."""
    step = make_step(run, shape)
    rows = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        train_step(run.context, step)
        step_s = time.perf_counter() - began
        spans = [span for span in run.context.recorder.spans() if span.name == "0"]
        inside_s = max(span.end_s for span in spans) - min(span.start_s for span in spans)
        row = torch.tensor([inside_s, step_s - inside_s], dtype=torch.float64)
        row = row.to(run.mesh.device)
        dist.all_reduce(row, group=run.mesh.hdp_group)
        rows.append((row / run.mesh.hdp_size).tolist())
    inside, outside = zip(*rows[1:], strict=True)  # the first one warms up
    return median(inside), median(outside)


def make_step(run: Run, shape: Shape) -> StepBatch:
    """The shape on every ring of its degree that the ranks have room for, so that all are busy.

    Ranks that are left over run its first sequence's share alone.
    """
    degree, lengths = shape
    size, rank = run.mesh.hdp_size, run.mesh.hdp_rank
    seqlens: list[int] = []
    rings: list[list[int]] = []
    mine: list[list[list[int]]] = [[[]] for _ in range(size)]
    for first in range(0, size, degree):
        ring = list(range(first, min(first + degree, size)))
        whole = len(ring) == degree
        for length in lengths:
            members = ring if whole else ring[:1]
            for member in members:
                mine[member][0].append(len(seqlens))
            seqlens.append(length if whole else max(1, length // degree))
            rings.append(members)
    capacity = 2 * run.config.max_tokens_per_rank
    plan = StepPlan.from_lists(seqlens, rings, mine, max_tokens_per_rank=capacity).validate()
    rng = np.random.default_rng(0)
    samples = [Sample(input_ids=rng.integers(0, run.dataset.vocab_size, n)) for n in seqlens]
    return StepBatch(
        plan=plan,
        batches=tuple(pack_microbatch(mb, rank, samples) for mb in plan.microbatches(rank)),
        seq_ids=np.arange(len(seqlens)),
        num_loss_tokens=sum(seqlens) - len(seqlens),
        next_position=(0, 0),
    )


def report(
    run: Run,
    args: argparse.Namespace,
    fitted: list[Shape],
    held_out: list[Shape],
    measured: dict[Shape, tuple[float, float]],
) -> None:
    """Fit, print the table, write the file."""

    def observation(shape: Shape) -> Observation:
        degree, lengths = shape
        pieces = tuple((length, degree) for length in lengths)
        return Observation(pieces=pieces, seconds=measured[shape][0])

    host = "cuda" if run.mesh.device.type == "cuda" else "cpu"
    where = torch.cuda.get_device_name() if host == "cuda" else "CPU"
    name = f"{args.model} on {run.mesh.hdp_size} ranks of {where}, measured"
    fit = fit_cost([observation(shape) for shape in fitted], run.cost, name=name)
    cost = dataclasses.replace(fit.cost, reduce_s=median(out for _, out in measured.values()))
    table = []
    for shape in fitted + held_out:
        features = np.array(observation(shape).features)
        small = cost.quadratic_s * cost.small_shard_tokens
        terms = [cost.quadratic_s, small, cost.linear_s, cost.ring_step_s, cost.fixed_s]
        predicted = float(features @ terms)
        degree, lengths = shape
        text = f"{len(lengths)} x {lengths[0]:,}" if len(set(lengths)) == 1 else f"{lengths}"
        error = f"{predicted / measured[shape][0] - 1:+.1%}"
        table.append(
            [text, degree, f"{measured[shape][0]:.4f}", f"{predicted:.4f}"]
            + ([error, ""] if shape in fitted else ["", error])
        )
    if not run.is_main:
        return
    columns = ["sequences", "ranks", "measured s", "model s", "fit error", "prediction error"]
    console.print_table(columns, table, title=cost.name)
    cost.save(args.out)
    print(f"wrote {args.out}: use it with --cost {args.out}")


if __name__ == "__main__":
    main()
