"""A microbatch on its way through Megatron: from a step's plan to tokens, labels and a loss.

The data iterator of a script gives one `RankStep` for each step: the plan and this rank's
microbatches of it. `pack_step` makes one. Its microbatches travel to `get_batch` with the ring
communicator, and on into every layer as the field `rows` of PackedSeqParams: nothing is global, so
recompute, pipeline stages and several models in one process see their own.

    def steps(samples):                                  # --dataloader-type external
        for batch in samples:
            made = plan(lengths(batch), cost=cost, max_tokens_per_rank=8192, **plan_options())
            yield pack_step(made, batch)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hdp.attention.comm import RingComm
from hdp.attention.layout import RingLayout
from hdp.data.pack import IGNORE_INDEX, PackedBatch, Samples, pack_rank
from hdp.scheduler import StepPlan

from .contract import Ranks, packed_seq_params_type


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What the layers need to know about the rows of a microbatch."""

    layout: RingLayout
    comm: RingComm
    spans: tuple[tuple[int, int], ...]  # positions of the rows in their whole sequences
    offload_ratio: float


@dataclass(frozen=True, kw_only=True)
class RankStep:
    """An item of the data iterator: one step's plan and this rank's microbatches of it."""

    plan: StepPlan
    batches: tuple[PackedBatch, ...]


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """What `get_batch` takes from the iterator that the wrapped schedule makes."""

    batch: PackedBatch
    comm: RingComm


def plan_options(ranks: Ranks | None = None) -> dict[str, Any]:
    """Arguments of `hdp.plan` that follow from Megatron's parallelism.

    hdp_size and pp_size; `ends_together`, so that gradients may be reduced during the last
    backward; with experts on several ranks, equal counts and aligned rings; with virtual pipeline
    stages, counts that are a multiple of the stages.
    """
    ranks = ranks or Ranks.current()
    return {
        "hdp_size": ranks.hdp_size,
        "pp_size": ranks.pp_size,
        "ends_together": True,
        "equal_counts": ranks.ep_size > 1,
        "multiple": ranks.pp_size if ranks.vpp_size > 1 else 1,
    }


def pack_step(plan: StepPlan, samples: Samples, ranks: Ranks | None = None) -> RankStep:
    """This rank's item of the data iterator. samples[s] is sequence s of the plan.

    Rows are padded to a multiple of the tensor parallel size, for sequence parallelism. All stages
    of a pipeline and all ranks of a tensor parallel group get the same. Raises ValueError for a
    plan that would hang here; `plan_options` makes the right demands.
    """
    ranks = ranks or Ranks.current()
    check_plan(plan, ranks)
    batches = pack_rank(plan, ranks.hdp_rank, samples, pad_to_multiple=ranks.tp_size)
    return RankStep(plan=plan, batches=batches)


def check_plan(plan: StepPlan, ranks: Ranks) -> None:
    """Raise ValueError for a plan that these ranks cannot run."""
    remedy = "pass **hdp.megatron.plan_options() to hdp.plan"
    if plan.hdp_size != ranks.hdp_size or plan.pp_size != ranks.pp_size:
        raise ValueError(
            f"plan for hdp_size={plan.hdp_size}, pp_size={plan.pp_size}, but Megatron has "
            f"{ranks.hdp_size} replicas of {ranks.pp_size} stages; {remedy}"
        )
    if ranks.ep_size > 1 and not plan.aligned:
        raise ValueError(
            f"expert parallelism over {ranks.ep_size} ranks needs an aligned plan: its ranks meet "
            f"in every layer of every microbatch; {remedy} (a plan made by hand: aligned=True)"
        )
    if ranks.vpp_size > 1:
        counts = plan.num_microbatches
        rest = counts % ranks.pp_size
        bad = (counts < ranks.pp_size) | ((rest > 0) & (rest < ranks.pp_size))
        if bad.any():
            rank = int(bad.argmax())
            raise ValueError(
                f"rank {rank} has {counts[rank]} microbatches; virtual pipeline stages need a "
                f"multiple of the {ranks.pp_size} stages; {remedy}"
            )


def get_batch(data_iterator: Iterator[Microbatch]) -> tuple[Tensor, Tensor, Tensor, Tensor, Any]:
    """tokens, labels, loss_mask, position_ids, packed_seq_params of the next microbatch.

    The tensors are (1, rows), on the current CUDA device; packed_seq_params carries the layout.
    Raises ValueError if the iterator is not that of the wrapped schedule.
    """
    item = next(data_iterator)
    if not isinstance(item, Microbatch):
        raise ValueError(
            f"the data iterator gave {type(item).__name__}: wrap the schedule, "
            "training.get_forward_backward_func = hdp.megatron.wrap("
            "training.get_forward_backward_func)"
        )
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    batch = item.batch.to(device, non_blocking=device.type == "cuda")
    total = batch.total_tokens
    # One "sequence" of all rows: RoPE takes its frequencies row by row, from SpanRotary.
    cu_seqlens = torch.tensor([0, total], dtype=torch.int32, device=device)
    params = packed_seq_params_type()(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=total,
        max_seqlen_kv=total,
        rows=Rows(
            layout=batch.layout,
            comm=item.comm,
            spans=tuple((start, stop) for _, start, stop in batch.layout.spans() if start < stop),
            offload_ratio=batch.offload_ratio,
        ),
    )
    mask = (batch.labels != IGNORE_INDEX).float()
    rows = (batch.input_ids, batch.labels.clamp(min=0), mask, batch.position_ids)
    tokens, labels, loss_mask, position_ids = (one[None] for one in rows)
    return tokens, labels, loss_mask, position_ids, params


def loss_func(loss_mask: Tensor, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(sum of the losses, tokens with a loss, the report): what --calculate-per-token-loss takes.

    loss_mask and output, the loss of each token, have as many elements. Nothing is divided here:
    ranks and microbatches differ in tokens, and Megatron divides once by all of them.
    """
    loss = (output.float().view(-1) * loss_mask.view(-1)).sum()
    num_tokens = loss_mask.sum().to(torch.int)
    report = torch.stack([loss.detach(), num_tokens.to(loss.dtype)])
    return loss, num_tokens, {"lm loss": report}


def forward_step(
    data_iterator: Iterator[Microbatch],
    model: torch.nn.Module,
    *,
    offload: Callable[[float], AbstractContextManager[Any]] = lambda ratio: nullcontext(),
) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The `forward_step` of a pretrain_gpt.py-style script.

    offload: opens a context for the forward from the microbatch's planned ratio, such as
        `lambda ratio: hdp.offload(ratio=ratio)`
    """
    tokens, labels, loss_mask, position_ids, params = get_batch(data_iterator)
    with offload(params.rows.offload_ratio):
        output = model(tokens, position_ids, None, labels=labels, packed_seq_params=params)
    return output, partial(loss_func, loss_mask)
