"""A few cases of tools/fuzz_planner.py, which runs as many as one likes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "fuzz_planner.py"


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_random_batches_and_clusters(first: int, capsys, monkeypatch) -> None:
    spec = importlib.util.spec_from_file_location("fuzz_planner", TOOL)
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(sys, "argv", ["fuzz_planner", "--first", str(first), "--cases", "50"])
    assert tool.main() == 0, capsys.readouterr().out
