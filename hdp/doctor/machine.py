"""Facts about the current machine, for `hdp doctor` and for the header of a benchmark.

It must work on broken machines, so a probe never raises: it returns its findings or {"error":
reason}. Nothing optional is imported (versions come from package metadata), and torch is queried in
a child process with a time limit, because CUDA initialization hangs or crashes with a bad driver.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

TORCH_TIMEOUT_S = 120.0
SMI_TIMEOUT_S = 20.0
_HEAD_DIM = 128  # most models' head size; the choice of attention kernel depends on it

# Packages that hdp can use: (label, distribution names, purpose).
PACKAGES = (
    ("transformers", ("transformers",), "models"),
    ("datasets", ("datasets",), "JSONL, Parquet and hub data"),
    ("tokenizers", ("tokenizers",), "tokenizers trained on the data"),
    ("tyro", ("tyro",), "flags of `hdp train`"),
    ("rich", ("rich",), "tables on the console"),
    ("tensorboard", ("tensorboard",), "curves of a run"),
    ("matplotlib", ("matplotlib",), "plots of a plan"),
    ("flash-attn 2", ("flash-attn",), "attention on NVIDIA GPUs"),
    ("flash-attn 3", ("flash-attn-3", "flash-attn-interface"), "attention on Hopper"),
    ("flash-attn 4", ("flash-attn-4",), "attention on Hopper and Blackwell"),
    ("transformer-engine", ("transformer-engine",), "fused attention and optimizer"),
    ("apex", ("apex",), "fused AdamW"),
    ("liger-kernel", ("liger-kernel",), "fused layers and losses"),
    ("megatron-core", ("megatron-core",), "our planner in Megatron"),
    ("triton", ("triton",), "torch.compile on GPUs"),
)


def machine_facts() -> dict[str, Any]:
    """All facts that this module can find, ready for JSON."""
    return {
        "hdp": probe(_hdp),
        "python": probe(_python),
        "host": probe(_host),
        "torch": probe(_torch),
        "nvidia": probe(_nvidia),
        "interconnect": probe(_interconnect),
        "packages": probe(_packages),
    }


def probe(fact: Callable[[], Any]) -> Any:
    """`fact()`, or {"error": reason} if it raises, so that one failure does not hide the rest."""
    try:
        return fact()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _hdp() -> dict[str, Any]:
    from hdp import __version__

    return {"version": __version__, "path": str(Path(__file__).parent.parent)}


def _python() -> dict[str, Any]:
    return {
        "version": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
    }


def _host() -> dict[str, Any]:
    """Cores and memory that this process may use, including a container's limits."""
    meminfo = {
        line.split(":")[0]: int(line.split()[1]) * 1024
        for line in (_read("/proc/meminfo") or "").splitlines()
        if line.endswith("kB")
    }
    shm = probe(lambda: os.statvfs("/dev/shm"))
    return {
        "cpu": cpu_name(),
        "cores": probe(_usable_cores),
        "memory_bytes": meminfo.get("MemTotal"),
        "memory_available_bytes": meminfo.get("MemAvailable"),
        "memory_limit_bytes": _cgroup_memory_limit(),
        "locked_memory_limit_bytes": probe(_locked_memory_limit),
        "shm_bytes": None if isinstance(shm, dict) else shm.f_blocks * shm.f_frsize,
    }


def cpu_name() -> str:
    """The processor's model name, if the system reveals it."""
    models = [
        line.split(":", 1)[1].strip()
        for line in (_read("/proc/cpuinfo") or "").splitlines()
        if line.startswith("model name")
    ]
    return models[0] if models else platform.processor() or platform.machine()


def _usable_cores() -> float:
    """Cores by CPU affinity or by the container's quota, whichever is less."""
    cores: float = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    quota, _, period = (_read("/sys/fs/cgroup/cpu.max") or "max").partition(" ")
    if quota != "max" and period:
        cores = min(cores, int(quota) / int(period))
    return cores


def _cgroup_memory_limit() -> int | None:
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = _read(path)
        if text and text.isdigit() and int(text) < 1 << 60:
            return int(text)
    return None


def _locked_memory_limit() -> int | None:
    """RLIMIT_MEMLOCK; None: unlimited."""
    import resource

    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def _torch() -> dict[str, Any]:
    """`torch_facts()`, from a child process with the same import path."""
    if _version("torch") is None:
        return {"error": "torch is not installed: pip install 'torch>=2.9'"}
    code = (
        "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
        "from hdp.doctor.machine import torch_facts; print(json.dumps(torch_facts()))"
    )
    try:
        child = subprocess.run(
            # -I: a json.py in the current folder is not run.
            [sys.executable, "-I", "-c", code, json.dumps(sys.path)],
            capture_output=True,
            text=True,
            timeout=TORCH_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"importing torch and querying CUDA hung for {TORCH_TIMEOUT_S:.0f} s"}
    if child.returncode:
        lines = child.stderr.strip().splitlines() or ["no message"]
        return {"error": f"querying torch failed with exit code {child.returncode}: {lines[-1]}"}
    return json.loads(child.stdout.splitlines()[-1])


def torch_facts() -> dict[str, Any]:
    """What torch reports about itself and the devices. Imports torch: `_torch` uses a child."""
    import torch
    import torch.distributed as dist

    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    peers = [
        torch.cuda.can_device_access_peer(a, b)
        for a in range(num_gpus)
        for b in range(num_gpus)
        if a != b
    ]
    return {
        "version": torch.__version__,
        "version_info": [int(part) for part in torch.__version__.split("+")[0].split(".")[:2]],
        "cuda": torch.version.cuda,
        "cudnn": probe(torch.backends.cudnn.version) if num_gpus else None,
        "nccl": probe(lambda: ".".join(map(str, torch.cuda.nccl.version()))) if num_gpus else None,
        "collectives": [
            name for name in ("gloo", "nccl", "mpi", "ucc") if dist.is_backend_available(name)
        ],
        "threads": torch.get_num_threads(),
        "gpus": [probe(partial(_gpu, i)) for i in range(num_gpus)],
        "peer_access": all(peers),
        "attention": probe(lambda: _attention("cuda" if num_gpus else "cpu")),
        "ops": probe(lambda: _ops("cuda" if num_gpus else "cpu")),
    }


def _gpu(index: int) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "memory_free_bytes": probe(lambda: torch.cuda.mem_get_info(index)[0]),
    }


def _attention(device: str) -> dict[str, dict[str, str]]:
    """The block kernel for each dtype, as selected by the runtime's own code."""
    import torch

    from hdp.attention.kernels import choose_kernel

    chosen = {
        name: choose_kernel(torch.device(device), dtype, head_dim=_HEAD_DIM)
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
    }
    return {
        name: {"choice": choice.kernel.name, "why": choice.why} for name, choice in chosen.items()
    }


def _ops(device: str) -> dict[str, str]:
    """Whether the native ops of csrc/ are used, according to the runtime's own code."""
    from hdp.ops.native import describe

    return dict(zip(("choice", "why"), describe(device), strict=True))


def _nvidia() -> dict[str, Any]:
    """The driver's own view, independent of torch."""
    fields = "name,driver_version,memory.total,pcie.link.gen.max,pcie.link.width.max"
    if shutil.which("nvidia-smi") is None:
        return {"error": "no NVIDIA driver (nvidia-smi is not on PATH)", "gpus": []}
    rows = _run(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"])
    gpus = [
        dict(zip(fields.split(","), (part.strip() for part in row.split(",")), strict=True))
        for row in rows.splitlines()
    ]
    topology = probe(lambda: _run(["nvidia-smi", "topo", "-m"])) if len(gpus) > 1 else None
    return {"gpus": gpus, "topology": topology}


def _interconnect() -> dict[str, Any]:
    """InfiniBand/RoCE ports and network interfaces that are up, from /sys."""
    ports = [
        {
            "port": f"{port.parent.parent.name}/{port.name}",
            "state": (_read(port / "state") or "?").split(":")[-1].strip(),
            "rate": _read(port / "rate") or "?",
            "link_layer": _read(port / "link_layer") or "?",
        }
        for port in sorted(Path("/sys/class/infiniband").glob("*/ports/*"))
    ]
    networks = [
        {"name": nic.name, "mbit_s": int(speed) if speed and speed.isdigit() else None}
        for nic in sorted(Path("/sys/class/net").glob("*"))
        if nic.name != "lo" and _read(nic / "operstate") in ("up", "unknown")
        for speed in [_read(nic / "speed")]
    ]
    return {"rdma_ports": ports, "networks": networks}


def _packages() -> dict[str, dict[str, str | None]]:
    return {
        label: {
            "version": next(filter(None, map(_version, names)), None),
            "for": purpose,
        }
        for label, names, purpose in PACKAGES
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except Exception:  # not installed, or broken metadata, which amounts to the same
        return None


def _read(path: str | Path) -> str | None:
    try:
        return Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


def _run(command: list[str]) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=SMI_TIMEOUT_S, check=True
    )
    return done.stdout.strip()
