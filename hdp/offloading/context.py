"""`hdp.offload()` for any model, and the engines behind it."""

from __future__ import annotations

import functools
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch

from hdp.errors import OffloadMemoryError

from .engine import OffloadEngine
from .link import Link
from .memory import available_host_bytes, host_bytes_per_rank
from .streams import CpuStreams, CudaStreams
from .types import ActivationPolicy, CopyBuffers, text_of

_SLAB_BYTES = 512 << 20
_NUM_THREADS = 16  # that pin slabs; each is pinned once


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


def open_engine(
    device: torch.device,
    *,
    max_bytes: int,
    prefill: bool = False,
    on_full: Literal["error", "keep"] = "error",
    buffers: CopyBuffers | None = None,
) -> OffloadEngine:
    """An engine of one's own; close() gives its host memory back.

    device: a CUDA device; or the CPU, where all of the engine runs and no memory is saved.
    max_bytes: host memory that it may take.
    prefill: take all of it now, in the background, instead of when it is needed.
    on_full: "error": forwards that want more raise OffloadMemoryError; "keep": what does not fit
        stays on the device, which is said once.

    Raises OffloadMemoryError if the machine has less memory than max_bytes, unless on_full="keep".
    """
    max_bytes = _affordable(max_bytes, on_full)
    slab_bytes = min(_SLAB_BYTES, _round(max_bytes))
    is_cuda = device.type == "cuda"
    if buffers is None:
        total = 1 << 30
        if is_cuda:
            total = torch.cuda.get_device_properties(device).total_memory
        buffers = CopyBuffers.of_layer(total / 24)
    link = Link(
        CudaStreams(device) if is_cuda else CpuStreams(),
        max_bytes=max_bytes,
        slab_bytes=slab_bytes,
        num_threads=_NUM_THREADS if is_cuda else 2,
    )
    if prefill:
        link.prepare(max_bytes)
    return OffloadEngine(link, buffers=buffers, on_full=on_full)


def _affordable(max_bytes: int, on_full: str) -> int:
    if max_bytes < 1 << 16:
        raise ValueError(f"offload: max_bytes={max_bytes}, the host memory, is less than 64 KiB")
    available = available_host_bytes()
    if max_bytes <= available:
        return max_bytes
    text = (
        f"offload: a host pool of {text_of(max_bytes)} was asked for, and {text_of(available)} "
        "are available"
    )
    if on_full == "keep":
        warnings.warn(f"{text}; taking {text_of(available * 9 // 10)}")
        return available * 9 // 10
    raise OffloadMemoryError(
        f"{text}: a ratio {available / max_bytes:.2g} times as large fits, or fewer ranks per "
        "machine; on_full='keep' takes what there is"
    )


def _round(num_bytes: int) -> int:
    return max(num_bytes // (1 << 16), 1) << 16
