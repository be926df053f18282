"""`hdp doctor`: what this machine has, and which back ends a run on it would use, and why.

    hdp doctor            aligned text, warnings last
    hdp doctor --json     the same for scripts; `warnings` is a list of strings
    hdp doctor --build    compile the native ops into this installation (docs/native.md)

The report must never fail, least of all on a broken machine: the facts come from the probes of
`hdp/doctor/machine.py`, and conclusions from them are drawn inside probes too. If torch is missing,
the report says so.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any

from hdp.csrc.build import MODES
from hdp.csrc.build import main as build_csrc
from hdp.installation import pip_install

from .machine import machine_facts, probe

TORCH_MINIMUM = (2, 9)
GIB = 1 << 30
Rows = list[tuple[str, str]]  # (name, value), the lines of a section


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; the exit code is 0 whatever was found.

    With --build, build the native ops instead; the exit code is 1 if that failed.
    """
    parser = argparse.ArgumentParser(
        prog="hdp doctor", description="Show what this machine has and what a run would use."
    )
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.add_argument(
        "--build", action="store_true", help="compile the native ops (csrc) into this installation"
    )
    parser.add_argument("--mode", choices=MODES, help="for --build: what to compile (auto)")
    args = parser.parse_args(argv)
    if args.build:
        return build_csrc(["--mode", args.mode] if args.mode else [])
    if args.mode:
        parser.error(f"--mode {args.mode} goes with --build")
    report = collect()
    print(json.dumps(report, indent=2) if args.json else render(report))
    return 0


def collect() -> dict[str, Any]:
    """The machine's facts, the chosen back ends and the warnings, ready for JSON."""
    report = machine_facts()
    report["backends"] = probe(lambda: choose_backends(report))
    report["warnings"] = probe(lambda: find_warnings(report))
    return report


# ---- conclusions ----


def choose_backends(report: dict[str, Any]) -> dict[str, dict[str, str]]:
    """{part: {"choice", "why"}}: what a run would use."""
    torch = report["torch"]
    has = {name for name, package in report["packages"].items() if package.get("version")}
    chosen = {"planner": ("numpy", "the only dependency of hdp.scheduler")}
    if "error" in torch:
        chosen["device"] = ("none", f"{torch['error']}; planning and simulation work")
    else:
        chosen |= _torch_backends(torch)
        others = [name for name in ("apex", "transformer-engine") if name in has]
        flags = "".join(f", --optimizer {name.replace('-', '_')}" for name in others)
        chosen["optimizer"] = ("torch fused AdamW", "one kernel per update" + flags)
        if torch["gpus"]:
            chosen["layers"] = (
                ("Liger", "--liger auto, for supported models")
                if "liger-kernel" in has
                else ("transformers", f"Liger's kernels: {pip_install('gpu')}")
            )
    if "transformers" in has:
        chosen["models"] = ("transformers", "unmodified, attention registered as 'hdp'")
    else:
        chosen["models"] = ("none", f"Hugging Face models need: {pip_install('hf')}")
    return {part: {"choice": choice, "why": why} for part, (choice, why) in chosen.items()}


def _torch_backends(torch: dict[str, Any]) -> dict[str, tuple[str, str]]:
    if num_gpus := len(torch["gpus"]):
        device = (f"cuda x {num_gpus}", "visible to torch")
        wanted, why = "nccl", "on GPUs"
    else:
        device = ("cpu", "torch sees no GPU" if torch["cuda"] else "this torch is a CPU build")
        wanted, why = "gloo", "on CPU"
    if wanted not in torch["collectives"]:
        wanted, why = "none", f"this torch was built without {wanted}"
    chosen = {"device": device, "collectives": (wanted, why)}
    if ops := torch.get("ops"):
        chosen["ops"] = (ops.get("choice", "none"), ops.get("why") or ops["error"])
    if "error" in torch["attention"]:
        return chosen | {"attention": ("none", torch["attention"]["error"])}
    for dtype, kernel in torch["attention"].items():
        chosen[f"attention {dtype}"] = (kernel["choice"], kernel["why"])
    return chosen


def find_warnings(report: dict[str, Any]) -> list[str]:
    """Likely problems, each with its remedy."""
    torch, nvidia, host = report["torch"], report["nvidia"], report["host"]
    found = []
    if "error" in torch:
        found.append(torch["error"])
    else:
        if tuple(torch["version_info"]) < TORCH_MINIMUM:
            found.append(f"torch {torch['version']} is older than 2.9: pip install 'torch>=2.9'")
        driver_gpus = len(nvidia.get("gpus", []))
        if driver_gpus and not torch["gpus"]:
            build = f"for CUDA {torch['cuda']}" if torch["cuda"] else "a CPU build"
            found.append(
                f"the driver has {driver_gpus} GPUs, but torch sees none (it is {build}): install "
                "a torch that matches the driver, and check CUDA_VISIBLE_DEVICES"
            )
        if len(torch["gpus"]) > 1 and not torch["peer_access"]:
            found.append(
                "GPUs cannot access each other's memory, so rings go through the host: "
                "see nvidia-smi topo -p2p r"
            )
    if len(nvidia.get("gpus", [])) > 1 and (host.get("shm_bytes") or GIB) < GIB:
        found.append(
            f"/dev/shm has {_size(host['shm_bytes'])}, but NCCL needs about 1 GiB: "
            "docker run --shm-size=8g"
        )
    if host.get("locked_memory_limit_bytes") and report["interconnect"].get("rdma_ports"):
        found.append(
            f"locked memory is limited to {_size(host['locked_memory_limit_bytes'])}, but RDMA "
            "needs more: ulimit -l unlimited"
        )
    return found


# ---- text ----


def render(report: dict[str, Any]) -> str:
    """The report as aligned text: facts, back ends, warnings."""
    lines: list[str] = []

    def section(title: str, rows: list[tuple[str, str]]) -> None:
        width = max((len(name) for name, _ in rows), default=0)
        lines.extend(["", title, *(f"  {name:<{width}}  {value}".rstrip() for name, value in rows)])

    section(f"hdp {report['hdp'].get('version', '?')}", _probe_rows(report, _machine_rows))
    section("GPUs and interconnect", _probe_rows(report, _device_rows))
    section("packages", _probe_rows(report, _package_rows))
    section("a run here would use", _probe_rows(report, _backend_rows))
    warnings = report["warnings"]
    if isinstance(warnings, dict):
        warnings = [f"could not check the machine: {warnings['error']}"]
    section("warnings", [("!", text) for text in warnings] or [("none", "")])
    return "\n".join(lines[1:])


def _probe_rows(report: dict[str, Any], rows: Callable[[dict[str, Any]], Rows]) -> Rows:
    """`rows(report)`, or one row with the error if it raises."""
    result = probe(lambda: rows(report))
    return result if isinstance(result, list) else [("error", result["error"])]


def _machine_rows(report: dict[str, Any]) -> Rows:
    python, host, torch = report["python"], report["host"], report["torch"]
    memory = (
        f"{_size(host.get('memory_available_bytes'))} of {_size(host.get('memory_bytes'))} free"
    )
    if host.get("memory_limit_bytes"):
        memory += f", limited to {_size(host['memory_limit_bytes'])} in this container"
    rows = [
        ("python", f"{python.get('version')}  {python.get('executable')}"),
        ("platform", f"{python.get('platform')}"),
        ("cpu", f"{host.get('cores')} cores usable, {host.get('cpu')}"),
        ("memory", memory),
        ("/dev/shm", _size(host.get("shm_bytes"))),
    ]
    if "error" in torch:
        return [*rows, ("torch", torch["error"])]
    build = f"CUDA {torch['cuda']}" if torch["cuda"] else "CPU build"
    extra = "".join(f", {name} {torch[name]}" for name in ("cudnn", "nccl") if torch[name])
    return [
        *rows,
        ("torch", f"{torch['version']}, {build}{extra}, {torch['threads']} threads"),
        ("collectives", ", ".join(torch["collectives"]) or "none"),
    ]


def _device_rows(report: dict[str, Any]) -> Rows:
    torch, nvidia, links = report["torch"], report["nvidia"], report["interconnect"]
    rows: Rows = []
    for index, gpu in enumerate(torch.get("gpus", [])):
        rows.append(
            (
                f"gpu {index}",
                gpu.get("error")
                or f"{gpu['name']}, sm {gpu['compute_capability']}, {gpu['multiprocessors']} SMs, "
                f"{_size(gpu['memory_free_bytes'])} of {_size(gpu['memory_bytes'])} free",
            )
        )
    for gpu in nvidia.get("gpus", [])[:1]:
        rows.append(
            (
                "driver",
                f"{gpu['driver_version']}, host link PCIe {gpu['pcie.link.gen.max']} "
                f"x{gpu['pcie.link.width.max']}",
            )
        )
    if "error" in nvidia:
        rows.append(("driver", nvidia["error"]))
    if len(torch.get("gpus", [])) > 1:
        rows.append(("peer access", "all pairs" if torch["peer_access"] else "not all pairs"))
    if isinstance(nvidia.get("topology"), str):
        rows.extend(("topology", line) for line in nvidia["topology"].splitlines() if line.strip())
    for port in links.get("rdma_ports", []):
        rows.append(("rdma", f"{port['port']} {port['link_layer']} {port['rate']} {port['state']}"))
    for nic in links.get("networks", []):
        speed = f"{nic['mbit_s'] / 1000:g} Gbit/s" if (nic["mbit_s"] or 0) > 0 else "speed unknown"
        rows.append(("network", f"{nic['name']} {speed}"))
    return rows or [("none", "")]


def _package_rows(report: dict[str, Any]) -> Rows:
    return [
        (name, f"{package['version'] or '-':<12} {package['for']}")
        for name, package in report["packages"].items()
    ]


def _backend_rows(report: dict[str, Any]) -> Rows:
    width = max(len(backend["choice"]) for backend in report["backends"].values())
    return [
        (part, f"{backend['choice']:<{width}}  {backend['why']}")
        for part, backend in report["backends"].items()
    ]


def _size(num_bytes: Any) -> str:
    return f"{num_bytes / GIB:.1f} GiB" if isinstance(num_bytes, (int, float)) else "unknown"
