"""Estimate a cost model without measurements, from the model's shape and the device type.

The estimate is good enough for first plans: what matters is relative sizes, which decide how wide
rings get. `hdp profile` measures the machine and writes a cost model to use instead.
"""

from __future__ import annotations

from collections.abc import Mapping

from .cost_model import CostModel

# Sustained rates of one rank. CPU: one thread of a server core, gloo over loopback, and 1.5 ms for
# each of the three transfers per layer of a ring step.
_CPU_FLOPS_PER_S = 30e9
_CPU_BYTES_PER_S = 1e9
_CPU_TRANSFER_S = 1.5e-3
_GPU_FLOPS_PER_S = 400e12
# One host link, per direction with both active: PCIe 5 x16; memcpy.
HOST_BYTES_PER_S = {"cuda": 50e9, "cpu": 5e9}


def estimate_cost(
    shape: Mapping[str, int], *, device_type: str, bytes_per_element: int
) -> CostModel:
    """CostModel of a decoder on one type of device, from arithmetic alone.

    shape: num_layers, hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim and
        vocab_size (`hdp.models.causal_lm.transformer_shape`)
    device_type: "cuda" or "cpu"
    bytes_per_element: of activations
    """
    if device_type == "cuda":
        return CostModel.from_transformer(
            **shape, flops_per_s=_GPU_FLOPS_PER_S, bytes_per_element=bytes_per_element
        )
    return CostModel.from_transformer(
        **shape,
        flops_per_s=_CPU_FLOPS_PER_S,
        intra_node_bytes_per_s=_CPU_BYTES_PER_S,
        inter_node_bytes_per_s=_CPU_BYTES_PER_S,
        bytes_per_element=bytes_per_element,
        ring_step_s=3 * _CPU_TRANSFER_S * shape["num_layers"],
    )
