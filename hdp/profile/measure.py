"""What `hdp profile` measures: this machine with this model, until a cost model can be fitted.

Five measurements, a few minutes in all:

  1. kernels       attention of one layer by length, degree and block; merges (kernels.py)
  2. links         P2P, all-reduce, host link, alone and shared (links.py)
  3. model         seconds and bytes of a token without attention, forward's part (model.py)
  4. microbatches  real training steps of one microbatch: one long sequence, several, many short
                   ones, on one rank and on rings of 2, 4, ... ranks
  5. the step      what is outside of microbatches (gathering parameters, reducing gradients, the
                   optimizer) becomes `reduce_s`

1 and 2 also run alone: `python -m hdp.profile.kernels`, `torchrun ... -m hdp.profile.links`.

Times are fitted to 4 (scheduler/costs/fit.py), with the links of 2 as they were measured: what the
planner wants to know is how long a training step takes. On one rank there is no ring to fit, and
its coefficients come from 1. Some microbatches are not fitted but only predicted: their errors say
how good the model is.

The JSON is a cost model with a `report`: provenance, the source of each field, every measured row
with what the model says of it (report.py). picture.py draws it.
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
    """Measure, fit, and on rank 0 print, save to `out` and draw to `plot`. Collective.

    repeats: how often each thing is measured (the median counts); link_bytes: the largest message,
    None: by device. Raises ValueError for a model or lengths that do not fit.
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
    """Collective. Microbatches are measured in turn, so that noise hits all shapes alike."""
    began, capacity = time.perf_counter(), run.config.max_tokens_per_rank
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
            if turn:  # the first one warms up
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
    """1, 2, 4, ... and all ranks."""
    powers = [1 << n for n in range(num_ranks.bit_length()) if 1 << n <= num_ranks]
    return sorted({*powers, num_ranks})


def shapes(capacity: int, num_ranks: int) -> tuple[list[Shape], list[Shape]]:
    """(shapes to fit, shapes to predict): fractions of what the ranks of a ring hold.

    None is a power of two: kernels are special there, and lengths of data are not.
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
        if d == 1:  # nobody cuts such short ones
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
    """(seconds of the microbatch, seconds of the step around it); mean over ranks."""
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
        batches=pack_rank(plan, rank, samples),
        seq_ids=np.arange(len(seqlens)),
        num_loss_tokens=sum(seqlens) - len(seqlens),
    ).to(run.mesh.device)
