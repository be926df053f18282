"""CostModel: its formulas, its units, JSON, and the two facts on which degrees.py rests."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdp.scheduler import CostModel
from tests.scheduler.batches import COMPUTE_ONLY, WITH_COMM

some = st.floats(0.0, 1.0)


@st.composite
def costs(draw: st.DrawFn) -> CostModel:
    """Cost models whose terms are of like size at some thousand tokens."""
    return CostModel.from_coefficients(
        quadratic_s=draw(some) * 1e-8,
        linear_s=draw(some) * 1e-4 + 1e-7,
        small_shard_tokens=draw(some) * 2000,
        ring_step_s=draw(some) * 1e-2,
        kv_bytes_per_token=draw(some) * 1e6,
        intra_node_bytes_per_s=1e11 * (1e-3 + draw(some)),
        inter_node_bytes_per_s=1e10 * (1e-3 + draw(some)),
    )


def test_formula_by_hand() -> None:
    cost = CostModel.from_coefficients(
        quadratic_s=2.0, linear_s=3.0, small_shard_tokens=5.0, ring_step_s=7.0,
        kv_bytes_per_token=1000.0, intra_node_bytes_per_s=10.0, inter_node_bytes_per_s=4.0,
    )  # fmt: skip
    attention_s = 2.0 * (12 * 12 / 4 + 5 * 12)
    assert cost.attention_s(12, 4) == attention_s
    assert cost.compute_s(12, 4) == attention_s + 3.0 * 12 / 4 + 7.0 * 3
    assert cost.exposed_s(12, 4) == 3 * (12 / 4 * 1000 / 10 - attention_s / 4)
    assert cost.exposed_s(12, 4, True) == 3 * (12 / 4 * 1000 / 4 - attention_s / 4)
    assert cost.exposed_s(12, 1) == 0.0
    assert cost.piece_s(12, 4) == cost.compute_s(12, 4) + cost.exposed_s(12, 4)


def test_published_constants() -> None:
    """FlexSP's GPT-7B, in milliseconds: (5.128e-6 L^2 + 0.184 L) / cp."""
    milliseconds = (5.128e-6 * 262144**2 + 0.184 * 262144) / 16
    assert float(COMPUTE_ONLY.piece_s(262144, 16)) == pytest.approx(milliseconds / 1000)


def test_broadcasts() -> None:
    seconds = WITH_COMM.piece_s(
        np.array([[1000], [2000]]), np.array([1, 2, 4]), [False, False, True]
    )
    assert seconds.shape == (2, 3)
    assert seconds[1, 2] == WITH_COMM.piece_s(2000, 4, True)


def test_a_unit_goes_round_together() -> None:
    lengths = np.array([1000, 5000, 20000])
    squares, tokens = float((lengths**2).sum()), int(lengths.sum())
    together = WITH_COMM.unit_s(squares, tokens, 4)
    alone = WITH_COMM.piece_s(lengths, 4)
    assert float(together) <= alone.sum() - 2 * 3 * WITH_COMM.ring_step_s + 1e-12
    assert WITH_COMM.unit_s(1000.0**2, 1000, 4) == pytest.approx(float(WITH_COMM.piece_s(1000, 4)))


@given(costs(), st.integers(1, 200_000), st.booleans())
def test_work_never_falls(cost: CostModel, seqlen: int, across: bool) -> None:
    """Rank-seconds do not fall with the degree: the least degree is the least work."""
    degrees = np.arange(1, 200)
    work = degrees * cost.piece_s(seqlen, degrees, across)
    assert (np.diff(work) >= -1e-9 * work[1:]).all()


@given(costs(), st.integers(1, 200_000), st.booleans())
def test_time_has_one_valley(cost: CostModel, seqlen: int, across: bool) -> None:
    """A piece's time falls with the degree up to one point and rises after it."""
    seconds = cost.piece_s(seqlen, np.arange(1, 200), across)
    rises = np.diff(seconds) > 1e-12 * seconds[1:]
    falls = np.diff(seconds) < -1e-12 * seconds[1:]
    assert not (np.maximum.accumulate(rises) & falls).any()


@given(costs(), st.integers(1, 100_000), st.integers(1, 64))
def test_time_rises_with_length(cost: CostModel, seqlen: int, degree: int) -> None:
    assert cost.piece_s(seqlen + 1, degree) >= cost.piece_s(seqlen, degree) * (1 - 1e-12)


def test_from_transformer() -> None:
    """LLaMA-7B: 6 FLOPs per parameter and token, 7 L^2 heads * head_dim per layer of attention."""
    shape = {"num_layers": 32, "hidden_size": 4096, "intermediate_size": 11008, "num_heads": 32,
             "num_kv_heads": 32, "vocab_size": 32000, "flops_per_s": 1e12}  # fmt: skip
    cost = CostModel.from_transformer(**shape)
    parameters = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32000
    assert cost.linear_s == pytest.approx(6 * parameters / 1e12)
    assert cost.quadratic_s == pytest.approx(7 * 32 * 4096 / 1e12)
    # 170 KB per token and layer were measured.
    assert cost.activation_bytes_per_token / 32 == pytest.approx(170e3, rel=0.02)
    halves = CostModel.from_transformer(**shape, pp_size=2, tp_size=2)
    assert halves.linear_s == pytest.approx(cost.linear_s / 4)
    assert halves.num_layers == 16
    assert halves.kv_bytes_per_token == pytest.approx(cost.kv_bytes_per_token / 4)
    assert CostModel.from_transformer(**shape, linear_s=1.0).linear_s == 1.0
    with pytest.raises(ValueError, match="num_layers=32 is not divisible by pp_size=3"):
        CostModel.from_transformer(**shape, pp_size=3)


def test_offload_by_hand() -> None:
    """Eq. 3 with its corrections: two layers stay, temporary buffers stay, links are shared."""
    cost = CostModel.from_coefficients(
        quadratic_s=0.0, linear_s=3e-3, activation_bytes_per_token=1e6,
        temporary_bytes_per_token=2e5, num_layers=10, host_bytes_per_s=4e9, ranks_per_host_link=2,
    )  # fmt: skip
    assert cost.offloadable == pytest.approx(0.8e6 / 1.2e6)
    assert cost.host_s_per_token == pytest.approx(0.8e6 * 2 / 4e9)
    assert cost.hidden_ratio(1000) == pytest.approx(1.0)  # forward: 1 ms; copies: 0.4 ms
    slow = replace(cost, linear_s=6e-4)
    assert slow.hidden_ratio(1000) == pytest.approx(0.5)
    assert slow.offload_s(1000, 0.5, slow.compute_s(1000, 1)) == pytest.approx(0.0)
    assert slow.offload_s(1000, 1.0, slow.compute_s(1000, 1)) == pytest.approx(0.2)
    assert replace(cost, host_bytes_per_s=0.0).offloadable == 0.0
    assert replace(cost, num_layers=2).offloadable == 0.0


@pytest.mark.parametrize("cost", [COMPUTE_ONLY, WITH_COMM])
def test_json_round_trip(cost: CostModel, tmp_path) -> None:
    cost.save(tmp_path / "cost.json")
    assert CostModel.load(tmp_path / "cost.json") == cost


def test_a_report_travels_in_the_file_alone(tmp_path) -> None:
    """Residuals and provenance are for people: the model is the same with and without them."""
    path = tmp_path / "cost.json"
    report = {"residuals": [0.01, -0.02], "provenance": {"torch": "2.13"}}
    WITH_COMM.save(path, report)
    assert CostModel.load(path) == WITH_COMM
    assert json.loads(path.read_text())["report"] == report
    assert "report" not in json.loads(WITH_COMM.to_json())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quadratic_s": math.nan}, "quadratic_s=nan"),
        ({"linear_s": -1.0}, "linear_s=-1.0"),
        ({"fixed_s": math.inf}, "fixed_s=inf"),
        ({"linear_s": "fast"}, "linear_s='fast'"),
        ({"quadratic_s": 0.0, "linear_s": 0.0}, "both 0"),
        ({"inter_node_bytes_per_s": 0.0}, "inter_node_bytes_per_s=0.0"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"num_layers": 2.5}, "num_layers=2.5 must be a whole number"),
        ({"linear_s": True}, "linear_s=True"),
        ({"forward_share": 1.0}, "forward_share=1.0"),
    ],
)
def test_bad_coefficients(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(WITH_COMM, **change)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "5", '{"version": 9}', '{"version": 1}', '{"version": 1, "speed": 3}']
)
def test_json_that_is_no_cost_model(text: str) -> None:
    with pytest.raises(ValueError, match=r"CostModel|cost model"):
        CostModel.from_json(text)


def test_presets_are_cost_models_that_come_along() -> None:
    assert "h200" in CostModel.presets()
    for name in CostModel.presets():
        assert CostModel.preset(name).name
    with pytest.raises(ValueError, match=r"no cost model preset 'h20' \(did you mean 'h200'\?"):
        CostModel.preset("h20")
    with pytest.raises(ValueError, match=r"no cost model preset 'tpu' \(presets: .*h200"):
        CostModel.preset("tpu")


def test_a_file_is_found_before_a_preset(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert CostModel.find("h200") == CostModel.preset("h200")
    (tmp_path / "h200").mkdir()  # a run's folder: no cost model, and not in the way of one
    assert CostModel.find("h200") == CostModel.preset("h200")
    (tmp_path / "h200").rmdir()
    WITH_COMM.save("h200")
    assert CostModel.find("h200") == WITH_COMM
    (tmp_path / "h200").write_text("not JSON")
    with pytest.raises(ValueError, match="no cost model in h200"):
        CostModel.find("h200")


def test_what_is_neither_file_nor_preset_says_what_would_work(tmp_path) -> None:
    with pytest.raises(ValueError) as told:  # noqa: PT011
        CostModel.find("h200.json")
    assert str(told.value) == (
        "no cost model in h200.json: neither a file nor a preset (did you mean 'h200'? presets: "
        f"{', '.join(CostModel.presets())}); `hdp profile` measures a machine and writes a file"
    )
    with pytest.raises(ValueError, match=r"no cost model in .*directory"):
        CostModel.find(str(tmp_path))
