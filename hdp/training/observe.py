"""Observer: metrics of a finished step, and its planned and measured timelines side by side.

Measured and predicted values are the same quantities: busy time is the time a rank computes; the
bubble is the share of ranks x time, from the agreement on the plan to the end of the reduction,
that ranks spend waiting for the ring, for other ranks or for gradients.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hdp.data.feed import StepBatch
from hdp.models.causal_lm import CausalLM, transformer_shape
from hdp.models.lora import has_lora
from hdp.models.scalar_head import ScalarHeadLM
from hdp.report.trace import Trace
from hdp.scheduler import Span, StepPlan, Timeline, simulate
from hdp.scheduler.render.figure import draw_plans
from hdp.scheduler.simulation.simulator import microbatch_times

from .cores import shares_cores
from .metrics import ModelFlops, StepMetrics, blocks, peak_flops, ring_counts
from .setup import Run
from .step import StepResult
from .task import averages


class Observer:
    """Turns steps of one run into metrics."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.flops = count_flops(run.model)
        self._peak = _peak_flops(run)
        self._shares_cores = shares_cores(run.mesh)

    def measure(
        self,
        step: int,
        batch: StepBatch,
        result: StepResult,
        *,
        lr: float,
        step_s: float,
        total_tokens: int,
    ) -> StepMetrics:
        """Metrics of the step that just ended. Collective.

        All ranks return the same values except for this rank's own times.
        """
        run, plan = self._run, batch.plan
        spans = run.context.recorder.spans()
        mine = [
            sum(span.duration_s for span in spans if span.kind == "compute"),
            max((span.end_s for span in spans), default=0.0),
            float(run.context.recorder.bytes_sent),
            float(_memory_bytes(run.mesh.device)),
            float(run.host_bytes),
            float(self._shares_cores),
        ]
        size = run.mesh.hdp_size
        table = torch.empty(size, len(mine), dtype=torch.float64, device=run.mesh.device)
        row = torch.tensor(mine, dtype=torch.float64, device=run.mesh.device)
        dist.all_gather(list(table.unbind()), row, group=run.mesh.hdp_group)
        busy_s, end_s, bytes_sent, mem_bytes, host_bytes, shared = table.T.tolist()
        makespan_s = max(end_s)
        seqlens = plan.seqlens.tolist()
        num_tokens = sum(seqlens)
        flops = self.flops.of(seqlens, batch.num_loss_tokens)
        return StepMetrics(
            step=step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=lr,
            num_tokens=num_tokens,
            num_loss_tokens=batch.num_loss_tokens,
            num_seqs=plan.num_seqs,
            total_tokens=total_tokens,
            hdp_size=size,
            step_s=step_s,
            tokens_per_s_per_rank=num_tokens / step_s / size,
            mfu=flops / step_s / size / self._peak if self._peak else None,
            bubble=1.0 - sum(busy_s) / (size * makespan_s) if makespan_s > 0 else 0.0,
            planned_bubble=planned_bubble(plan, run),
            planned_s=plan.predicted_s,
            bytes_sent=int(sum(bytes_sent)),
            mem_bytes=int(max(mem_bytes)),
            host_bytes=int(max(host_bytes)),
            data_wait_s=batch.wait_s,
            rings=ring_counts(plan),
            idle=blocks([1.0 - busy / makespan_s for busy in busy_s]) if makespan_s > 0 else (),
            shared_cores=max(shared) > 0,
            objective=averages(result.metrics),
        )


def count_flops(model: CausalLM | ScalarHeadLM) -> ModelFlops:
    """FLOP counts of `model`, sharded or not."""
    shape = transformer_shape(model)
    hf_model: Any = model.model
    embedding = hf_model.get_input_embeddings().weight
    if isinstance(model, ScalarHeadLM):
        head = model.score.weight
    else:
        head = hf_model.get_output_embeddings().weight
    # A tied embedding is multiplied once, as the head; an untied one is only looked up.
    others = head.numel() if embedding is head else head.numel() + embedding.numel()
    return ModelFlops(
        num_params=sum(p.numel() for p in model.parameters()) - others,
        head_params=head.numel(),
        num_layers=shape["num_layers"],
        attention_width=shape["num_heads"] * shape["head_dim"],
        is_frozen=has_lora(model),
    )


def _peak_flops(run: Run) -> float | None:
    """flop/s of one device: `--peak-tflops` if given, else the data sheet's bf16 peak."""
    if run.config.peak_tflops is not None:
        return run.config.peak_tflops * 1e12
    device = run.mesh.device
    if device.type != "cuda" or run.config.dtype not in ("auto", "bf16"):
        return None
    return peak_flops(torch.cuda.get_device_name(device))


def planned_bubble(plan: StepPlan, run: Run) -> float:
    """The bubble the planner expects: 1 - compute / (ranks * predicted time)."""
    compute_s = float(microbatch_times(plan, run.cost).compute_s.sum())
    available_s = plan.hdp_size * plan.predicted_s
    return max(1.0 - compute_s / available_s, 0.0) if available_s > 0 else 0.0  # not -0.0 %


def write_trace(run: Run, step: int, batch: StepBatch) -> Path | None:
    """Write `timeline_STEP.json` (Perfetto) and `timeline_STEP.png`: planned above measured; and
    `trace_STEP.json`, which `hdp report` draws.

    Collective: each rank contributes its measured spans. Returns the picture's path on rank 0. A
    full disk and a missing matplotlib are reported, not raised.
    """
    by_rank: list[list[Span]] = [[] for _ in range(run.mesh.hdp_size)]
    dist.all_gather_object(by_rank, run.context.recorder.spans(), group=run.mesh.hdp_group)
    if not run.is_main:
        return None
    measured = Timeline.measured((span for spans in by_rank for span in spans), batch.plan)
    planned = simulate(batch.plan, run.cost)
    trace = Path(run.config.run_dir) / f"timeline_{step}.json"
    picture = trace.with_suffix(".png")
    record = Trace(
        step=step,
        plan=batch.plan,
        seq_ids=batch.seq_ids,
        names=[run.dataset.name(number) for number in batch.seq_ids.tolist()],
        cost=run.cost,
        planned=planned,
        measured=measured,
    )
    try:
        trace.with_name(f"trace_{step}.json").write_text(record.to_json(), encoding="ascii")
        planned.to_perfetto(trace, others=[measured])
        draw_plans(
            [("planned", batch.plan, planned), ("measured", batch.plan, measured)],
            picture,
            cost=run.cost,
            title=f"step {step}",
        )
        run.say(f"wrote {trace} and .png; `hdp report {run.config.run_dir}` shows them in a page")
        return picture
    except (OSError, ValueError) as error:  # ValueError: matplotlib is not installed
        run.say(f"cannot write the timelines of step {step}: {error}; training continues")
        return None


def _memory_bytes(device: torch.device) -> int:
    """Peak memory so far: allocated on the GPU, or this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
