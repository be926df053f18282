"""`hdp doctor` is accurate, and still prints a report on a broken machine."""

from __future__ import annotations

import copy
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from hdp.cli import main
from hdp.doctor import machine
from hdp.doctor import report as doctor

SECTIONS = ("hdp", "python", "host", "torch", "nvidia", "interconnect", "packages")


@pytest.fixture(scope="module")
def here() -> dict[str, Any]:
    """The real report for the machine that runs the tests."""
    return doctor.collect()


def gpu_machine(here: dict[str, Any], num_gpus: int = 8) -> dict[str, Any]:
    """The report of an imagined GPU node."""
    report = copy.deepcopy(here)
    gpu = {
        "name": "NVIDIA H200",
        "compute_capability": "9.0",
        "multiprocessors": 132,
        "memory_bytes": 139 << 30,
        "memory_free_bytes": 138 << 30,
    }
    kernel = {"choice": "torch-flash", "why": "FlashAttention-2"}
    report["torch"] = {
        "version": "2.13.0+cu130",
        "version_info": [2, 13],
        "cuda": "13.0",
        "cudnn": 91002,
        "nccl": "2.28.3",
        "collectives": ["gloo", "nccl"],
        "threads": 8,
        "gpus": [gpu] * num_gpus,
        "peer_access": True,
        "attention": {"bf16": kernel, "fp32": kernel},
    }
    pcie = {"pcie.link.gen.max": "5", "pcie.link.width.max": "16"}
    report["nvidia"] = {
        "gpus": [{"name": "NVIDIA H200", "driver_version": "580.1", **pcie}] * num_gpus,
        "topology": "GPU0 NV18",
    }
    report["host"]["shm_bytes"] = 64 << 30
    report["interconnect"] = {"rdma_ports": [], "networks": []}
    return judged(report)


def judged(report: dict[str, Any]) -> dict[str, Any]:
    report["backends"] = machine.probe(lambda: doctor.choose_backends(report))
    report["warnings"] = machine.probe(lambda: doctor.find_warnings(report))
    return report


def test_text_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for needle in ("python", "torch", "transformers", "flash-attn 3", "a run here would use"):
        assert needle in text
    assert text.isascii()
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {*SECTIONS, "backends", "warnings"}
    assert isinstance(report["warnings"], list)


def test_build(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """--build passes the mode on and reports failure; tests/test_csrc.py really builds."""
    for flags, words in (([], []), (["--mode", "cpu"], ["--mode", "cpu"])):
        monkeypatch.setattr(doctor, "build_csrc", lambda given, words=words: int(given == words))
        assert main(["doctor", "--build", *flags]) == 1
    with pytest.raises(SystemExit):
        main(["doctor", "--mode", "cpu"])
    assert "goes with --build" in capsys.readouterr().err


def test_attention_matches_the_runtime(here: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    from hdp.attention.kernels import select_kernel

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert here["torch"]["version"] == torch.__version__
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        assert here["backends"][f"attention {name}"]["choice"] == select_kernel(device, dtype).name


def test_without_torch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    version = machine._version
    monkeypatch.setattr(
        machine, "_version", lambda name: None if name == "torch" else version(name)
    )
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    assert "torch is not installed" in out
    assert "planning and simulation work" in out


def test_torch_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr(machine, "TORCH_TIMEOUT_S", 0.01)
    report = doctor.collect()
    assert "hung" in report["torch"]["error"]
    assert report["backends"]["device"]["choice"] == "none"
    assert doctor.render(report)


@pytest.mark.parametrize(("script", "reason"), [("kill -SEGV $$", "-11"), ("exit 3", "code 3")])
def test_torch_crashes(
    script: str, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr(machine.sys, "executable", executable(tmp_path / "python", script))
    report = doctor.collect()
    assert reason in report["torch"]["error"]
    assert any(reason in text for text in report["warnings"])


def test_every_probe_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise RuntimeError("no such luck")

    for name in SECTIONS:
        monkeypatch.setattr(machine, f"_{name}", broken)
    for flags in ([], ["--json"]):
        assert doctor.main(flags) == 0
        assert "no such luck" in capsys.readouterr().out


@pytest.mark.parametrize("section", SECTIONS)
def test_one_section_broken(section: str, here: dict[str, Any]) -> None:
    for report in (copy.deepcopy(here), gpu_machine(here)):
        report[section] = {"error": "no such luck"}
        assert doctor.render(judged(report))


def test_gpu_node(here: dict[str, Any]) -> None:
    report = gpu_machine(here)
    assert report["warnings"] == []
    assert report["backends"]["device"]["choice"] == "cuda x 8"
    assert report["backends"]["collectives"]["choice"] == "nccl"
    text = doctor.render(report)
    assert "138.0 GiB of 139.0 GiB free" in text
    assert "PCIe 5 x16" in text


def test_optional_kernels_are_reported(here: dict[str, Any]) -> None:
    report = gpu_machine(here)
    for name in ("apex", "transformer-engine", "liger-kernel"):
        report["packages"][name]["version"] = None
    without = judged(report)["backends"]
    assert without["layers"]["choice"] == "transformers"
    assert without["optimizer"]["why"] == "one kernel per update"
    for name in ("apex", "transformer-engine", "liger-kernel"):
        report["packages"][name]["version"] = "1.0"
    with_all = judged(report)["backends"]
    assert with_all["layers"]["choice"] == "Liger"
    assert "--optimizer apex, --optimizer transformer_engine" in with_all["optimizer"]["why"]
    assert "layers" not in here["backends"] or here["torch"]["gpus"]


@pytest.mark.parametrize(
    ("where", "value", "warning"),
    [
        (("torch", "gpus"), [], "the driver has 8 GPUs, but torch sees none"),
        (("torch", "version_info"), [2, 8], "older than 2.9"),
        (("torch", "peer_access"), False, "each other's memory"),
        (("host", "shm_bytes"), 64 << 20, "/dev/shm has 0.1 GiB"),
        (("torch",), {"error": "torch is not installed"}, "not installed"),
    ],
)
def test_warnings(here: dict[str, Any], where: tuple, value: Any, warning: str) -> None:
    report = gpu_machine(here)
    target = report
    for key in where[:-1]:
        target = target[key]
    target[where[-1]] = value
    warnings = judged(report)["warnings"]
    assert len(warnings) == 1, warnings
    assert warning in warnings[0]


def test_locked_memory_matters_only_with_rdma(here: dict[str, Any]) -> None:
    report = gpu_machine(here)
    report["host"]["locked_memory_limit_bytes"] = 8 << 20
    assert judged(report)["warnings"] == []
    port = {"port": "mlx5_0/1", "state": "ACTIVE", "rate": "400 Gb/sec", "link_layer": "InfiniBand"}
    report["interconnect"]["rdma_ports"] = [port]
    assert "ulimit -l" in judged(report)["warnings"][0]
    assert "400 Gb/sec" in doctor.render(report)


def test_reads_nvidia_smi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    row = "NVIDIA H200, 580.65.06, 143771, 5, 16"
    script = f'case "$1" in topo) echo "GPU0 GPU1 NV18";; *) printf "{row}\\n{row}\\n";; esac'
    executable(tmp_path / "nvidia-smi", script)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    facts = machine._nvidia()
    assert [gpu["driver_version"] for gpu in facts["gpus"]] == ["580.65.06"] * 2
    assert facts["topology"] == "GPU0 GPU1 NV18"


@pytest.mark.parametrize("script", ["exec sleep 60", "exit 9", "echo garbage"])
def test_nvidia_smi_broken(script: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    executable(tmp_path / "nvidia-smi", script)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(machine, "SMI_TIMEOUT_S", 0.3)
    facts = machine.probe(machine._nvidia)
    assert "error" in facts


def executable(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)
