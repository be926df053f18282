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
    """Context around a model's forward: what it saves for backward goes to the host meanwhile.

        with hdp.offload(ratio=0.8, recompute_pointwise=1.0):
            loss = model(batch)
        loss.backward()

    ratio: share of the saved bytes that goes to the host, evenly over the forward, in whole
        tensors. Choose what the link hides: docs/offload.md. 0 does nothing.
    recompute_pointwise: share of the results of cheap element-wise operations (norms, activations,
        casts) that is recomputed in backward instead. It halves what a decoder layer saves, for 1
        to 4 % of its time.
    recompute_matmul: the same for matrix products. Above 0 where memory is short and the link full.
    min_bytes: smaller tensors stay where they are. So do parameters.
    buffers: device memory that hides the copies; None: the engine's.
    engine: which link and host memory; None: the present CUDA device's, made at first use. It takes
        host memory as it needs it, up to this rank's part of what the machine has. Without CUDA
        nothing is offloaded.

    Gradients are bitwise those without offload. Raises OffloadMemoryError at the end of a forward
    that wanted more host memory than there is.
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
    """The engine of a CUDA device that `offload` uses; it lives as long as the process."""
    return open_engine(torch.device("cuda", device_index), max_bytes=host_bytes_per_rank())
