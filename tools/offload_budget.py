"""What tools/bench_offload.py asks of the engine and the planner: engines, budgets, policies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from decoder_layers import Shape

from hdp.offloading.engine import OffloadEngine, open_engine
from hdp.offloading.link import Link
from hdp.offloading.memory import available_host_bytes
from hdp.offloading.streams import CpuStreams
from hdp.offloading.types import CopyBuffers
from hdp.scheduler import CostModel
from hdp.scheduler.costs.activation_plan import (
    ActivationPlan,
    SavedClass,
    decoder_classes,
    plan_activations,
)

MATMUL_FLOPS_PER_S = 799e12  # H200, for what a product costs to recompute
ATTENTION_FLOPS_PER_S = 600e12
ELEMENT_BYTES = 2  # bf16


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Device memory for what a forward saves, in bytes, of so many tokens and layers."""

    tokens: int
    num_layers: int
    device_bytes: float

    @classmethod
    def of_recompute(cls, shape: Shape, tokens: int, num_layers: int) -> Budget:
        """What activation checkpoints hold at most: each layer's input, and all of one layer."""
        inputs = num_layers * tokens * shape.hidden_size * ELEMENT_BYTES
        layer = saved_bytes(shape, tokens, 1) - inputs / num_layers
        return cls(tokens=tokens, num_layers=num_layers, device_bytes=inputs + layer)


def classes_of(shape: Shape, num_layers: int) -> list[SavedClass]:
    """The classes of tensors that tools/decoder_layers.py saves; see the planner's module."""
    sizes = {
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_heads": shape.num_heads,
        "num_kv_heads": shape.num_kv_heads,
    }
    cost = CostModel.from_transformer(
        num_layers=num_layers,
        vocab_size=1,
        flops_per_s=MATMUL_FLOPS_PER_S,
        attention_flops_per_s=ATTENTION_FLOPS_PER_S,
        **sizes,
    )
    return decoder_classes(cost, head_dim=shape.head_dim, eager_norms=False, **sizes)


def saved_bytes(shape: Shape, tokens: int, num_layers: int) -> float:
    """What a forward of the layers saves for backward, by arithmetic."""
    return tokens * sum(c.bytes_per_token for c in classes_of(shape, num_layers))


def plan_for_memory(
    budget: Budget,
    shape: Shape,
    *,
    forward_s: float,
    backward_s: float,
    host_bytes_per_s: float,
) -> ActivationPlan:
    """The planner's policy. Raises ValueError if the budget is too small for any."""
    return plan_activations(
        classes_of(shape, budget.num_layers),
        num_tokens=budget.tokens,
        num_layers=budget.num_layers,
        forward_s=forward_s,
        backward_s=backward_s,
        device_bytes=budget.device_bytes,
        host_bytes_per_s=host_bytes_per_s,
    )


def open_bench_engine(
    device: torch.device, buffers: CopyBuffers | None, *, num_bytes: float = 64 << 20
) -> OffloadEngine:
    """On a GPU as users have it. On a CPU with slabs of about a hundredth of num_bytes, as 512 MiB
    are of a pool of 50 GiB."""
    if device.type == "cuda":
        most = available_host_bytes() * 9 // 10
        return open_engine(device, max_bytes=most, buffers=buffers)
    sizes = {"max_bytes": 1 << 30, "slab_bytes": max(int(num_bytes) // 100 >> 16, 1) << 16}
    link = Link(CpuStreams(), num_threads=2, **sizes)
    return OffloadEngine(link, buffers=buffers or CopyBuffers.of_layer(100_000))
