"""What comes from outside: plain numbers or one clear error, and never a minute of work."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

import numpy as np
import pytest

from hdp.scheduler import CostModel, StepPlan, plan, simulate
from hdp.scheduler.cli import main
from hdp.scheduler.policies.batch import MOST_PIECES
from hdp.scheduler.simulation.one_f_one_b import MOST_OPERATIONS
from hdp.scheduler.workloads.generate import draw
from hdp.scheduler.workloads.limit import limit_lengths
from hdp.scheduler.workloads.read import read_lengths
from tests.scheduler.batches import COMPUTE_ONLY

GOOD: dict[str, Any] = {"hdp_size": 8, "max_tokens_per_rank": 4096, "cost": COMPUTE_ONLY}
BAD = [1.5, 16.0, float("nan"), float("inf"), -1, 2**70, 10**5000, "8", True, np.True_, [8], 2j]
SMALL = json.loads(plan([9000, 300], **GOOD).to_json())


@pytest.mark.parametrize("name", ["hdp_size", "max_tokens_per_rank", "pp_size", "ranks_per_node"])
def test_integers_of_plan(name: str) -> None:
    like = {"hdp_size": 8, "max_tokens_per_rank": 4096, "pp_size": 2, "ranks_per_node": 4}[name]
    expected = plan([9000, 300], **{**GOOD, name: like})
    for kind in (np.int32, np.uint64, np.array):
        made = plan([9000, 300], **{**GOOD, name: kind(like)})
        assert made.digest == expected.digest and type(getattr(made, name)) is int
        assert made.to_json() == expected.to_json()
    for value in BAD:
        with pytest.raises(ValueError, match=name):
            plan([9000, 300], **{**GOOD, name: value})


def test_other_arguments_of_plan() -> None:
    for name in ("offload", "equal_counts"):
        assert plan([9], **GOOD, **{name: np.False_}) == plan([9], **GOOD)
        for value in ("no", 1, None, 0.0):
            with pytest.raises(ValueError, match=f"{name}=.* must be True or False"):
                plan([9], **GOOD, **{name: value})
    for value in ([], None, 3):
        with pytest.raises(ValueError, match="unknown policy"):
            plan([9], **GOOD, policy=value)
    for value in BAD:
        with pytest.raises(ValueError, match="cp_size"):
            plan([9], **GOOD, policy="static", cp_size=value)


@pytest.mark.parametrize("name", ["seqlens", "units"])
@pytest.mark.parametrize(
    "values",
    [[1, True], [1, None], [1, "2"], [1, 2.0], [1, 2**70], [1, 10**5000], [[1], [2, 3]], 5, None],
)
def test_columns_of_plan(name: str, values: Any) -> None:
    lengths, more = ([5, 6], {"units": values}) if name == "units" else (values, {})
    if name == "units" and values is None:
        return
    with pytest.raises(ValueError, match=name):
        plan(lengths, **GOOD, **more)
    mixed = plan([np.int32(5), np.array(6), 7], **GOOD)
    assert mixed.seqlens.tolist() == [5, 6, 7]


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(CostModel)])
def test_fields_of_a_cost_model(name: str) -> None:
    for value in ([], None, "x", True, float("nan"), 10**400, -1):
        if name == "name" and value == "x":
            continue
        with pytest.raises(ValueError, match=name):
            dataclasses.replace(COMPUTE_ONLY, **{name: value})
    if name != "name":
        value = np.float32(0.5) if name == "forward_share" else np.array(8)
        made = dataclasses.replace(COMPUTE_ONLY, **{name: value})
        assert type(getattr(made, name)) in (int, float)
        assert CostModel.from_json(made.to_json()) == made


def test_to_json_is_plain() -> None:
    made = dataclasses.replace(
        plan([9000, 300], **GOOD),
        hdp_size=np.int64(8), offloadable=np.float64(0.25), predicted_s=np.float32(1.0),
        notes={"a": np.int64(3), "b": [np.float64("nan")], "c": np.arange(2)},
    )  # fmt: skip
    data = json.loads(made.to_json())
    assert data["notes"] == {"a": 3, "b": [None], "c": [0, 1]} and data["offloadable"] == 0.25
    with pytest.raises(ValueError, match=r"notes\['f'\] is of type"):
        dataclasses.replace(made, notes={"f": open}).to_json()


# ---- JSON from strangers ----


TEXTS = {
    "deep": '{"version":' + "[" * 200_000,
    "deep closed": '{"version": 3, "notes": ' + '{"a":' * 50_000 + "1" + "}" * 50_000 + "}",
    "digits": '{"version": ' + "9" * 6000 + "}",
    "twice": '{"version": 3, "version": 3}',
    "nan": '{"version": 3, "offloadable": NaN}',
    "no UTF-8": b"\xff\xfe{}",
    "list": "[3]",
    "binary": b"\x00\x01\x02",
}


@pytest.mark.parametrize("kind", [StepPlan, CostModel])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_text_that_is_no_plan_and_no_cost_model(kind: Any, text: str | bytes) -> None:
    with pytest.raises(ValueError, match=f"not a {kind.__name__} in JSON|has version"):
        kind.from_json(text)


@pytest.mark.parametrize("name", SMALL)
def test_each_field_of_a_plan_is_checked(name: str) -> None:
    """Of the wrong type, huge or missing: an error from reading, checking or simulating it."""
    missing = {key: value for key, value in SMALL.items() if key != name}
    with pytest.raises(ValueError, match=name):
        StepPlan.from_json(json.dumps(missing))
    for value in ([[[[]]]], "x", True, -1, 2**31, 2**70, {"a": 1}, [None], 1e300):
        if isinstance(value, {"policy": str, "notes": dict}.get(name, ())):
            continue
        if name in ("predicted_s", "lower_bound_s") and isinstance(value, (int, float)):
            continue
        try:
            read = StepPlan.from_json(json.dumps({**SMALL, name: value}))
        except ValueError:
            continue
        if (name == "max_tokens_per_rank" and value == 2**31) or (
            name == "aligned" and value is True
        ):
            continue
        with pytest.raises(ValueError, match=name):
            read.validate()
        with pytest.raises(ValueError, match=name):
            simulate(read, COMPUTE_ONLY)


def test_a_short_text_does_not_become_a_wide_ring() -> None:
    text = json.dumps({**SMALL, "rings": [[[0, 2**24]], [[0, 1]]]})
    with pytest.raises(ValueError, match="ranks from 0, hdp_size=8"):
        StepPlan.from_json(text)
    text = json.dumps({**SMALL, "rings": [[[0, 8]] * 1000, [[0, 1]]]})
    with pytest.raises(ValueError, match="rings of 8001 ranks in all, but"):
        StepPlan.from_json(text)


def test_json_grows_with_the_pieces() -> None:
    """Twice the width, about twice the text: version 2 was four times as long."""
    sizes = []
    for ranks in (256, 512, 1024):
        made = plan([ranks] * 8, hdp_size=ranks, max_tokens_per_rank=1, cost=COMPUTE_ONLY)
        assert made.degrees.min() == ranks
        sizes.append(len(made.to_json()))
        assert StepPlan.from_json(made.to_json()) == made
    assert sizes[1] < 2.2 * sizes[0] and sizes[2] < 2.2 * sizes[1]
    assert sizes[2] < 8 * 8 * 1024


# ---- extremes ----


def test_many_layers_do_not_divide_by_zero() -> None:
    with pytest.raises(ValueError, match=r"num_layers=.* must be at most 1048576"):
        dataclasses.replace(COMPUTE_ONLY, num_layers=10**18)
    cost = dataclasses.replace(
        COMPUTE_ONLY, num_layers=2**20, activation_bytes_per_token=1e5, host_bytes_per_s=1e300
    )
    assert cost.offloadable < 1
    plan([9000, 300], **{**GOOD, "cost": cost}, offload=True).validate()


def test_more_devices_than_there_are() -> None:
    with pytest.raises(ValueError, match="pp_size=1024 stages are more than 16777216 devices"):
        plan([1000, 2000], **{**GOOD, "hdp_size": 2**24}, pp_size=1024)


def test_ticks_of_many_stages_do_not_reach_zero() -> None:
    made = plan([1, 2], hdp_size=2**12, max_tokens_per_rank=4096, cost=COMPUTE_ONLY, pp_size=1024)
    assert made.validate().predicted_s > 0


def test_a_step_of_too_many_operations() -> None:
    count = MOST_OPERATIONS // 2048 + 1
    made = StepPlan.from_lists(
        [1] * count, [[0]] * count, [[[s] for s in range(count)]],
        max_tokens_per_rank=1, pp_size=1024,
    )  # fmt: skip
    with pytest.raises(ValueError, match="pp_size=1024 stages run 16385 microbatches"):
        simulate(made, COMPUTE_ONLY)


@pytest.mark.parametrize("policy", ["hdp", "bytescale", "bytescale-naive", "static"])
def test_a_plan_of_too_many_pieces(policy: str) -> None:
    count = MOST_PIECES // 2**13 + 1
    with pytest.raises(ValueError, match="pieces, more than 33554432; raise max_tokens_per_rank=1"):
        plan(
            np.full(count, 2**13), hdp_size=2**13, max_tokens_per_rank=1, cost=COMPUTE_ONLY,
            policy=policy,
        )  # fmt: skip


def test_units_are_fitted_by_bisection(monkeypatch) -> None:
    from hdp.scheduler.policies.batch import Batch

    calls = []
    count = Batch.tokens_per_rank
    monkeypatch.setattr(Batch, "tokens_per_rank", lambda *a: calls.append(1) or count(*a))
    units = np.zeros(100, dtype=int)
    wide = {**GOOD, "hdp_size": 2**13, "max_tokens_per_rank": 150}
    made = plan(np.full(100, 5000), **wide, units=units).validate()
    assert made.degrees.min() >= 5000 and len(calls) < 200
    with pytest.raises(ValueError, match=r"fits on no number of ranks.* split the unit"):
        plan(np.full(200, 50), **wide, units=np.zeros(200, dtype=int))


def test_rings_of_the_paper_ignore_nodes() -> None:
    """As plan() says of ranks_per_node."""
    lengths = [6000, 100, 9000, 9000, 9000, 300]
    spans = {}
    for policy in ("hdp", "bytescale"):
        made = plan(lengths, **GOOD, ranks_per_node=2, policy=policy).validate()
        rings = [made.ring(s) for s in range(made.num_seqs)]
        spans[policy] = [(len(r), len({rank // 2 for rank in r})) for r in rings]
    assert all(n == 1 if d <= 2 else d == 2 * n for d, n in spans["hdp"])
    assert any(d != 2 * n for d, n in spans["bytescale"] if d > 2)


# ---- workloads and files ----


@pytest.mark.parametrize("name", ["num_sequences", "num_tokens", "seed", "max_length"])
def test_numbers_of_a_workload(name: str) -> None:
    base: dict[str, Any] = {} if name in ("num_sequences", "num_tokens") else {"num_sequences": 4}
    assert len(draw("bimodal", **{**base, name: np.array(700)}))
    for value in BAD:
        with pytest.raises(ValueError, match=name):
            draw("bimodal", **{**base, name: value})


def test_workloads_have_an_end() -> None:
    with pytest.raises(ValueError, match=r"num_sequences=.* must be at most"):
        draw("bimodal", num_sequences=2**40)
    with pytest.raises(ValueError, match="splits 1 sequences into more than"):
        limit_lengths(np.array([2**50]), 1, "split")


def test_files_that_are_none(tmp_path, capsys) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for name in sorted(os.listdir(tmp_path)):
        path = str(tmp_path / name)
        more = ["--hdp-size", "8", "--max-tokens-per-rank", "4K"]
        for argv in (["plan", path], ["simulate", "--plan", path]):
            assert main([*argv, *(more if argv[0] == "plan" else [])]) == 2
            told = capsys.readouterr().err
            assert told.count("\n") == 1 and path in told, told
        with pytest.raises(ValueError, match=name):
            read_lengths(tmp_path / name)


@pytest.mark.parametrize("option", ["--plot", "--trace", "--output"])
def test_paths_are_checked_before_the_work(option: str, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("hdp.scheduler.cli.plan", lambda *_, **__: pytest.fail("planned first"))
    cluster = ["workload:bimodal", "--hdp-size", "8", "--max-tokens-per-rank", "64K"]
    for path, reason in ((tmp_path / "no" / "x.png", "there is no folder"), (tmp_path, "a folder")):
        assert main(["plan", *cluster, option, str(path)]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and reason in told and str(path) in told and option in told
