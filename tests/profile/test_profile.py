"""The parts of hdp/profile: what they measure is there, and what they fit is right."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hdp.distributed.mesh import HDPMesh
from hdp.offloading.twin import TwinStreams
from hdp.scheduler import CostModel
from tests.run_ranks import run_ranks


def load(name: str) -> ModuleType:
    return importlib.import_module(f"hdp.profile.{name}")


# ---- links ----


def links_of_two_ranks(rank: int, world_size: int, ranks_per_node: int) -> list[dict]:
    mesh = HDPMesh.from_group(
        torch.distributed.group.WORLD, device="cpu", ranks_per_node=ranks_per_node
    )
    return load("links").measure_links(mesh, repeats=1, most_bytes=1 << 18)


@pytest.mark.parametrize("ranks_per_node", [1, 2])
def test_links_of_two_ranks(ranks_per_node: int) -> None:
    links = load("links")
    rows, other = run_ranks(links_of_two_ranks, 2, ranks_per_node)
    assert rows == other, "ranks disagree: the slowest one counts on all"
    hop = links.INSIDE if ranks_per_node == 2 else links.ACROSS
    names = {row["link"] for row in rows}
    assert names == {hop, links.REDUCE, links.HOST_OUT, links.HOST_BACK, links.HOST_BOTH}
    for row in rows:
        assert 1e4 < row["bytes_per_s"] < 1e13, row
    assert {row.get("who") for row in rows} - {None} == (
        {links.ALONE, links.TOGETHER} if ranks_per_node == 2 else {links.ALONE}
    )
    assert len(links.links_table(rows)) == len(rows)


def test_links_become_coefficients() -> None:
    links = load("links")

    def row(link: str, num_bytes: int, seconds: float, **more: str) -> dict:
        rate = num_bytes / seconds
        return {"link": link, "bytes": num_bytes, "seconds": seconds, "bytes_per_s": rate, **more}

    rows = [row(links.INSIDE, n, 1e-5 + n / 2e11) for n in (1 << 14, 1 << 20, 1 << 26)]
    rows += [row(links.HOST_BOTH, 1 << 26, (1 << 26) / 5e10, who=links.ALONE)]
    rows += [row(links.HOST_BOTH, 1 << 26, (1 << 26) / 1.3e10, who=links.TOGETHER)]
    found = links.coefficients(rows)
    assert found["intra_node_bytes_per_s"] == pytest.approx(2e11, rel=1e-6)
    assert "inter_node_bytes_per_s" not in found
    assert found["ranks_per_host_link"] == 4
    share = found["host_bytes_per_s"] / found["ranks_per_host_link"]
    assert share == pytest.approx(1.3e10), "a rank's part is what it had when all copied"
    assert links.coefficients([]) == {}


def test_host_copies_arrive() -> None:
    links = load("links")
    host = links.HostCopies(torch.device("cpu"), 64)
    host._locals[0].fill_(7)
    host._hosts[1].fill_(9)
    host.calls[links.HOST_BOTH]()
    assert (host._hosts[0] == 7).all()
    assert (host._locals[1] == 9).all()
    host.close()


def test_host_copies_run_both_ways_at_once_and_are_waited_for() -> None:
    """On the offload engine's simulated device: no access is out of order, and time says so."""
    links, size = load("links"), 1 << 12
    streams = TwinStreams(bytes_per_s=float(size))
    host = links.HostCopies(torch.device("cpu"), size, streams)
    for call, seconds in ((links.HOST_OUT, 1), (links.HOST_BACK, 1), (links.HOST_BOTH, 1)):
        began = streams.now_s
        host.calls[call]()
        assert streams.now_s - began == pytest.approx(seconds), call
    host.close()
    assert not streams.races


# ---- kernels ----


def test_kernels_alone() -> None:
    kernels = load("kernels")
    heads = kernels.Heads(
        heads=2, kv_heads=1, head_dim=8, dtype=torch.float32, device=torch.device("cpu"), repeats=1
    )
    rows = kernels.measure_kernels(heads, 128, [1, 3])
    assert {row["kind"] for row in rows} == {"ring", "block", "merge"}
    assert {(row["seqlen"], row["degree"]) for row in kernels.rings(rows)} == {(128, 1), (384, 3)}
    for row in rows:
        assert 0 < row["forward_s"] < 1 and 0 < row["seconds"] < 1, row


def test_attention_alone_is_fitted() -> None:
    kernels = load("kernels")
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
    for field in load("picture").ATTENTION_FIELDS:
        assert getattr(fit.cost, field) == pytest.approx(getattr(true, field), rel=1e-6)
    told = kernels.with_predictions(rows, fit)
    assert max(abs(row["error"]) for row in told[:-1]) < 1e-9
    assert "error" not in told[-1]
    assert len(kernels.kernels_table(told)) == 10
    flat = [{**row, "seconds": 1.0} for row in kernels.rings(rows) if row["degree"] == 8]
    assert kernels.attention_fit(flat) is None, "shards too short to tell"
    assert kernels.with_predictions(flat, None) == flat


# ---- the model ----


class Layer(nn.Module):
    """Two functions save its input; a third saves the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + x.sin()


@pytest.mark.parametrize("tokens", [5, 9])
def test_saved_bytes_are_storages_once_without_parameters(tokens: int) -> None:
    model = nn.Sequential(Layer(), Layer())
    x = torch.randn(tokens, 6, requires_grad=True)
    with load("model").counting_saved(model, []) as count:
        out = model(x)
        saved = count()
    out.sum().backward()
    assert saved == 2 * tokens * 6 * 4, "the inputs of two layers, each once"


def test_checkpointed_layers_keep_their_inputs() -> None:
    layers = [Layer(), Layer()]
    x = torch.randn(5, 6, requires_grad=True)
    for layer in layers:
        inner = layer.forward
        layer.forward = lambda x, inner=inner: checkpoint(inner, x, use_reentrant=False)
    model = nn.Sequential(*layers)
    with load("model").counting_saved(model, layers) as count:
        model(x).sum().backward()
        assert count() == 2 * 5 * 6 * 4


def test_model_costs_are_slopes() -> None:
    module = load("model")

    def row(tokens: int, peak: int | None) -> dict:
        return {
            "tokens": tokens,
            "seqlen": module.SHORT,
            "forward_s": 0.3 * (0.01 + 2e-5 * tokens),
            "seconds": 0.01 + 2e-5 * tokens,
            "saved_bytes": 1000 + 4096 * tokens,
            "peak_bytes": peak,
        }

    costs = module.model_costs([row(n, 5000 + 5120 * n) for n in (64, 256, 1024)])
    assert costs.linear_s == pytest.approx(2e-5, rel=1e-6)
    assert costs.fixed_s == pytest.approx(0.01, rel=1e-6)
    assert costs.forward_share == pytest.approx(0.3)
    assert costs.activation_bytes_per_token == pytest.approx(4096)
    assert costs.temporary_bytes_per_token == pytest.approx(1024)
    assert module.model_costs([row(n, None) for n in (64, 256)]).temporary_bytes_per_token is None


# ---- the picture ----

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
    load("picture").draw_profile(COST, report(*parts), path)
    assert path.stat().st_size > 3000
    if suffix == "svg":
        assert path.read_text().lstrip().startswith("<?xml")


def test_the_picture_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    picture, path = load("picture"), tmp_path / "cost.json"
    replace(COST, name="saved").save(path, report())
    assert json.loads(path.read_text())["report"].keys() == report().keys()
    monkeypatch.setattr(sys, "argv", ["profile_picture.py", str(path), str(tmp_path / "a.png")])
    picture.main()
    assert (tmp_path / "a.png").exists()


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw = load("picture").draw_profile
    with pytest.raises(ValueError, match="cannot draw to"):
        draw(COST, report(), tmp_path / "cost.gif")
    with pytest.raises(ValueError, match="no measurements"):
        draw(COST, {}, tmp_path / "cost.png")
