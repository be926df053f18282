"""The measuring tools run, at sizes that measure nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hdp.scheduler import CostModel

ROOT = Path(__file__).resolve().parent.parent


def _torchrun(folder: Path, tool: str, *flags: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(ROOT / "tools" / tool), *flags],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[:4000]
    return done.stdout


@pytest.mark.slow
def test_profile_and_bench_step(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "text").mkdir()
    for i, words in enumerate([400, 300, 350, *[4] * 30]):
        (tmp_path / "text" / f"{i}.txt").write_text("some words of text and more " * words)
    data = ["--data", "text", "--device", "cpu"]
    table = _torchrun(
        tmp_path, "profile_machine.py", *data, "--max-tokens-per-rank", "64", "--repeats", "1"
    )
    assert "prediction error" in table
    cost = CostModel.load(tmp_path / "cost.json")
    assert cost.reduce_s > 0
    sizes = ["--long-tokens", "128", "--short-tokens", "40", "--batch-tokens", "200"]
    table = _torchrun(
        tmp_path,
        "bench_step.py",
        *data,
        *sizes,
        *("--max-tokens-per-rank", "128", "--batches", "2", "--cost", "cost.json"),
    )
    rows = [line.split()[0] for line in table.splitlines() if line.endswith("x")]
    assert rows == ["static:1", "static:2", "hdp"]
