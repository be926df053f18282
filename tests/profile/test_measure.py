"""`hdp profile` on two ranks, at tiny sizes: a cost model, its report, a picture."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from hdp.scheduler import CostModel
from hdp.scheduler.costs.fit import Observation
from tests.patience import patience

ROOT = Path(__file__).resolve().parents[2]


def _check_report(cost: CostModel, report: dict) -> None:
    """Check that residuals match the saved coefficients and that each field names its source."""
    assert cost.reduce_s > 0
    assert cost.intra_node_bytes_per_s < math.inf, "links were measured"
    # four layers of norms, projections and an MLP in fp32: a few KB per token per layer
    assert 4 * 2e3 < cost.activation_bytes_per_token < 4 * 5e4
    assert set(report["sources"]) == {f.name for f in fields(CostModel)} - {"name"}
    assert report["provenance"]["ranks"] == 2
    assert report["provenance"]["shape"]["num_layers"] == cost.num_layers == 4
    rows = report["microbatches"]
    assert {(row["degree"], row["fitted"]) for row in rows} == {
        (degree, fitted) for degree in (1, 2) for fitted in (True, False)
    }
    for row in rows:
        seen = Observation(
            pieces=tuple((n, row["degree"]) for n in row["lengths"]), seconds=row["measured_s"]
        )
        assert seen.predicted_s(cost) == pytest.approx(row["predicted_s"])
        assert row["error"] == pytest.approx(row["predicted_s"] / row["measured_s"] - 1)
    worst = max(abs(row["error"]) for row in rows if not row["fitted"])
    assert report["errors"]["predicted"]["largest"] == worst


@pytest.mark.slow
def test_profile_of_two_ranks(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "text").mkdir()
    for i, words in enumerate([400, 300, 350, *[4] * 30]):
        (tmp_path / "text" / f"{i}.txt").write_text("some words of text and more " * words)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "hdp"]
    flags = ["--data", "text", "--device", "cpu", "--max-tokens-per-rank", "256", "--repeats", "1"]
    flags += ["--link-bytes", "64K", "--plot", "cost.png"]
    done = subprocess.run(
        [sys.executable, *launch, "profile", *flags],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=patience(240),
    )
    assert done.returncode == 0, done.stderr[:4000]
    assert "prediction error" in done.stdout
    assert (tmp_path / "cost.png").stat().st_size > 10_000
    report = json.loads((tmp_path / "cost.json").read_text())["report"]
    _check_report(CostModel.load(tmp_path / "cost.json"), report)
    assert report["provenance"]["command"] == " ".join(["hdp profile", *flags])
