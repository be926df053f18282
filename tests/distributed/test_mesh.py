"""HDPMesh and agreement on the plan: on gloo, or in a fake environment without processes."""

from __future__ import annotations

import os
import re
import time

import pytest
import torch
import torch.distributed as dist

from hdp.distributed.mesh import HDPMesh, agree_on_plan
from hdp.scheduler import StepPlan
from tests.patience import patience
from tests.run_ranks import run_ranks

TORCHRUN = {
    "RANK": "0",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
}


@pytest.fixture
def env(monkeypatch):
    """A function that sets exactly the given launcher variables."""
    names = [*TORCHRUN, "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"]

    def set_env(**values: str) -> None:
        for name in names:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    set_env()
    return set_env


# ---- create ----


def _mesh_facts(rank, world_size):
    with HDPMesh.create(device="cpu") as mesh:
        total = torch.tensor([rank + 1])
        dist.all_reduce(total, group=mesh.device_mesh.get_group())
        facts = {
            "size": mesh.hdp_size,
            "rank": mesh.hdp_rank,
            "owned": mesh.owns_process_group,
            "one_communicator": mesh.device_mesh.get_group() is mesh.hdp_group,
            "axis": mesh.device_mesh.mesh_dim_names,
            "total": int(total),
            "ranks_per_node": mesh.ranks_per_node,
        }
    return facts | {"still_up": dist.is_initialized()}


@pytest.mark.parametrize("world_size", [1, 3])
def test_one_communicator(world_size):
    for rank, facts in enumerate(run_ranks(_mesh_facts, world_size)):
        assert facts == {
            "size": world_size,
            "rank": rank,
            "owned": False,
            "one_communicator": True,
            "axis": ("hdp",),
            "total": world_size * (world_size + 1) // 2,
            "ranks_per_node": world_size,
            "still_up": True,
        }


def _create_from_environment(rank, world_size):
    dist.destroy_process_group()
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # as torchrun: the store outlives the ranks
    with HDPMesh.create(device="cpu", timeout_s=patience(30)) as mesh:
        facts = (mesh.hdp_rank, mesh.hdp_size, mesh.owns_process_group)
        # communicator_is_warm: P2P between a few ranks needs no collective of all ranks first.
        if rank < 2:
            received = torch.empty(1)
            ops = [
                dist.P2POp(dist.isend, torch.tensor([float(rank)]), 1 - rank, mesh.hdp_group),
                dist.P2POp(dist.irecv, received, 1 - rank, mesh.hdp_group),
            ]
            for work in dist.batch_isend_irecv(ops):
                work.wait()
            assert received.item() == 1 - rank
        dist.barrier(group=mesh.hdp_group)
    return (*facts, dist.is_initialized())


def test_communicator_is_warm():
    assert run_ranks(_create_from_environment, 3) == [(r, 3, True, False) for r in range(3)]


def _several_starts(rank, world_size):
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    sizes = []
    for start in range(3):
        # As after kill -9: the old group's addresses stay in the store; ranks arrive unevenly.
        dist.destroy_process_group()
        time.sleep(0.1 * ((rank + start) % world_size))
        mesh = HDPMesh.create(device="cpu", timeout_s=patience(30))
        total = torch.ones(1)
        dist.all_reduce(total, group=mesh.hdp_group)
        sizes.append(int(total))
    return sizes


def test_stale_store_is_harmless():
    assert run_ranks(_several_starts, 3) == [[3, 3, 3]] * 3


def _rank_0_alone(rank, world_size):
    dist.destroy_process_group()
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    if rank == 0:
        try:
            HDPMesh.create(device="cpu", timeout_s=0.5)
        except ValueError as error:
            return str(error)
    time.sleep(1)
    return ""


def test_missing_ranks_are_named():
    message = run_ranks(_rank_0_alone, 3)[0]
    assert message == "2 of 3 ranks did not join within 0.5 s: 1, 2; check their output"


def _without_rank(rank, world_size, missing, limit_s):
    dist.destroy_process_group()
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    if rank == missing:  # stopped while it imports
        time.sleep(2 * limit_s)
        return ""
    with pytest.raises(ValueError, match="did not join within") as error:
        HDPMesh.create(device="cpu", timeout_s=600, join_timeout_s=limit_s)
    return str(error.value)


@pytest.mark.parametrize("missing", [0, 2])
def test_a_rank_missing_at_start_up_is_named_long_before_the_collective_timeout(missing):
    limit_s = patience(3)  # the other ranks start at different times
    messages = run_ranks(_without_rank, 3, missing, limit_s)
    named = r"1 of 3 ranks did not join within \S+ s: 2;" if missing else "rank 0 did not join"
    for rank in {0, 1, 2} - {missing}:
        assert re.search(named, messages[rank]), messages[rank]


def _uneven_nodes(rank, world_size, local_sizes):
    os.environ["LOCAL_WORLD_SIZE"] = str(local_sizes[rank])
    return HDPMesh.create(device="cpu").ranks_per_node


@pytest.mark.parametrize(
    ("local_sizes", "expected"),
    [([2, 2, 2, 2], 2), ([4, 4, 4, 4], 4), ([3, 3, 3, 1], 1), ([2, 2, 1, 1], 1)],
)
def test_same_ranks_per_node(local_sizes, expected):
    assert run_ranks(_uneven_nodes, 4, local_sizes) == [expected] * 4


def test_single_process_without_torchrun(env):
    for _ in range(2):  # closing leaves nothing behind: a second mesh can be created
        with HDPMesh.create(device="cpu") as mesh:
            assert (mesh.hdp_size, mesh.hdp_rank, mesh.ranks_per_node) == (1, 0, 1)
            agree_on_plan(mesh, _plan([[[0]]]))
        assert not dist.is_initialized()


def test_error_in_the_with_block_closes_and_propagates(env):
    with pytest.raises(KeyError), HDPMesh.create(device="cpu"):
        raise KeyError("mine")
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("hdp_size", "message"),
    [
        (3, "hdp_size=3 does not divide the 4 ranks; omit hdp_size or set it to 4"),
        (8, "hdp_size=8 needs 8 ranks but 4 were started"),
        (2, "tp=pp=1.*takes all 4 ranks"),
        (0, "hdp_size=0 must be at least 1"),
    ],
)
def test_hdp_size_that_does_not_match_is_rejected(env, hdp_size, message):
    env(**TORCHRUN)
    with pytest.raises(ValueError, match=message):
        HDPMesh.create(hdp_size=hdp_size, device="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"MASTER_PORT": None}, "environment lacks MASTER_PORT; launch with torchrun"),
        ({"RANK": "4"}, r"RANK=4 is not in 0\.\.3"),
        ({"WORLD_SIZE": "four"}, "not numeric.*'four'"),
    ],
)
def test_broken_environment_is_rejected(env, change, message):
    env(**{k: v for k, v in (TORCHRUN | change).items() if v is not None})
    with pytest.raises(ValueError, match=message):
        HDPMesh.create(device="cpu")


def test_other_launchers_are_rejected(env):
    env(SLURM_STEP_NUM_TASKS="8")
    with pytest.raises(ValueError, match=r"SLURM_STEP_NUM_TASKS=8 .* one torchrun per node"):
        HDPMesh.create(device="cpu")


def test_missing_devices_are_rejected(env, monkeypatch):
    with pytest.raises(ValueError, match="'meta' is not supported"):
        HDPMesh.create(device="meta")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="no CUDA device is visible; pass device='cpu'"):
        HDPMesh.create(device="cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    env(**(TORCHRUN | {"RANK": "3", "LOCAL_RANK": "3"}))
    message = "local rank 3 of 4 needs cuda:3, but this node has 2 visible CUDA"
    with pytest.raises(ValueError, match=message):
        HDPMesh.create(device="cuda")
    with pytest.raises(ValueError, match="timeout_s=0"):
        HDPMesh.create(device="cpu", timeout_s=0)


# ---- agreement ----


def _plan(microbatches, seqlens=(10,), rings=((0,),), **fields) -> StepPlan:
    fields.setdefault("max_tokens_per_rank", 16)
    return StepPlan.from_lists(seqlens, rings, microbatches, **fields)


def _local_plan(num_ranks: int, lengths: dict[int, int] | None = None, **fields) -> StepPlan:
    seqlens = [10 + r for r in range(num_ranks)]
    for index, length in (lengths or {}).items():
        seqlens[index] = length
    rings = [[r] for r in range(num_ranks)]
    return _plan([[[r]] for r in range(num_ranks)], seqlens, rings, **fields)


def _agree(rank, world_size, cases):
    mesh = HDPMesh.create(device="cpu")
    messages = []
    for plans in cases:
        try:
            agree_on_plan(mesh, plans[rank])
        except ValueError as error:
            messages.append(str(error))
        else:
            messages.append("")
        dist.barrier(group=mesh.hdp_group)  # the communicator is still usable and in sync
    return messages


def _disagreements(*cases):
    """The message of each case (a plan per rank), "" if it passes; must be equal on all ranks."""
    by_rank = run_ranks(_agree, len(cases[0]), cases)
    assert all(messages == by_rank[0] for messages in by_rank), by_rank
    return by_rank[0]


def test_disagreement_is_seen_by_all():
    good, bad = _local_plan(4), _local_plan(4, {2: 7})
    passed, third, first = _disagreements(
        [good] * 4, [good, good, bad, good], [bad, good, good, good]
    )
    assert passed == ""
    assert "1 of 4 ranks (2) differ from the others" in third
    assert "rank 2 first in seqlens[2] = 7, not 12" in third
    assert "(0) differ" in first and "rank 0 first in" in first


def test_first_difference_of_each_kind():
    good = _local_plan(2)
    longer = _plan([[[0]], [[1], [2]]], [10, 11, 3], [[0], [1], [1]])
    swapped = _plan([[[1]], [[0]]], [10, 11], [[1], [0]])
    cases = {
        "max_tokens_per_rank = 32, not 16": _local_plan(2, max_tokens_per_rank=32),
        "hdp_size = 3, not 2": _local_plan(3),
        "the length of seqlens = 3, not 2": longer,
        "ring_ranks[0] = 1, not 0": swapped,
        "offloadable = 0.5, not 0.0": _local_plan(2, offloadable=0.5),
    }
    # A tie: the plan of the lowest rank is the reference.
    messages = _disagreements(*[[good, bad] for bad in cases.values()])
    for expected, message in zip(cases, messages, strict=True):
        assert "1 of 2 ranks (1)" in message and expected in message, message


def test_a_ring_gathered_on_some_ranks_only_is_not_a_hang():
    """Otherwise one rank would shift and the other swap, each waiting forever."""
    passed_around, gathered = (
        _plan([[[0]], [[0]]], rings=((0, 1),), gathered=[mode]) for mode in (False, True)
    )
    passed, message = _disagreements([gathered] * 2, [passed_around, gathered])
    assert passed == ""
    assert "1 of 2 ranks (1)" in message and "gathered[0] = True, not False" in message


def test_predictions_may_differ():
    predictions = [_local_plan(2, predicted_s=1.0), _local_plan(2, predicted_s=2.0, policy="x")]
    other_mesh = [_local_plan(3)] * 2
    messages = _disagreements(predictions, other_mesh)
    assert messages == ["", "plan for hdp_size=3 on a mesh of 2 ranks"]


def _agree_in_groups(rank, world_size, plans):
    """Ranks {0, 1} and {2, 3} as tensor parallel groups: within one, plans must be the same."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    messages = []
    for group in (groups[rank // 2], dist.group.WORLD):
        try:
            agree_on_plan(group, plans[rank], numbers={"step": 3})
        except ValueError as error:
            messages.append(str(error))
        else:
            messages.append("")
    return messages


def test_any_process_group_can_agree():
    good, bad = _local_plan(2), _local_plan(2, {1: 7})
    assert run_ranks(_agree_in_groups, 4, [good] * 4) == [["", ""]] * 4
    by_rank = run_ranks(_agree_in_groups, 4, [good, good, good, bad])
    assert by_rank[0][0] == by_rank[1][0] == "" and "1 of 2 ranks (1) differ" in by_rank[2][0]
    assert all("1 of 4 ranks (3) differ" in whole for _, whole in by_rank)
