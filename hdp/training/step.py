"""train_step and forward_step: execute one rank's part of a plan.

  1. agree        all ranks hold the same plan, or all stop here
  2. gather       parameters, once, before any rank enters a ring
  3. microbatches forward and backward in the plan's order; ranks have different numbers of them
  4. reduce       gradients, SUM over the HDP axis, once
  5. check        a non-finite loss or gradient norm raises on all ranks before the update
  6. optimizer

Nothing is divided by the number of microbatches or ranks. Each microbatch adds its share of the
loss, by default -sum(logprobs) / num_loss_tokens, where the count is over the whole step. The
objective is an argument: any function with the signature given in hdp/objectives.

No collective runs between 2 and 4: a rank that entered one could wait for ranks that are in turn
waiting for its part of a ring. If each ring's microbatch is the last one on all of its ranks or on
none (`StepPlan.ends_together`), no rank waits for another that is in its last microbatch, and on a
GPU the reduction overlaps with that backward (`overlap_reduce`).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hdp.attention.comm import RingComm
from hdp.attention.layout import RingLayout
from hdp.data.feed import StepBatch
from hdp.distributed.fsdp import (
    clip_grad_norm,
    discard_gradients,
    reduce_gradients,
    reshard_all,
    set_microbatch,
    unshard_all,
)
from hdp.distributed.mesh import HDPMesh, agree_on_plan
from hdp.distributed.watchdog import Watchdog
from hdp.errors import NonFiniteError
from hdp.objectives import Objective, Share, cross_entropy

from .recorder import StepRecorder


def keep_everything(layout: RingLayout, offload_ratio: float) -> AbstractContextManager[Any]:
    """Run without offload: everything forward saves stays on the device."""
    if offload_ratio:
        raise ValueError(
            f"the plan has a microbatch with offload ratio {offload_ratio:.2f}: give StepContext a "
            "PerMicrobatchOffload, or plan with offload=False"
        )
    return nullcontext()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepContext:
    """What stays the same across steps."""

    mesh: HDPMesh
    model: nn.Module  # sharded; model(batch, comm) -> the objective's input, such as logprobs
    comm: RingComm
    recorder: StepRecorder
    optimizer: torch.optim.Optimizer | None = None  # not needed by forward_step
    grad_clip: float = 0.0  # maximum global gradient norm; 0: no clipping
    overlap_reduce: bool = False  # reduce during the last backward if the plan allows it
    watchdog: Watchdog = field(default_factory=Watchdog.off)
    # Wraps each forward, given the microbatch's layout and offload ratio: a PerMicrobatchOffload.
    offload: Callable[[RingLayout, float], AbstractContextManager[Any]] = keep_everything

    @classmethod
    def create(
        cls,
        mesh: HDPMesh,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        watchdog: Watchdog | None = None,
        **options: Any,
    ) -> StepContext:
        """A context for a sharded model on a mesh, with its own communicator.

        watchdog: notified of all progress; None: no watchdog. options: the other fields.
        """
        watchdog = Watchdog.off() if watchdog is None else watchdog
        comm = RingComm(
            mesh.hdp_group,
            mesh.device,
            on_exchange=watchdog.touch,
            on_wait=partial(watchdog.waiting, what="a ring's exchange"),
        )
        options = {"overlap_reduce": mesh.device.type == "cuda", **options}
        return cls(
            mesh=mesh,
            model=model,
            optimizer=optimizer,
            comm=comm,
            recorder=StepRecorder(mesh.hdp_rank, comm),
            watchdog=watchdog,
            **options,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """The outcome of a step, identical on all ranks."""

    loss: float  # the objective's; by default the mean over the step's label tokens, nats
    grad_norm: float  # before clipping
    metrics: dict[str, float] = field(default_factory=dict)  # the objective's sums


def train_step(
    context: StepContext, step: StepBatch, objective: Objective = cross_entropy
) -> StepResult:
    """Run one step: microbatches, one SUM of gradients over all ranks (ByteScale Eq. 2), update.

    Collective over the HDP axis. context: what stays the same across steps. step: on the mesh's
    device. objective: what to minimize, the same on all ranks.

    Raises ValueError if ranks disagree on the plan, and NonFiniteError before the optimizer applies
    a bad update; both on all ranks.
    """
    mesh, model, recorder = context.mesh, context.model, context.recorder
    if context.optimizer is None:
        raise ValueError("this StepContext has no optimizer: pass it one, or call forward_step")
    _check(step, context, objective)
    agree_on_plan(mesh, step.plan, numbers=_identity(step))  # 1
    if step.num_loss_tokens < 1:  # checked here, where no rank is in a ring yet
        raise ValueError(
            f"sequences {_shorten(step.seq_ids.tolist())} have no label token in all: there is "
            "nothing to learn in this step; check the loss masks of the data"
        )
    recorder.start()
    discard_gradients(model)  # of a step that failed, if the caller goes on
    model.train()
    with recorder.span("reduce", "gather parameters"):
        unshard_all(model)  # 2
    overlap = context.overlap_reduce and step.plan.ends_together
    shares: list[Share] = []
    for i, batch in enumerate(step.batches):  # 3
        context.watchdog.progress(microbatch=i, ring=batch.layout.ring)
        with recorder.span("compute", str(i)):
            set_microbatch(model, reduce=overlap and i == len(step.batches) - 1)
            with context.offload(batch.layout, batch.offload_ratio):
                output = model(batch, context.comm)
            loss, sums = objective(output, batch, step)
            loss.backward()
            shares.append((loss.detach(), {name: x.detach() for name, x in sums.items()}))
    with context.watchdog.waiting(what="gradients and loss of all ranks"):
        if not overlap:
            with recorder.span("reduce", "reduce gradients"):
                reduce_gradients(model)  # 4
        if objective is not cross_entropy:  # which has no metrics
            _agree_on_names(mesh, shares)
        loss_value, metrics = _add_shares(context, step, shares)  # 5
        try:
            grad_norm = clip_grad_norm(model, context.grad_clip or None)
        except NonFiniteError as error:
            ids = _shorten(step.seq_ids.tolist())
            raise NonFiniteError(f"{error}; sequences {ids}") from None
    context.optimizer.step()  # 6
    context.optimizer.zero_grad(set_to_none=True)
    return StepResult(loss=loss_value, grad_norm=grad_norm, metrics=metrics)


@torch.no_grad()
def forward_step(context: StepContext, step: StepBatch) -> list[Tensor]:
    """The model's output for each of this rank's microbatches, without gradients. Collective.

    Rows match those of `step.batches`, so one model's results (log-probabilities of a reference,
    values of a critic) can be used as columns in another model's `train_step` on the same plan.
    Parameters are gathered once and freed at the end; the model runs in eval mode and its previous
    mode is restored. context: its optimizer may be None. step: on the mesh's device. Raises
    ValueError on all ranks if they disagree on the plan.
    """
    mesh, model = context.mesh, context.model
    _check(step, context)
    agree_on_plan(mesh, step.plan, numbers=_identity(step))
    were_training = [module for module in model.modules() if module.training]
    model.eval()
    unshard_all(model)
    outputs = []
    try:
        for i, batch in enumerate(step.batches):
            context.watchdog.progress(microbatch=i, ring=batch.layout.ring)
            set_microbatch(model, reduce=False)
            outputs.append(model(batch, context.comm))
    finally:
        reshard_all(model)
        for module in were_training:
            module.training = True
        context.comm.take_stats()  # which would otherwise grow with every call
    return outputs


def _identity(step: StepBatch) -> dict[str, int]:
    """Numbers that are the same on two ranks only if they run the same sequences."""
    ids = np.asarray(step.seq_ids, dtype="<i8")
    return {
        "the number of label tokens": step.num_loss_tokens,
        "the checksum of the sequence ids": zlib.crc32(ids.tobytes()),
    }


def _check(step: StepBatch, context: StepContext, objective: Objective | None = None) -> None:
    """Raise ValueError for a step that this context cannot run: the same outcome on all ranks."""
    mesh = context.mesh
    assert step.batches, f"no microbatch for rank {mesh.hdp_rank}: build batches with pack_rank()"
    device = step.batches[0].input_ids.device
    if device != mesh.device:
        raise ValueError(
            f"the step's tokens are on {device} but the mesh is on {mesh.device}: call "
            "step.to(mesh.device), or use a StepFeed, which does so ahead of time"
        )
    missing = set(getattr(objective, "columns", ())) - set(step.batches[0].columns)
    if missing:
        raise ValueError(
            f"the objective {objective} needs the columns {sorted(missing)}; the samples have "
            f"{sorted(step.batches[0].columns)}: add arrays of one entry per token to the samples"
        )
    if context.offload is keep_everything:  # of any rank: that rank would fail inside a ring
        keep_everything(step.batches[0].layout, float(step.plan.offload_ratio.max(initial=0.0)))


def _agree_on_names(mesh: HDPMesh, shares: list[Share]) -> None:
    """Raise ValueError on all ranks unless all microbatches report the same metrics. Collective.

    Sums are reduced by position: other names would add up what does not belong together.
    """
    mine = {tuple(sorted(sums)) for _, sums in shares}
    checksums = [zlib.crc32("\0".join(names).encode()) for names in mine]
    extremes = torch.tensor([max(checksums), -min(checksums)], device=mesh.device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=mesh.hdp_group)
    highest, lowest_negated = extremes.tolist()
    if highest == -lowest_negated:
        return
    by_rank: list[Any] = [None] * mesh.hdp_size
    dist.all_gather_object(by_rank, sorted(mine), group=mesh.hdp_group)
    first = by_rank[0][0]
    rank, names = next(
        (rank, names) for rank, found in enumerate(by_rank) for names in found if names != first
    )
    raise ValueError(
        f"the objective reports the metrics {list(first)} for a microbatch of rank 0 and "
        f"{list(names)} for one of rank {rank}: report the same names for all, with 0 if need be"
    )


def _add_shares(
    context: StepContext, step: StepBatch, shares: list[Share]
) -> tuple[float, dict[str, float]]:
    """The step's loss and metric sums over all ranks, in one all-reduce. Collective.

    Raises NonFiniteError on all ranks if the loss is not finite, naming microbatches and sequences.
    """
    names = sorted(shares[0][1])
    losses = torch.stack([loss for loss, _ in shares]).double()
    totals = [losses.sum()]
    totals += [torch.stack([sums[name] for _, sums in shares]).double().sum() for name in names]
    total = torch.stack(totals).detach()
    dist.all_reduce(total, group=context.mesh.hdp_group)
    loss, *values = total.tolist()
    if math.isfinite(loss):
        return loss, dict(zip(names, values, strict=True))
    mine = [
        f"rank {context.mesh.hdp_rank} microbatch {i} with sequences "
        f"{_shorten(step.seq_ids[list(step.batches[i].seqs)].tolist())}"
        for i, finite in enumerate(losses.isfinite().tolist())
        if not finite
    ]
    by_rank: list[Any] = [None] * context.mesh.hdp_size
    dist.all_gather_object(by_rank, mine, group=context.mesh.hdp_group)
    raise NonFiniteError(
        f"loss is {loss}, from {_shorten([where for part in by_rank for where in part])}; the "
        "optimizer has not stepped. Check these sequences, or resume from the last checkpoint "
        "with a lower learning rate"
    )


def _shorten(items: list) -> str:
    """The first few items of a possibly long list, as text."""
    text = ", ".join(map(str, items[:8]))
    return f"[{text}]" if len(items) <= 8 else f"[{text}, ... {len(items)} in all]"
