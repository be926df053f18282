"""OffloadEngine: moves saved tensors to the host in forward and back before backward needs them.

Copies run on two dedicated streams, ordered by events (link.py). The host never waits for the
device, so all decisions are made in program order and memory use does not depend on timing:

  1. In forward, an ActivationPolicy decides whether each saved tensor is kept, sent to the host, or
     replaced by a recipe that recomputes it: forward.py.
  2. A tensor is sent once `keep_bytes` more have been saved after it: send_queue.py.
  3. Its device memory is released once `send_bytes` more have been sent. Its copy has usually
     finished by then; if not, kernels that reuse the memory wait, the host does not: store.py.
  4. In backward, each request also fetches the tensors needed next, until `prefetch_bytes` are in
     flight or waiting: backward_order.py.
  5. After the last function that needs a tensor has run, its host memory is reused.

Invariants (each has a test of the same name in tests/offloading/):

* gradients_are_bitwise_equal   to those without offload, for any policy, buffers and copy timing
* no_race                       events order any two conflicting accesses
* nothing_leaks                 nothing is held after backward, an exception or a dropped graph
* modified_in_place_is_named    it raises as without offload, and the error names the tensor
"""

from __future__ import annotations

import warnings

import torch

from hdp.errors import OffloadFreedError, OffloadMemoryError

from .forward import Forward, Shared
from .link import Link
from .memory import available_host_bytes
from .send_queue import OnFull
from .store import Store
from .streams import CpuStreams, CudaStreams
from .types import ActivationPolicy, CopyBuffers, Counts, LinkStats, text_of

_SLAB_BYTES = 512 << 20
_NUM_THREADS = 16  # threads that pin slabs; each slab is pinned once


class OffloadEngine:
    """Moves what autograd saves over one link. One per device; any number of forwards.

    buffers: the default for forwards
    on_full: if the pool is full, "error" raises OffloadMemoryError at the end of the forward with
        what it needed; "keep" warns once and keeps tensors on the device
    """

    def __init__(self, link: Link, *, buffers: CopyBuffers, on_full: OnFull = "error") -> None:
        self.link, self.buffers = link, buffers
        self.store = Store(link)
        self._shared = Shared(store=self.store, on_full=on_full)

    @property
    def counts(self) -> Counts:
        """Bytes sent, kept and recomputed so far."""
        return self.store.counts

    def forward(
        self,
        policy: ActivationPolicy | None = None,
        *,
        buffers: CopyBuffers | None = None,
        min_bytes: int = 1 << 20,
    ) -> Forward:
        """A context manager for one forward pass. Tensors below min_bytes stay on the device."""
        if self.store.closed:
            raise OffloadFreedError("the offload engine is closed")
        policy = policy or ActivationPolicy()
        return Forward(self._shared, policy, buffers or self.buffers, min_bytes)

    def stats(self) -> LinkStats:
        """Host memory in use, and bytes copied so far."""
        with self.store.lock:
            self.store.collect()
            return self.link.stats()

    def close(self) -> None:
        """Free all host memory. A backward that still needs it raises OffloadFreedError."""
        with self.store.lock:
            self.store.close()


def open_engine(
    device: torch.device,
    *,
    max_bytes: int,
    prefill: bool = False,
    on_full: OnFull = "error",
    buffers: CopyBuffers | None = None,
) -> OffloadEngine:
    """Create your own engine; close() frees its host memory.

    device: a CUDA device, or the CPU, where the whole engine runs but saves no memory
    max_bytes: the most host memory that it may take
    prefill: allocate all of it now, in the background, instead of on demand
    on_full: "error": forwards that need more raise OffloadMemoryError; "keep": warn once and keep
        what does not fit on the device
    buffers: device memory that hides the copies; None: sized for layers that send 1/24 of the
        device's memory each

    Raises OffloadMemoryError if the machine has less memory than max_bytes, unless on_full="keep".
    """
    max_bytes = _affordable(max_bytes, on_full)
    is_cuda = device.type == "cuda"
    if buffers is None:
        total = torch.cuda.get_device_properties(device).total_memory if is_cuda else 1 << 30
        buffers = CopyBuffers.of_layer(total / 24)
    link = Link(
        CudaStreams(device) if is_cuda else CpuStreams(),
        max_bytes=max_bytes,
        slab_bytes=min(_SLAB_BYTES, max(max_bytes >> 16, 1) << 16),
        num_threads=_NUM_THREADS if is_cuda else 2,
    )
    if prefill:
        link.prepare(max_bytes)
    return OffloadEngine(link, buffers=buffers, on_full=on_full)


def _affordable(max_bytes: int, on_full: OnFull) -> int:
    if max_bytes < 1 << 16:
        raise ValueError(f"offload: max_bytes={max_bytes} of host memory must be 64 KiB or more")
    available = available_host_bytes()
    if max_bytes <= available:
        return max_bytes
    text = (
        f"offload: a host pool of {text_of(max_bytes)} was requested, but only "
        f"{text_of(available)} are available"
    )
    if on_full == "keep":
        warnings.warn(f"{text}; taking {text_of(available * 9 // 10)}")
        return available * 9 // 10
    raise OffloadMemoryError(
        f"{text}: use a ratio {available / max_bytes:.2g} times as large, or fewer ranks per "
        "machine; on_full='keep' takes what is available"
    )
