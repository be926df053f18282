"""train_step: one plan, executed by this rank.

  1. agree        all ranks hold the same plan, or all stop here
  2. gather       parameters, once, before any rank enters a ring
  3. microbatches forward and backward in the plan's order; their number differs between ranks
  4. reduce       gradients, SUM over the HDP axis, once
  5. stop before harm: a non-finite loss or gradient norm raises on all ranks
  6. optimizer

Nothing is divided by a number of microbatches or ranks: each microbatch adds
-sum(logprobs) / num_loss_tokens, with the count of the whole step, known from the lengths.

No collective runs between 2 and 4: a rank in its third ring would wait for one that reaches the
collective later, and that one may wait for its part of the ring. Where every ring's microbatch is
the last of all of its ranks or of none (`StepPlan.ends_together`), nobody waits for a rank that is
in its last one, and on a GPU the reduction overlaps with that backward (`overlap_reduce`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hdp.attention.comm import RingComm
from hdp.attention.layout import RingLayout
from hdp.data.feed import StepBatch
from hdp.distributed.fsdp import (
    NonFiniteError,
    clip_grad_norm,
    reduce_gradients,
    set_microbatch,
    unshard_all,
)
from hdp.distributed.mesh import HDPMesh, agree_on_plan
from hdp.distributed.watchdog import Watchdog
from hdp.models.logprobs import token_cross_entropy

from .recorder import StepRecorder


def keep_everything(layout: RingLayout, offload_ratio: float) -> AbstractContextManager[Any]:
    """Without offload: what a forward saves stays on the device."""
    if offload_ratio:
        raise ValueError(
            f"the plan has a microbatch with offload ratio {offload_ratio:.2f}: give StepContext a "
            "PlannedOffload, or plan with offload=False"
        )
    return nullcontext()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepContext:
    """What stays the same from step to step."""

    mesh: HDPMesh
    model: nn.Module  # sharded; model(batch, comm) -> logprobs (total_tokens,)
    optimizer: torch.optim.Optimizer
    comm: RingComm
    recorder: StepRecorder
    grad_clip: float = 0.0  # largest global gradient norm; 0: no clipping
    overlap_reduce: bool = False  # reduce inside the last backward where the plan allows it
    watchdog: Watchdog = field(default_factory=Watchdog.off)
    # Around each forward, with the microbatch's layout and its offload ratio: a PlannedOffload.
    offload: Callable[[RingLayout, float], AbstractContextManager[Any]] = keep_everything


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """The same on all ranks."""

    loss: float  # mean over the step's loss tokens
    grad_norm: float  # before clipping


def train_step(context: StepContext, step: StepBatch) -> StepResult:
    """Run one step. Collective over the HDP axis.

    Raises ValueError if ranks disagree on the plan and NonFiniteError before the optimizer could do
    harm, both on all ranks.
    """
    mesh, model, recorder = context.mesh, context.model, context.recorder
    agree_on_plan(mesh, step.plan)  # 1
    assert step.batches, f"no microbatch for rank {mesh.hdp_rank}: make batches by pack_rank()"
    recorder.start()
    model.train()
    with recorder.span("reduce", "gather parameters"):
        unshard_all(model)  # 2
    overlap = context.overlap_reduce and step.plan.ends_together
    losses = []
    for i, batch in enumerate(step.batches):  # 3
        context.watchdog.progress(microbatch=i, ring=batch.layout.ring)
        with recorder.span("compute", str(i)):
            set_microbatch(model, reduce=overlap and i == len(step.batches) - 1)
            with context.offload(batch.layout, batch.offload_ratio):
                logprobs = model(batch.to(mesh.device), context.comm)
            loss = token_cross_entropy(logprobs, global_count=step.num_loss_tokens)
            loss.backward()
            losses.append(loss.detach())
    with context.watchdog.waiting(what="gradients and loss of all ranks"):
        if not overlap:
            with recorder.span("reduce", "reduce gradients"):
                reduce_gradients(model)  # 4
        total = _sum_losses(context, step, torch.stack(losses))  # 5
        try:
            grad_norm = clip_grad_norm(model, context.grad_clip or None)
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}; sequences {_some(step.seq_ids.tolist())}") from None
    context.optimizer.step()  # 6
    context.optimizer.zero_grad(set_to_none=True)
    return StepResult(loss=total, grad_norm=grad_norm)


def _sum_losses(context: StepContext, step: StepBatch, losses: Tensor) -> float:
    """The step's loss from each rank's (num_microbatches,) shares. Collective.

    Raises NonFiniteError on all ranks if it is not finite, naming the microbatches and sequences.
    """
    total = losses.sum().double()
    dist.all_reduce(total, group=context.mesh.hdp_group)
    loss = float(total)
    if math.isfinite(loss):
        return loss
    mine = [
        f"rank {context.mesh.hdp_rank} microbatch {i} with sequences "
        f"{_some(step.seq_ids[list(step.batches[i].seqs)].tolist())}"
        for i, finite in enumerate(losses.isfinite().tolist())
        if not finite
    ]
    by_rank: list[Any] = [None] * context.mesh.hdp_size
    dist.all_gather_object(by_rank, mine, group=context.mesh.hdp_group)
    raise NonFiniteError(
        f"loss is {loss}, from {_some([where for part in by_rank for where in part])}; the "
        "optimizer has not stepped. Look at these sequences, or resume from the last checkpoint "
        "with a lower learning rate"
    )


def _some(items: list) -> str:
    """The first few of a list that may be long."""
    text = ", ".join(map(str, items[:8]))
    return f"[{text}]" if len(items) <= 8 else f"[{text}, ... {len(items)} in all]"
