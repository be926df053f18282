"""--dry-run: everything up to the first step, on one process and without weights.

The resolved configuration goes to stdout as YAML, for `--config`; the facts go to stderr. The data
is opened (and tokenized, unless it is cached), the model is built on the meta device, so that any
size fits on any machine, and the first batch is planned for as many ranks as `--hdp-size` says.
Whatever a run refuses for its options, data or model is refused here too. The run folder is left
alone.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from hdp import console
from hdp.checkpoint.directory import committed
from hdp.config import TrainConfig
from hdp.config_file import to_yaml
from hdp.models.export_folder import check_target
from hdp.objectives import pair_units
from hdp.scheduler import CostModel, StepPlan, plan
from hdp.scheduler.costs.estimate import estimate_cost

from .capacity import ModelFacts, describe_fit, free_bytes, memory_of, model_facts, tokens_that_fit
from .data_setup import RunData, check_data_fits, describe_data, limit_demo_data, open_run_data
from .metrics import ring_counts
from .model_setup import checked_shape, compute_dtype
from .run_config import check_new_run
from .schedule import schedule_of
from .setup import longest_batch
from .task import is_paired


def dry_run(config: TrainConfig) -> None:
    """Print the resolved configuration and what a run would do, on rank 0.

    Raises ValueError for options, data or a model that a run would refuse.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    check_new_run(config)
    for folder in filter(None, (config.export_hf, config.export_ema)):
        check_target(folder)
    checked_shape(config)  # seconds; tokenizing may take hours
    ranks = config.hdp_size or int(os.environ.get("WORLD_SIZE", "1"))
    device = _device(config)
    config = limit_demo_data(config, ranks, say=True)
    data = open_run_data(config)
    epochs = config.epochs
    if epochs is not None:
        config = replace(config, steps=data.sampler.num_steps(epochs), epochs=None)
    dataset = data.training
    checked_shape(config, vocab_size=dataset.vocab_size)
    facts = model_facts(config, vocab_size=dataset.vocab_size)
    memory = memory_of(config, facts, ranks=ranks, device=device)
    is_here = device.type == "cpu" or torch.cuda.is_available()
    available, reserve = free_bytes(device) if is_here else (math.inf, None)
    lines = [
        f"{console.count(ranks, 'rank')} on {device.type}",
        f"model {config.model}: {facts.num_params / 1e6:,.1f}M parameters, compute in "
        f"{str(compute_dtype(config, device)).removeprefix('torch.')}",
    ]
    lines += [
        line for text in describe_data(config, data, epochs=epochs) for line in text.splitlines()
    ]
    if config.max_tokens_per_rank == "auto":
        if not is_here:
            raise ValueError(
                "--max-tokens-per-rank auto: no CUDA device is visible, so its memory is unknown; "
                "give a number"
            )
        tokens = tokens_that_fit(memory, available, reserve=reserve, device=device)
        lines += describe_fit(memory, available, tokens, reserve=reserve, device=device)
        config = replace(config, max_tokens_per_rank=tokens)
    needed = memory.total_bytes(config.tokens_per_rank)
    free = (
        f"free here: {available / 2**30:.1f} GiB" if is_here else "no CUDA device is visible here"
    )
    lines.append(
        f"memory of one rank with {config.tokens_per_rank:,} tokens: about {needed / 2**30:.1f} "
        f"GiB; {free}" + (" (too little)" if needed > available and not config.offload_gib else "")
    )
    lines += _steps(config, data, facts, device, ranks)
    lines += _folder(config)
    print(to_yaml(config, leave_out=("dry_run",)), end="", flush=True)
    for line in lines:
        console.note(line)
    console.note("dry run: nothing was trained or written to the run folder")


def _device(config: TrainConfig) -> torch.device:
    kind = config.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(kind)


def _steps(
    config: TrainConfig, data: RunData, facts: ModelFacts, device: torch.device, ranks: int
) -> list[str]:
    """The schedule and the plan of the first batch."""
    dataset, sampler = data.training, data.sampler
    lines = [_schedule_line(config)]
    if config.offload_gib:  # what fits then depends on the host's memory: a run checks it
        return lines
    check_data_fits(config, data, hdp_size=ranks)
    dtype = compute_dtype(config, device)
    if config.cost:
        cost = CostModel.find(config.cost)
    else:
        cost = estimate_cost(facts.shape, device_type=device.type, bytes_per_element=dtype.itemsize)

    def planned(seqlens: np.ndarray) -> StepPlan:
        return plan(
            seqlens,
            hdp_size=ranks,
            max_tokens_per_rank=config.tokens_per_rank,
            cost=cost,
            policy=config.policy,
            cp_size=config.cp_size,
            units=pair_units(len(seqlens)) if is_paired(config) else None,
        )

    planned(longest_batch(dataset))  # as a run does: fail now if no ring can hold it
    if data.evaluation is not None:
        planned(longest_batch(data.evaluation))
    ids = next(iter(sampler))
    first = planned(dataset.seqlens[ids])
    rings = " ".join(f"{size}x{count}" for size, count in ring_counts(first).items())
    lines.append(
        f"first batch: {console.count(len(ids), 'sequence')}, {int(first.seqlens.sum()):,} tokens "
        f"on rings {rings} (ranks x sequences); planned {first.predicted_s:.3g} s, at least "
        f"{first.lower_bound_s:.3g} s"
    )
    return lines


def _schedule_line(config: TrainConfig) -> str:
    """The learning rate at the steps where it turns, and at the last one."""
    schedule = schedule_of(config)
    parts = [f"lr: {schedule(0):.1e} at step 1"]
    if config.warmup_steps >= config.steps:
        parts.append(
            f"the warm-up is longer than the run: {console.count(config.warmup_steps, 'step')} "
            f"of {config.steps:,}"
            if config.warmup_steps > config.steps
            else "the warm-up takes the whole run"
        )
    else:
        if config.warmup_steps:
            parts.append(f"{config.lr:.1e} at step {config.warmup_steps + 1}")
        parts.append(config.schedule)
        if config.schedule != "constant":
            parts.append(f"from step {schedule.decay_start + 1} on down to {schedule.min_lr:.1e}")
    if config.steps > 1:
        parts.append(f"{schedule(config.steps - 1):.1e} at the last step")
    return ", ".join(parts)


def _folder(config: TrainConfig) -> list[str]:
    """Where the run would start, and whether the step to trace would come."""
    found = committed(Path(config.run_dir) / "checkpoints")
    lines, first = [f"{config.run_dir}: no checkpoint, so the run starts from step 1"], 1
    if found:
        lines = [f"{config.run_dir}: the run would resume from {found[-1].name}"]
        first = int(found[-1].name.rpartition("-")[2]) + 1
    traced = config.trace_step
    if traced is not None and not first <= traced <= config.steps:
        trained = f"trains steps {first} to {config.steps}"
        if first > config.steps:
            trained = f"has no steps left ({config.steps} of {config.steps} are done)"
        lines.append(f"--trace-step {traced}: the run {trained}, so nothing would be traced")
    return lines
