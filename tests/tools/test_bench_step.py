"""tools/bench_step.py: one statistic in all columns, and a complete run at a tiny size."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.patience import patience

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))


@pytest.fixture
def tool() -> ModuleType:
    pytest.importorskip("torch")
    import bench_step

    return bench_step


def test_every_column_is_of_the_medians(tool: ModuleType) -> None:
    """With these outliers the median of ratios is 1.25x, though tokens/s show half the speed."""

    def rows(*step_s: float) -> list:
        same = {"predicted_s": 1.0, "planned_bubble": 0.25, "loss": 2.0}
        return [
            tool.Row(step_s=s, bubble=s / 100, bytes_sent=int(1e6 * s), num_tokens=n, **same)
            for s, n in zip(step_s, (90, 100, 110), strict=True)
        ]

    table = tool.medians_table({"static:1": rows(1.0, 1.0, 10.0), "hdp": rows(0.8, 2.0, 2.0)})
    assert table == [
        ["static:1", "100", "1.000", "1.000", "1.0%", "25.0%", "1.0", "1.00x"],
        ["hdp", "50", "2.000", "1.000", "2.0%", "25.0%", "2.0", "0.50x"],
    ]
    assert len(table[0]) == len(tool.COLUMNS)
    for columns in table:
        relative = float(columns[1]) / float(table[0][1])
        assert float(columns[-1].rstrip("x")) == relative, "speedup is the ratio of tokens/s"


@pytest.mark.slow
def test_a_table_of_two_ranks(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "text").mkdir()
    for i, words in enumerate([400, 300, 350, *[4] * 30]):
        (tmp_path / "text" / f"{i}.txt").write_text("some words of text and more " * words)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    flags = ["--data", "text", "--device", "cpu", "--max-tokens-per-rank", "128"]
    flags += ["--long-tokens", "128", "--short-tokens", "40", "--batch-tokens", "200"]
    flags += ["--batches", "2", "--cost", "h200"]
    done = subprocess.run(
        [sys.executable, *launch, str(ROOT / "tools" / "bench_step.py"), *flags],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=patience(240),
    )
    assert done.returncode == 0, done.stderr[:4000]
    rows = [line.split()[0] for line in done.stdout.splitlines() if line.endswith("x")]
    assert rows == ["static:1", "static:2", "hdp"]
    assert "medians over 2 batches" in done.stdout
