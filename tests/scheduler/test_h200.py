"""The cost model of an H200: rebuilt from its measurements, and honest about what they explain."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest

from hdp.scheduler import CostModel
from hdp.scheduler.costs import h200
from hdp.scheduler.costs.h200 import h200_cost, report

ROOT = Path(__file__).parents[2]
FILE = Path(h200.__file__).parent / "presets" / "h200.json"


def test_the_file_is_what_the_command_makes(tmp_path, capsys) -> None:
    assert h200.main([str(tmp_path / "again.json")]) == 0
    assert "measured" in capsys.readouterr().out
    assert (tmp_path / "again.json").read_text() == FILE.read_text(), h200.MACHINE["command"]
    assert CostModel.load(FILE) == CostModel.preset("h200") == h200_cost()
    assert FILE.samefile(ROOT / h200.MACHINE["command"].split()[-1])


def test_the_fit_explains_what_was_measured() -> None:
    rows = report()
    for row in rows["attention"]:
        assert abs(row["error"]) < 0.02, row
        assert row["fitted_to_3_lengths_s"] == pytest.approx(row["measured_s"], rel=0.04), row
    for row in rows["layers"]:
        assert abs(row["error"]) < 0.03, row


def test_every_field_says_where_it_comes_from() -> None:
    cost, known = h200_cost(), json.loads(FILE.read_text())["report"]["sources"]
    own = {f.name for f in fields(CostModel)}
    told = {f.name for f in fields(CostModel) if getattr(cost, f.name) != f.default}
    assert told - {"name", "num_layers"} <= set(known) <= own
    for name in ("intra_node_bytes_per_s", "inter_node_bytes_per_s"):
        assert h200.SOURCES[name].startswith("ASSUMED, not measured")


def test_speeds_are_possible() -> None:
    """No part runs faster than a large matrix product did."""
    cost = h200_cost()
    layers = h200.LLAMA_7B["num_layers"]
    rate = layers * h200.attention_flops(1 << 20) / float(cost.attention_s(1 << 20, 1))
    assert 0.7 * h200.MATMUL_FLOPS_PER_S < rate < h200.MATMUL_FLOPS_PER_S
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32000
    rate = 6 * weights / cost.linear_s
    assert 0.7 * h200.MATMUL_FLOPS_PER_S < rate < h200.MATMUL_FLOPS_PER_S


def test_bad_arguments_are_refused(capsys) -> None:
    assert h200.main([]) == 2
    assert h200.main(["--help"]) == 2
    assert "usage" in capsys.readouterr().err
