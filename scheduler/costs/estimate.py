"""Estimate a cost model without measurements, from the model's shape and the device type.

The estimate is good enough for first plans: what matters is relative sizes, which decide how wide
rings get. `hdp profile` measures the machine and writes a cost model to use instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .cost_model import CostModel

# Sustained rates of one rank. CPU: one thread of a server core, gloo over loopback, and 1.5 ms for
# each of the three transfers per layer of a ring step.
_CPU_FLOPS_PER_S = 30e9
_CPU_BYTES_PER_S = 1e9
_CPU_TRANSFER_S = 1.5e-3
_GPU_FLOPS_PER_S = 400e12
# One host link, per direction with both active: PCIe 5 x16; memcpy.
HOST_BYTES_PER_S = {"cuda": 50e9, "cpu": 5e9}


RECOMPUTE = ("none", "selective", "full")


def estimate_cost(
    shape: Mapping[str, int],
    *,
    device_type: str,
    bytes_per_element: int,
    tp_size: int = 1,
    sequence_parallel: bool = True,
    pp_size: int = 1,
    recompute: str = "none",
) -> CostModel:
    """CostModel of a decoder on one type of device, from arithmetic alone.

    With tp_size or pp_size it is the model of one device of a rank, which is a whole replica: the
    planner multiplies by the stages itself.

    shape: num_layers, hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim and
        vocab_size (`hdp.models.causal_lm.transformer_shape`)
    device_type: "cuda" or "cpu"
    bytes_per_element: of activations
    tp_size: tensor parallel size; key heads are repeated where there are fewer of them
    sequence_parallel: whether norms and residuals are divided by tp_size too
    pp_size: pipeline stages; the model is of one of them, as the planner wants it
    recompute: "none", "selective" (core attention runs twice) or "full" (each layer does)

    Raises ValueError for sizes below 1, stages that do not divide the layers, or another recompute.
    """
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute={recompute!r}; choose one of {', '.join(RECOMPUTE)}")
    for name, size in (("tp_size", tp_size), ("pp_size", pp_size)):
        if size < 1:
            raise ValueError(f"{name}={size} must be at least 1")
    # Megatron repeats key heads so that each device of the group has at least one.
    shape = {**shape, "num_kv_heads": max(shape["num_kv_heads"], tp_size)}
    sizes: dict[str, Any] = {
        "bytes_per_element": bytes_per_element,
        "tp_size": tp_size,
        "pp_size": pp_size,
    }
    if device_type == "cuda":
        cost = CostModel.from_transformer(**shape, **sizes, flops_per_s=_GPU_FLOPS_PER_S)
    else:
        cost = CostModel.from_transformer(
            **shape,
            **sizes,
            flops_per_s=_CPU_FLOPS_PER_S,
            intra_node_bytes_per_s=_CPU_BYTES_PER_S,
            inter_node_bytes_per_s=_CPU_BYTES_PER_S,
            ring_step_s=3 * _CPU_TRANSFER_S * shape["num_layers"] / pp_size,
        )
    row_bytes = shape["hidden_size"] * bytes_per_element  # of one token, whole
    if tp_size > 1 and not sequence_parallel:
        more = 4 * row_bytes * (1 - 1 / tp_size)  # the same four rows per layer on all devices
        cost = replace(
            cost,
            activation_bytes_per_token=cost.activation_bytes_per_token + cost.num_layers * more,
            temporary_bytes_per_token=cost.temporary_bytes_per_token + more,
        )
    input_bytes = row_bytes / tp_size if sequence_parallel else row_bytes
    return _recomputed(cost, recompute, input_bytes, bytes_per_element)


def _recomputed(cost: CostModel, recompute: str, input_bytes: float, b: int) -> CostModel:
    """The cost with a second forward: input_bytes is a layer's input, b the bytes of an element."""
    if recompute == "none":
        return cost
    # One forward more: attention from 3.5 to 4.5 forwards and, with whole layers, matmuls from 3 to
    # 4. Keys and values travel once more, beside two times and their gradients in fp32.
    cost = replace(
        cost,
        quadratic_s=cost.quadratic_s * 4.5 / 3.5,
        kv_bytes_per_token=cost.kv_bytes_per_token * (3 * b + 4) / (2 * b + 4),
    )
    if recompute == "selective":
        return cost
    layer_bytes = cost.activation_bytes_per_token / cost.num_layers  # of the layer that runs again
    return replace(
        cost,
        linear_s=cost.linear_s * 4 / 3,
        activation_bytes_per_token=cost.num_layers * input_bytes,
        temporary_bytes_per_token=cost.temporary_bytes_per_token + layer_bytes,
        forward_share=1 / 4,
    )
