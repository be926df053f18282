"""`hdp.offload()` for any model."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from .engine import OffloadEngine, open_engine
from .memory import host_bytes_per_rank
from .types import ActivationPolicy, CopyBuffers


def offload(
    ratio: float = 1.0,
    *,
    recompute_pointwise: float = 0.0,
    recompute_matmul: float = 0.0,
    min_bytes: int = 1 << 20,
    buffers: CopyBuffers | None = None,
    engine: OffloadEngine | None = None,
) -> AbstractContextManager[Any]:
    """Offload what a model's forward saves for backward: a context around that forward.

        with hdp.offload(ratio=0.8, recompute_pointwise=1.0):
            loss = model(batch)
        loss.backward()

    ratio: share of the saved bytes to send to the host, spread evenly over the forward, in whole
        tensors. Choose as much as the link can hide: docs/offload.md. 0 sends nothing.
    recompute_pointwise: share of the results of cheap element-wise operations (norms, activations,
        casts) to recompute in backward instead. 1.0 halves what a decoder layer saves, for 1 to
        4% of its time.
    recompute_matmul: the same for matrix products. Use it if memory is short and the link is full.
    min_bytes: smaller tensors stay on the device, as do all parameters.
    buffers: device memory that hides the copies; None: the engine's.
    engine: the link and host memory to use; None: those of the current CUDA device, created on
        first use. It takes host memory as needed, up to this rank's share of the machine's.
        Without CUDA nothing is offloaded.

    Gradients are bitwise equal to those without offload. Raises OffloadMemoryError at the end of a
    forward that needed more host memory than is available.
    """
    policy = ActivationPolicy(
        ratio=ratio, recompute_pointwise=recompute_pointwise, recompute_matmul=recompute_matmul
    )
    if engine is None:
        if not torch.cuda.is_available():
            return nullcontext()
        engine = default_engine(torch.cuda.current_device())
    if not (ratio or recompute_pointwise or recompute_matmul):
        return nullcontext()
    return engine.forward(policy, buffers=buffers, min_bytes=min_bytes)


@functools.cache
def default_engine(device_index: int) -> OffloadEngine:
    """The engine that `offload` uses for a CUDA device; it lives as long as the process."""
    return open_engine(torch.device("cuda", device_index), max_bytes=host_bytes_per_rank())
