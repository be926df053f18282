"""Attention alone: every kind of row is measured, and the fit recovers the coefficients."""

from __future__ import annotations

import pytest
import torch

from hdp.profile import kernels
from hdp.profile.picture import ATTENTION_FIELDS
from hdp.scheduler import CostModel


def test_kernels_alone() -> None:
    heads = kernels.Heads(
        heads=2, kv_heads=1, head_dim=8, dtype=torch.float32, device=torch.device("cpu"), repeats=1
    )
    rows = kernels.measure_kernels(heads, 128, [1, 3])
    assert {row["kind"] for row in rows} == {"ring", "block", "merge"}
    assert {(row["seqlen"], row["degree"]) for row in kernels.rings(rows)} == {(128, 1), (384, 3)}
    for row in rows:
        assert 0 < row["forward_s"] < 1 and 0 < row["seconds"] < 1, row


def test_attention_alone_is_fitted() -> None:
    true = CostModel.from_coefficients(
        quadratic_s=3e-9, linear_s=2e-6, small_shard_tokens=700.0, ring_step_s=1e-4
    )
    rows = [
        {
            "kind": "ring",
            "seqlen": shard * d,
            "degree": d,
            "forward_s": 1e-3,
            "seconds": float(true.piece_s(shard * d, d)),
        }
        for shard in (128, 1024, 8192)
        for d in (1, 2, 8)
    ]
    rows.append({"kind": "merge", "rows": 5, "forward_s": 1.0, "seconds": 1.0})
    fit = kernels.attention_fit(rows)
    for field in ATTENTION_FIELDS:
        assert getattr(fit.cost, field) == pytest.approx(getattr(true, field), rel=1e-6)
    predicted = kernels.with_predictions(rows, fit)
    assert max(abs(row["error"]) for row in predicted[:-1]) < 1e-9
    assert "error" not in predicted[-1]
    assert len(kernels.kernels_table(predicted)) == 10
    flat = [{**row, "seconds": 1.0} for row in kernels.rings(rows) if row["degree"] == 8]
    assert kernels.attention_fit(flat) is None, "shards too short to tell"
    assert kernels.with_predictions(flat, None) == flat
