"""Host memory: how much is available, and which of it is near a device."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

_CGROUP = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60  # cgroup v1 writes a huge number for "no limit"


def available_host_bytes(root: Path = Path("/")) -> int:
    """Bytes that all processes together can take without swapping or being killed."""
    limits = [_meminfo(root)]
    for usage, limit, reclaimable in (
        ("memory.current", "memory.max", "inactive_file"),
        ("memory/memory.usage_in_bytes", "memory/memory.limit_in_bytes", "total_inactive_file"),
    ):
        group = root / _CGROUP.relative_to("/")
        most, used = _number(group / limit), _number(group / usage)
        if most is None or used is None or most > _UNLIMITED:
            continue
        stat = (group / limit).with_name("memory.stat")
        limits.append(max(most - used + _entry(stat, reclaimable), 0))
    return min(limits)


def host_bytes_per_rank() -> int:
    """This rank's share of 90% of the available bytes, by torchrun's LOCAL_WORLD_SIZE."""
    ranks = max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
    return available_host_bytes() * 9 // 10 // ranks


def cpus_near(pci_address: str, root: Path = Path("/")) -> set[int]:
    """The CPUs next to a device such as 0000:3b:00.0, from sysfs; empty if unknown."""
    path = root / "sys/bus/pci/devices" / pci_address.lower() / "local_cpulist"
    try:
        text = path.read_text().strip()
    except OSError:
        return set()
    cpus: set[int] = set()
    for part in text.split(","):  # 0-15,32-47
        first, _, last = part.partition("-")
        if first.isdigit():
            cpus.update(range(int(first), int(last or first) + 1))
    return cpus


def touched_pages(num_bytes: int, cpus: set[int]) -> Tensor:
    """(num_bytes,) uint8, resident, in large pages if possible, on the NUMA node of `cpus`.

    Registering memory with a device costs a page fault and a driver call per page, so resident
    large pages are pinned faster. A page is placed on the NUMA node of the CPU that first touches
    it, and copies from a remote node are slower. Raises MemoryError.
    """
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux
        try:
            memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"{num_bytes} bytes of host memory: {error}") from None
        with suppress(OSError):  # a kernel without large pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        pages = torch.frombuffer(memory, dtype=torch.uint8)  # keeps `memory` alive
    else:
        pages = torch.empty(num_bytes, dtype=torch.uint8)
    with _running_on(cpus):
        pages[:: mmap.PAGESIZE].zero_()
    return pages


@contextmanager
def _running_on(cpus: set[int]) -> Iterator[None]:
    """Run this thread on `cpus`, if there are any and the process may use them."""
    if not cpus or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    with suppress(OSError):
        os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _meminfo(root: Path) -> int:
    path = root / "proc/meminfo"
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _entry(path: Path, name: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(x.split()[1]) for x in lines if x.startswith(name + " ")), 0)
