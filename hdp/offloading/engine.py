"""OffloadEngine: what autograd saves in forward leaves the device and is back when backward asks.

Copies run on two streams of their own and are ordered by events (link.py); the host never waits for
the device, and so every decision is made in program order and memory does not depend on timing:

  1. In forward, each saved tensor is kept, sent to the host, or replaced by a recipe that
     recomputes it: forward.py, by an ActivationPolicy.
  2. A tensor is sent once `keep_bytes` more were saved after it: send_queue.py.
  3. Its device memory is let go when `send_bytes` more were sent: by then its copy has usually
     left; where it has not, the kernels that would reuse it wait, the host does not: store.py.
  4. In backward, whenever a tensor is asked for, those that come next are fetched until
     `prefetch_bytes` are on their way or waiting: backward_order.py.
  5. When the last function that needs a tensor has run, its host memory is free for the next one.

Invariants (each has a test of the same name in tests/offloading/):

* gradients_are_bitwise_equal   to those without offload, for any policy, buffers and copy timing
* no_race                       every two conflicting accesses are ordered by events
* nothing_leaks                 after backward, an exception or a dropped graph nothing is held
* modified_in_place_is_named    as without offload, and with the tensor's name
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
_NUM_THREADS = 16  # that pin slabs; each is pinned once


class OffloadEngine:
    """Moves what autograd saves over one link. One per device; any number of forwards.

    buffers: of forwards that are not given others
    on_full: when the pool is full, "error" raises OffloadMemoryError at the end of the forward with
        what would have been needed; "keep" says so once and keeps tensors on the device
    """

    def __init__(self, link: Link, *, buffers: CopyBuffers, on_full: OnFull = "error") -> None:
        self.link, self.buffers = link, buffers
        self.store = Store(link)
        self._shared = Shared(store=self.store, on_full=on_full)

    @property
    def counts(self) -> Counts:
        """Bytes so far, by what happened to them."""
        return self.store.counts

    def forward(
        self,
        policy: ActivationPolicy | None = None,
        *,
        buffers: CopyBuffers | None = None,
        min_bytes: int = 1 << 20,
    ) -> Forward:
        """Context manager around one forward pass. Tensors below min_bytes stay."""
        if self.store.closed:
            raise OffloadFreedError("the offload engine is closed")
        policy = policy or ActivationPolicy()
        return Forward(self._shared, policy, buffers or self.buffers, min_bytes)

    def stats(self) -> LinkStats:
        """What the link holds and has moved."""
        with self.store.lock:
            self.store.collect()
            return self.link.stats()

    def close(self) -> None:
        """Give all host memory back. A backward that still needs it raises OffloadFreedError."""
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
    """An engine of one's own; close() gives its host memory back.

    device: a CUDA device; or the CPU, where all of the engine runs and no memory is saved
    max_bytes: host memory that it may take
    prefill: take all of it now, in the background, instead of when it is needed
    on_full: "error": forwards that want more raise OffloadMemoryError; "keep": what does not fit
        stays on the device, which is said once
    buffers: device memory that hides the copies; None: for layers that send a 24th of the device

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
