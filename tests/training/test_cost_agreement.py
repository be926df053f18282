"""Ranks with different cost models stop at set-up, whichever field differs."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hdp.config import TrainConfig
from hdp.distributed.mesh import HDPMesh
from hdp.models.causal_lm import transformer_shape
from hdp.scheduler import CostModel
from hdp.training.model_setup import open_cost
from tests.run_ranks import run_ranks
from tests.scheduler.batches import WITH_COMM
from tests.tiny_models import tiny_model

COST = dataclasses.replace(WITH_COMM, host_memory_bytes=1e12, name="a machine")
FIELDS = [field.name for field in dataclasses.fields(CostModel)]


def other(name: str) -> CostModel:
    """COST with a different value for one field."""
    value = getattr(COST, name)
    changed = f"another {value}" if name == "name" else type(value)(value * 2)
    if name == "forward_share":
        changed = value / 2
    assert changed != value
    return dataclasses.replace(COST, **{name: changed})


def _messages(rank: int, world: int, paths: list[list[str]]) -> list[str]:
    """Error messages of open_cost for each list of files by rank; "" if it passes."""
    mesh = HDPMesh.create(device="cpu")
    shape = transformer_shape(tiny_model())
    messages = []
    for by_rank in paths:
        config = TrainConfig(cost=by_rank[rank] or None)
        try:
            open_cost(config, mesh, shape, torch.float32)
        except ValueError as error:
            messages.append(str(error))
        else:
            messages.append("")
        dist.barrier(group=mesh.hdp_group)  # the communicator is still usable and in step
    return messages


def _run(cases: list[list[str]]) -> list[str]:
    first, *others = run_ranks(_messages, len(cases[0]), cases)
    assert all(messages == first for messages in others), "ranks raise different messages"
    return first


def test_every_field_is_compared(tmp_path: Path) -> None:
    good = str(tmp_path / "good.json")
    COST.save(good, {"report": "of this machine"})
    cases = [[good, good]]
    for name in FIELDS:
        path = str(tmp_path / f"{name}.json")
        other(name).save(path, {"report": "of another machine"})
        cases.append([good, path])
    passed, *messages = _run(cases)
    assert passed == ""
    for name, message in zip(FIELDS, messages, strict=True):
        theirs, ours = getattr(COST, name), getattr(other(name), name)
        assert message.startswith(
            f"ranks have different cost models: {name} is {ours!r} here and {theirs!r} on rank 0; "
            "copy one file to all nodes"
        ), message
        assert message.endswith("(found by rank 1)")


def test_infinite_and_missing(tmp_path: Path) -> None:
    """Infinite bandwidth on one rank; a file on one rank only; a missing file on one rank."""
    one, free, gone = (str(tmp_path / f"{name}.json") for name in ("one", "free", "gone"))
    COST.save(one)
    dataclasses.replace(COST, intra_node_bytes_per_s=math.inf).save(free)
    infinite, estimated, missing, none = _run([[one, free], [one, ""], [one, gone], ["", ""]])
    assert "intra_node_bytes_per_s is inf here and 150000000000.0 on rank 0" in infinite
    assert "ranks have different cost models: quadratic_s is" in estimated
    assert "no cost model in" in missing and "(found by rank 1)" in missing
    assert none == ""


@pytest.mark.parametrize("name", FIELDS)
def test_other_is_another_cost_model(name: str) -> None:
    assert other(name) != COST
