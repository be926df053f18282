"""--max-tokens-per-rank auto: the tokens that fit into this machine's memory, by arithmetic.

The model is built on the meta device for its shape and parameter count; free memory is asked of the
device before the model is there; `rank_memory` (hdp/scheduler/costs/memory.py) does the rest. All
ranks use the least of their results: they plan the same steps.

Losses and gradients do not depend on the number; only speed and memory do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from hdp import console
from hdp.config import DEMO_MODEL, TrainConfig
from hdp.distributed.mesh import HDPMesh
from hdp.models.causal_lm import CausalLM, transformer_shape
from hdp.models.loading import build_model
from hdp.offloading.memory import host_bytes_per_rank
from hdp.scheduler.costs.memory import RankMemory, rank_memory

from .model_setup import compute_dtype

CPU_TOKENS = 16384  # a CPU takes half a minute for as many, so more would only make steps coarser
_CPU_RESERVE_BYTES = 2**28  # 10 % of the memory is already set aside


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What is known of a model without its weights."""

    shape: dict[str, int]
    num_params: int
    unit_params: int  # of the two largest FSDP units: layers, or everything else


def model_facts(config: TrainConfig, *, vocab_size: int) -> ModelFacts:
    """Shape and size of the model that `config` names, from its config alone.

    Raises ValueError for a model that cannot be trained.
    """
    entries = {**DEMO_MODEL, "vocab_size": vocab_size}
    model = build_model(
        entries if config.model == "demo" else config.model,
        skeleton=True,
        config_overrides=config.model_entries,
    )
    return facts_of(model)


def facts_of(model: CausalLM) -> ModelFacts:
    """Shape and size of a model, before sharding."""
    layers = [sum(p.numel() for p in layer.parameters()) for layer in model.layers]
    total = sum(p.numel() for p in model.parameters())
    return ModelFacts(
        shape=transformer_shape(model),
        num_params=total,
        unit_params=sum(sorted([*layers, total - sum(layers)])[-2:]),
    )


def memory_of(
    config: TrainConfig, facts: ModelFacts, *, ranks: int, device: torch.device
) -> RankMemory:
    """The memory of one rank of the run."""
    dtype = compute_dtype(config, device)
    return rank_memory(
        facts.shape,
        num_params=facts.num_params,
        unit_params=facts.unit_params,
        ranks=ranks,
        compute_bytes=dtype.itemsize,
        master_bytes=max(4, dtype.itemsize),
        checkpointing=config.activation_checkpointing,
        ema=bool(config.ema_decay),
        device_type=device.type,
    )


def free_bytes(device: torch.device) -> tuple[float, float | None]:
    """(free memory of this rank, reserve or None for the default)."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0]), None
    return float(host_bytes_per_rank()), float(_CPU_RESERVE_BYTES)


def fit_tokens_per_rank(config: TrainConfig, mesh: HDPMesh, *, vocab_size: int) -> TrainConfig:
    """The configuration with a number for `auto`; rank 0 prints the arithmetic. Collective.

    Raises ValueError on all ranks if not even one token fits on some rank.
    """
    facts = model_facts(config, vocab_size=vocab_size)
    memory = memory_of(config, facts, ranks=mesh.hdp_size, device=mesh.device)
    available, reserve = free_bytes(mesh.device)
    mine = torch.tensor([available], dtype=torch.float64, device=mesh.device)
    dist.all_reduce(mine, op=dist.ReduceOp.MIN, group=mesh.hdp_group)
    least = float(mine.item())
    tokens = tokens_that_fit(memory, least, reserve=reserve, device=mesh.device)
    if mesh.hdp_rank == 0:
        for line in describe_fit(memory, least, tokens, reserve=reserve, device=mesh.device):
            console.note(line)
    return replace(config, max_tokens_per_rank=tokens)


def tokens_that_fit(
    memory: RankMemory, available: float, *, reserve: float | None, device: torch.device
) -> int:
    """Tokens per rank, capped on a CPU. Raises ValueError with the remedy if nothing fits."""
    tokens = memory.max_tokens(available, reserve=reserve)
    if tokens < 1:
        short = memory.total_bytes(1) - available
        raise ValueError(
            f"--max-tokens-per-rank auto: a rank needs {memory.total_bytes(1) / 2**30:.1f} GiB "
            f"before any token, and {available / 2**30:.1f} GiB are free "
            f"({max(short, 0) / 2**30:.1f} GiB short, and a reserve): use more ranks or a smaller "
            "model, or free memory\n" + memory.table(available, 0, reserve=reserve)
        )
    return min(tokens, CPU_TOKENS) if device.type == "cpu" else tokens


def describe_fit(
    memory: RankMemory,
    available: float,
    tokens: int,
    *,
    reserve: float | None,
    device: torch.device,
) -> list[str]:
    """The arithmetic, for the log."""
    capped = device.type == "cpu" and tokens == CPU_TOKENS
    note = f" (at most {CPU_TOKENS:,} on a CPU)" if capped else ""
    lines = memory.table(available, tokens, reserve=reserve).splitlines()
    return [f"--max-tokens-per-rank auto: {tokens:,}{note}", *lines]
