"""The picture of a profile, drawn from a report or from the file that contains it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hdp.profile.cli import main
from hdp.profile.picture import draw_profile
from hdp.scheduler import CostModel

COST = CostModel.from_coefficients(
    quadratic_s=3e-9, linear_s=2e-5, fixed_s=4e-3, name="a machine, measured"
)


def report(*parts: str) -> dict:
    def microbatch(length: int, degree: int, fitted: bool) -> dict:
        seconds = float(COST.piece_s(length, degree)) * 1.02
        return {
            "lengths": [length],
            "degree": degree,
            "across_nodes": False,
            "fitted": fitted,
            "measured_s": seconds,
            "error": 1 / 1.02 - 1,
        }

    everything = {
        "microbatches": [microbatch(n * d, d, n > 500) for n in (300, 4000) for d in (1, 2)],
        "kernels": [
            {"kind": "ring", "seqlen": 300 * d, "degree": d, "seconds": 1e-3 * d} for d in (1, 2)
        ],
        "attention_of_one_layer": {
            "quadratic_s": 3e-9,
            "small_shard_tokens": 100.0,
            "linear_s": 1e-6,
            "ring_step_s": 1e-5,
        },
        "links": [
            {"link": "P2P", "bytes": 1 << n, "seconds": 1e-3, "bytes_per_s": 1e3 * (1 << n)}
            for n in (14, 20)
        ],
    }
    return {name: value for name, value in everything.items() if not parts or name in parts}


@pytest.mark.parametrize("parts", [(), ("microbatches",), ("links",)])
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_picture_is_drawn(tmp_path: Path, parts: tuple[str, ...], suffix: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"cost.{suffix}"
    draw_profile(COST, report(*parts), path)
    assert path.stat().st_size > 3000
    if suffix == "svg":
        assert path.read_text().lstrip().startswith("<?xml")


def test_the_picture_of_a_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "cost.json"
    replace(COST, name="saved").save(path, report())
    assert json.loads(path.read_text())["report"].keys() == report().keys()
    assert main(["--redraw", str(path), "--plot", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").exists()


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="cannot draw to"):
        draw_profile(COST, report(), tmp_path / "cost.gif")
    with pytest.raises(ValueError, match="no measurements"):
        draw_profile(COST, {}, tmp_path / "cost.png")
