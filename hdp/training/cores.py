"""Cores: whether CPU ranks outnumber the cores that they may use.

Then the operating system runs ranks in turns. A rank that waits for a core looks as if it waited
for another rank, so the measured bubble says nothing about the plan: 9 to 18 % were seen for plans
of 0.2 %. Losses and gradients are not affected.
"""

from __future__ import annotations

import os
from pathlib import Path

from hdp.distributed.mesh import HDPMesh

_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # "QUOTA PERIOD" in microseconds, or "max PERIOD"


def usable_cores(quota: Path = _QUOTA) -> float:
    """Cores that this process may use: its affinity, or a container's limit if that is lower."""
    try:
        cores = float(len(os.sched_getaffinity(0)))
    except AttributeError:  # not on Linux
        cores = float(os.cpu_count() or 1)
    try:
        limit, period = quota.read_text().split()
        return cores if limit == "max" else min(cores, int(limit) / int(period))
    except (OSError, ValueError, ZeroDivisionError):
        return cores


def shares_cores(mesh: HDPMesh) -> bool:
    """Whether this node's ranks compute on fewer cores than ranks."""
    return mesh.device.type == "cpu" and min(mesh.ranks_per_node, mesh.hdp_size) > usable_cores()


def shared_cores_note(mesh: HDPMesh) -> str:
    """What to say of that at start-up."""
    ranks = min(mesh.ranks_per_node, mesh.hdp_size)
    return (
        f"{ranks} ranks share {usable_cores():g} CPU cores, so they run in turns: the measured "
        "bubble and idle times, marked with *, are the operating system's scheduling more than "
        "the plan's waiting"
    )
