"""Host memory that may still be taken: the machine's, or less where a container says so."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60  # cgroup v1 writes a huge number for "no limit"


def available_host_bytes(root: Path = Path("/")) -> int:
    """Bytes that can be taken without swapping or being killed, by all processes together."""
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
    """This rank's part of 90 % of it: torchrun says how many ranks share the machine."""
    ranks = max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
    return available_host_bytes() * 9 // 10 // ranks


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
