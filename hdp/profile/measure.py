"""The measurements of `hdp profile`: everything needed to fit a cost model for this machine.

Five measurements, a few minutes in all:

  1. kernels       one layer's attention by length, degree and block; merges (kernels.py)
  2. links         P2P, all-reduce, host link, alone and shared (links.py)
  3. model         seconds and bytes per token without attention, forward's share (model.py)
  4. microbatches  real training steps of one microbatch: one long sequence, several, or many short
                   ones, on one rank and on rings of 2, 4, ... ranks
  5. the step      time outside microbatches (gathering parameters, reducing gradients, the
                   optimizer) becomes `reduce_s`

1 and 2 also run alone: `python -m hdp.profile.kernels`, `torchrun ... -m hdp.profile.links`.

The cost model is fitted to the times of 4 (scheduler/costs/fit.py), with the links of 2 as
measured, because the planner needs to predict training steps. On one rank there is no ring to fit,
so the ring's coefficients come from 1. Some microbatches are held out of the fit and only
predicted: their errors tell how good the model is.

The JSON is a cost model with a `report`: provenance, the source of each field, and every measured
row next to the model's prediction (report.py). picture.py draws it.
"""

from __future__ import annotations

import time
from statistics import median

import numpy as np
import torch
import torch.distributed as dist

from hdp.config import TrainConfig
from hdp.data.feed import StepBatch
from hdp.data.pack import Sample, pack_rank
from hdp.distributed.mesh import HDPMesh
from hdp.distributed.watchdog import Watchdog
from hdp.scheduler import StepPlan
from hdp.training.setup import Run, set_up
from hdp.training.step import train_step

from .kernels import measure_kernels
from .links import measure_links
from .model import measure_model
from .report import Measured, Shape, fit_all, heads_of, show_and_save


def profile(
    config: TrainConfig, *, out: str, plot: str | None, repeats: int, link_bytes: int | None
) -> None:
    """Measure and fit; on rank 0 print, save to `out` and draw to `plot`. Collective.

    repeats: number of times each measurement is taken (the median is used). link_bytes: size of the
    largest message; None: by device. Raises ValueError for a model or lengths that do not fit.
    """
    if config.device != "cuda":
        torch.set_num_threads(1)
    device = None if config.device == "auto" else config.device
    with HDPMesh.create(device=device) as mesh, Watchdog.start(mesh, timeout_s=3600) as watchdog:
        run = set_up(config, mesh, watchdog)
        measured = measure(run, repeats=repeats, link_bytes=link_bytes)
        fit = fit_all(run, measured)
        if run.is_main:
            show_and_save(run, measured, fit, out=out, plot=plot)


# ---- measuring ----


def measure(run: Run, *, repeats: int, link_bytes: int | None = None) -> Measured:
    """Take all measurements. Collective. Shapes take turns, so noise affects all of them alike."""
    began, capacity = time.perf_counter(), run.config.tokens_per_rank
    run.say("measuring attention and merges")
    degrees = sorted({1, 2, 4, 8, *degrees_of(run.mesh.hdp_size)})
    kernels = measure_kernels(heads_of(run, repeats), capacity, degrees)
    run.say("measuring links")
    links = measure_links(run.mesh, repeats=repeats, most_bytes=link_bytes)
    run.say("measuring the model without attention")
    model = measure_model(run, capacity, repeats=repeats)
    run.say("measuring microbatches")
    fitted, held_out = shapes(capacity, run.mesh.hdp_size)
    steps = {shape: make_step(run, shape) for shape in fitted + held_out}
    rows: dict[Shape, list[tuple[float, float]]] = {shape: [] for shape in steps}
    for turn in range(repeats + 1):
        for shape, step in steps.items():
            row = measure_step(run, step)
            if turn:  # the first turn is a warm-up
                rows[shape].append(row)
    middle = {
        shape: (median(a for a, _ in mine), median(b for _, b in mine))
        for shape, mine in rows.items()
    }
    return Measured(
        kernels=kernels,
        links=links,
        model=model,
        fitted={shape: middle[shape] for shape in fitted},
        held_out={shape: middle[shape] for shape in held_out},
        wall_s=time.perf_counter() - began,
    )


def degrees_of(num_ranks: int) -> list[int]:
    """Ring degrees to measure: 1, 2, 4, ... and all ranks."""
    powers = [1 << n for n in range(num_ranks.bit_length()) if 1 << n <= num_ranks]
    return sorted({*powers, num_ranks})


def shapes(capacity: int, num_ranks: int) -> tuple[list[Shape], list[Shape]]:
    """(shapes to fit, shapes to predict): fractions of a ring's capacity.

    None is a power of two: kernels behave specially there, and real lengths are rarely that.
    """
    fitted, held_out = [], []
    for d in degrees_of(num_ranks):
        room = capacity * d
        fitted += [
            (d, (room * 31 // 32,)),
            (d, (room * 15 // 32,)),
            (d, (room * 4 // 33,)),
            (d, (room * 8 // 33,) * 4),
            (d, (room * 2 // 33,) * 16),
        ]
        if d == 1:  # sequences this short are never split
            fitted.append((d, (room // 66,) * 64))
        held_out += [
            (d, (room * 3 // 4,)),
            (d, (room // 3,)),
            (d, (room // 5,)),
            (d, (room // 3, room // 5, room // 7)),
            (d, (room // 25,) * 24),
        ]
    return fitted, held_out


def measure_step(run: Run, step: StepBatch) -> tuple[float, float]:
    """(seconds of the microbatch, seconds of the rest of the step), mean over ranks."""
    began = time.perf_counter()
    train_step(run.context, step)
    step_s = time.perf_counter() - began
    spans = [span for span in run.context.recorder.spans() if span.name == "0"]
    inside_s = max(span.end_s for span in spans) - min(span.start_s for span in spans)
    row = torch.tensor([inside_s, step_s - inside_s], dtype=torch.float64)
    row = row.to(run.mesh.device)
    dist.all_reduce(row, group=run.mesh.hdp_group)
    inside, outside = (row / run.mesh.hdp_size).tolist()
    return inside, outside


def make_step(run: Run, shape: Shape) -> StepBatch:
    """A step with this shape on every ring of its degree that fits, so that all ranks are busy.

    Leftover ranks each run one rank's share of the sequences alone.
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
    capacity = 2 * run.config.tokens_per_rank
    plan = StepPlan.from_lists(seqlens, rings, mine, max_tokens_per_rank=capacity).validate()
    rng = np.random.default_rng(0)
    samples = [Sample(input_ids=rng.integers(0, run.dataset.vocab_size, n)) for n in seqlens]
    return StepBatch(
        plan=plan,
        batches=pack_rank(plan, rank, samples),
        seq_ids=np.arange(len(seqlens)),
        num_loss_tokens=sum(seqlens) - len(seqlens),
    ).to(run.mesh.device)
