"""tools/bench_attention.py runs: at small sizes on a CPU, and with fake libraries."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.training.test_overlap import tool


def test_the_table_is_complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = tool("bench_attention")
    path = tmp_path / "rows.json"
    assert bench.main(["--device", "cpu", "--repeats", "1", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    text = capsys.readouterr().out
    for load in bench.workloads("cpu"):
        mine = [row for row in rows if row["workload"] == load.name]
        assert {row["variant"].split()[0] for row in mine} == {"hdp", "direct"}
        assert max(row["both_ratio"] for row in mine if row["variant"][:3] != "hdp") == 1.0
        assert load.name in text
    assert "gathered" in text
    assert "commit" in text


def test_a_ring_is_compared_with_its_share_of_the_whole() -> None:
    bench = tool("bench_attention")
    whole = bench.Workload(name="w", seqlens=(800,), heads=2, head_dim=4)
    rank = bench.Workload(name="r", seqlens=(800,), heads=2, head_dim=4, ring_size=8)
    assert whole.forward_flops == 4 * 800 * 800 / 2 * 2 * 4 == 8 * rank.forward_flops
    device = torch.device("cpu")
    small = bench.Workload(name="r", seqlens=(64,), heads=2, kv_heads=1, head_dim=8, ring_size=4)
    shares = {v.name: v.share for v in bench.variants(small, device, 1, [])}
    assert shares == {
        "hdp cpu-flash": 1.0,
        "hdp gathered cpu-flash": 1.0,
        "direct torch flash": 0.25,
    }


def test_the_goals_of_the_project_are_in_the_gpu_table() -> None:
    goals = {load.name: load.goal for load in tool("bench_attention").workloads("cuda")}
    assert goals["one rank 128K, 32 KV heads"] == 0.97
    assert goals["ring of 8, 128K, 32 KV heads"] == goals["ring of 8, 128K, 8 KV heads"] == 0.96
    assert goals["packed 128 x 1K"] == 0.97


def test_ragged_lengths_add_up_and_repeat() -> None:
    bench = tool("bench_attention")
    lengths = bench._ragged(128 << 10, 900)
    assert sum(lengths) == 128 << 10
    assert lengths == bench._ragged(128 << 10, 900)
    assert len(set(lengths)) > 20


def test_a_wrong_result_is_not_timed() -> None:
    bench = tool("bench_attention")
    load = bench.Workload(name="w", seqlens=(32,), heads=2, kv_heads=1, head_dim=8)
    ours, direct = bench.variants(load, torch.device("cpu"), 0, [])
    broken = bench.Variant(
        name="hdp broken",
        attend=lambda q, k, v: ours.attend(q, k, v) * 1.1,
        **{n: getattr(ours, n) for n in ("q", "k", "v", "dout")},
    )
    bench.check(load, [ours, direct], 0)
    with pytest.raises(AssertionError, match="hdp broken: out off by"):
        bench.check(load, [broken, direct], 0)


def test_libraries_are_called_dense_and_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses only keywords that all three releases of flash_attn_func and its varlen form accept."""
    peers = tool("peer_attention")
    calls = []

    def dense(q, k, v, softmax_scale=None, causal=False):
        calls.append(("dense", q.shape, causal))
        return q, None

    def packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False):
        calls.append(("varlen", cu_seqlens_q.tolist(), max_seqlen_k, causal))
        return q

    library = SimpleNamespace(flash_attn_func=dense, flash_attn_varlen_func=packed)
    monkeypatch.setattr(peers, "_libraries", lambda device: {"flash-attn-4": library})
    x = torch.randn(12, 2, 8)
    for lengths in ((4, 4, 4), (5, 7)):
        for name, attend in peers.direct_attention(lengths, torch.device("cpu")).items():
            if name.startswith("flash-attn"):
                assert attend(x, x, x).shape == x.shape
    assert calls == [
        ("dense", (3, 4, 2, 8), True),
        ("varlen", [0, 4, 8, 12], 4, True),
        ("varlen", [0, 5, 12], 7, True),
    ]
