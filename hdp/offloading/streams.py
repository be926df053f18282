"""Streams: the device interface for moving memory.

Three streams matter: the caller's (kernels run there), OUT (device to host) and IN (host to
device). `link.py` orders them by events; the host never waits.

    CudaStreams    a CUDA device, through torch alone
    CpuStreams     no device: "device" and host memory are the same, and copies are synchronous.
                   The engine then saves no memory, but everything else runs: plans, pool,
                   recipes, order

tests/offloading/twin_streams.py has a third: a test double that detects missing waits.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from .memory import cpus_near, touched_pages

OUT, IN = "out", "in"

# cudaHostRegisterPortable: pinned for every context of the process
_PORTABLE = 1


class Streams(Protocol):
    """A stream is OUT, IN or a value that `current` returned."""

    device: torch.device

    def current(self) -> Any:
        """The caller's stream: kernels queued now run there."""
        ...

    def record(self, stream: Any) -> Any:
        """An event that fires when everything queued on `stream` so far is done."""
        ...

    def wait(self, stream: Any, event: Any) -> None:
        """Make later work on `stream` start after the event. The host does not wait."""
        ...

    def copy(self, stream: Any, dst: Tensor, src: Tensor) -> None:
        """Queue a copy of (num_bytes,) uint8, one side on the host. Keeps neither side alive."""
        ...

    def new_slab(self, num_bytes: int) -> Tensor:
        """(num_bytes,) uint8 host memory for copies. May be called from any thread."""
        ...

    def free_slab(self, slab: Tensor) -> None: ...

    def synchronize(self) -> None:
        """Return when OUT and IN are idle."""
        ...


class CpuStreams:
    """The CPU as a device: everything is synchronous, so there is nothing to wait for."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def current(self) -> None:
        return None

    def record(self, stream: Any) -> None:
        return None

    def wait(self, stream: Any, event: Any) -> None:
        pass

    def copy(self, stream: Any, dst: Tensor, src: Tensor) -> None:
        dst.copy_(src)

    def new_slab(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def free_slab(self, slab: Tensor) -> None:
        pass

    def synchronize(self) -> None:
        pass


class CudaStreams:
    """Streams of one CUDA device, from torch's streams, events and copies."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._near = cpus_near(_pci_address(device))
        self._streams = {OUT: torch.cuda.Stream(device), IN: torch.cuda.Stream(device)}

    def current(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device)

    def record(self, stream: Any) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(self._streams.get(stream, stream))
        return event

    def wait(self, stream: Any, event: torch.cuda.Event) -> None:
        self._streams.get(stream, stream).wait_event(event)

    def copy(self, stream: Any, dst: Tensor, src: Tensor) -> None:
        with torch.cuda.stream(self._streams[stream]):
            dst.copy_(src, non_blocking=True)

    def new_slab(self, num_bytes: int) -> Tensor:
        # torch's own pinned allocator rounds up to a power of two and takes 0.5 s per GiB.
        slab = touched_pages(num_bytes, self._near)
        with torch.cuda.device(self.device):
            status = torch.cuda.cudart().cudaHostRegister(slab.data_ptr(), num_bytes, _PORTABLE)
        if int(status) != 0:  # CUDA keeps its last error per thread, so it stays in this one
            raise MemoryError(f"pinning {num_bytes} bytes failed: {status}")
        return slab

    def free_slab(self, slab: Tensor) -> None:
        torch.cuda.cudart().cudaHostUnregister(slab.data_ptr())

    def synchronize(self) -> None:
        for stream in self._streams.values():
            stream.synchronize()


def _pci_address(device: torch.device) -> str:
    """The PCI address in sysfs form, or "" if this torch does not report it."""
    found = torch.cuda.get_device_properties(device)
    parts = [getattr(found, f"pci_{part}_id", -1) for part in ("domain", "bus", "device")]
    return "" if -1 in parts else "{:04x}:{:02x}:{:02x}.0".format(*parts)
