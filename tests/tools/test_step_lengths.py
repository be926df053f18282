"""tools/bench_step.py --lengths: which model fits in memory, and a complete run at a tiny size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hdp.scheduler import CostModel
from tests.patience import patience

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 300,
}


@pytest.fixture
def tool():
    pytest.importorskip("torch")
    import step_lengths

    return step_lengths


def test_layers_that_fit_are_those_of_the_measured_memory(tool):
    """docs/gpu.md: three LLaMA-7B-like layers keep 63.8 GB at 128K tokens; an H200 has 139 GiB."""
    shape, h200 = tool.LLAMA_8B, 139 << 30
    long = tool.layers_that_fit(shape, h200, 131072, 1, recompute=False)
    short = tool.layers_that_fit(shape, h200, 32768, 1, recompute=False)
    recomputed = tool.layers_that_fit(shape, h200, 131072, 1, recompute=True)
    assert 2 <= long <= 4
    assert long < recomputed and long < short <= 14
    assert tool.layers_that_fit(shape, h200, 32768, 64, recompute=True) == 32
    assert tool.layers_that_fit(shape, 1 << 30, 131072, 1, recompute=False) == 1


def test_what_is_predicted_was_not_fitted(tool):
    assert tool.lengths_around([32768, 131072]) == [8192, 16384, 65536, 98304]
    assert not set(tool.lengths_around([1024, 2048])) & {1024, 2048}
    assert len(tool.lengths_around([1000])) == 3  # as many as there are coefficients


def test_prediction_of_lengths_that_were_not_measured(tool):
    def step_s(n):
        return 0.2 + 1e-5 * n + 2e-10 * n * n

    base = CostModel.from_coefficients(quadratic_s=1e-9, linear_s=1e-6)
    measured = {n: step_s(n) for n in (8192, 16384, 65536, 98304)}
    predicted = tool.predict(base, measured, [32768, 131072])
    assert predicted == {n: pytest.approx(step_s(n), rel=1e-3) for n in (32768, 131072)}
    assert tool.predict(base, {8: 2.0, 16: 1.0, 32: 0.5}, [64]) == {64: None}


@pytest.mark.slow
def test_one_command_measures_steps_by_length(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "0.txt").write_text("some words of text and more " * 20)
    flags = ["--lengths", "64", "256", "--layers", "2", "--shape", json.dumps(TINY)]
    flags += ["--repeats", "1", "--json", "rows.json", "--data", "text", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "bench_step.py"), *flags, "--peak-tflops", "0.1"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=patience(240),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    content = json.loads((tmp_path / "rows.json").read_text())
    rows = {row["tokens"]: row for row in content["rows"]}
    assert set(rows) == {64, 256} and "256" in done.stdout
    for tokens, row in rows.items():
        # By hand: the weights of two layers and the head, plus causal attention.
        layer = 32 * (2 * 32 + 2 * 16 + 3 * 64)
        flops = 6 * (2 * layer * tokens + 300 * 32 * (tokens - 1)) + 6 * 2 * 32 * tokens**2
        assert row["flops_per_s"] * row["step_s"] == pytest.approx(flops, rel=0.01)
        assert row["mfu"] == pytest.approx(row["flops_per_s"] / 1e11)
        assert row["of_matmul"] == pytest.approx(row["flops_per_s"] / content["matmul_flops_per_s"])
