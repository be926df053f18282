"""Checkpointer on gloo ranks with an FSDP2 model: resuming, resharding, background saves."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import hdp.checkpoint.checkpointer
import hdp.checkpoint.directory
from hdp.checkpoint.directory import committed
from hdp.distributed.mesh import HDPMesh
from hdp.distributed.rng import seed_rng
from tests.checkpoint.checkpoints import (
    assert_equal,
    build,
    everything,
    hold_writes,
    saver_for,
    set_soon,
    step_once,
)
from tests.run_ranks import run_ranks

# ---- resuming ----

EXTRA = {"sampler": {"position": (24, 0)}, 7: None}  # JSON: the tuple becomes a list, the key text


def _save_run(rank, world_size, directory):
    mesh = HDPMesh.create(device="cpu")
    model, optimizer = build(mesh)
    with saver_for(directory, mesh) as saver:
        assert saver.load(model=model, optimizer=optimizer) is None and saver.latest() is None
        losses = [step_once(model, optimizer, step) for step in range(3)]
        seed_rng(1, rank=rank)
        saver.save(3, model=model, optimizer=optimizer, extra=EXTRA)
        draws = (torch.rand(2).tolist(), np.random.rand(), random.random())
        state = everything(model, optimizer)
        losses += [step_once(model, optimizer, step) for step in range(3, 6)]
    assert saver.status.startswith("saved step 3 in ")
    return losses, state, draws


def _load_run(rank, world_size, directory):
    mesh = HDPMesh.create(device="cpu")
    model, optimizer = build(mesh, seed=7)  # different weights: all must come from the checkpoint
    with saver_for(directory, mesh) as saver:
        restored = saver.load(model=model, optimizer=optimizer)
        assert restored.path == Path(directory) / "step-00000003" == saver.latest()
        assert restored.extra == json.loads(json.dumps(EXTRA)) != EXTRA
        draws = (torch.rand(2).tolist(), np.random.rand(), random.random())
        state = everything(model, optimizer)
        losses = [step_once(model, optimizer, step) for step in range(restored.step, 6)]
        assert float(model.count) == 6
        saver.load(model=model, optimizer=optimizer)  # over a used optimizer, gradients and all
        assert step_once(model, optimizer, 3) == losses[0]
    return losses, state, draws, restored.world_size


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    return directory, run_ranks(_save_run, 4, str(directory))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_any_number_of_ranks(saved, world_size):
    directory, by_rank = saved
    results = run_ranks(_load_run, world_size, str(directory))
    assert_equal(results[0][1], by_rank[0][1])
    for losses, _, _, written_by in results:
        assert losses == pytest.approx(by_rank[0][0][3:], rel=1e-6) and written_by == 4
    draws = [result[2] for result in results]
    if world_size == 4:  # random numbers continue ...
        assert draws == [result[2] for result in by_rank]
    else:  # ... or are reseeded, differently on each rank but the same every time
        assert len({draw[1] for draw in draws}) == world_size
        seed_rng(5, step=3, rank=0)
        assert draws[0] == (torch.rand(2).tolist(), np.random.rand(), random.random())


def _two_meshes(rank, world_size, directory):
    """The HDP axis is only part of the world, as with other parallel axes."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mesh = HDPMesh.from_group(groups[rank // 2], device="cpu")
    model, optimizer = build(mesh, seed=rank // 2)
    with saver_for(Path(directory) / str(rank // 2), mesh) as saver:
        before = [p.to_local().tolist() for p in model.parameters()]
        saver.save(1, model=model, optimizer=optimizer)
        step_once(model, optimizer, 0)
        changed = [p.to_local().tolist() for p in model.parameters()]
        saver.load(model=model, optimizer=optimizer)
        return before, changed, [p.to_local().tolist() for p in model.parameters()]


def test_part_of_the_world(tmp_path):
    for before, changed, after in run_ranks(_two_meshes, 4, str(tmp_path)):
        assert before == after != changed


# ---- the background ----


def _busy_background(rank, world_size, directory):
    mesh = HDPMesh.create(device="cpu")
    model, optimizer = build(mesh)
    step_once(model, optimizer, 0)
    gates = hold_writes()
    with saver_for(directory, mesh, keep_last=2) as saver:
        for step in (1, 2, 3):
            before = everything(model, optimizer)
            set_soon(gates[step - 1])
            saver.save(step, model=model, optimizer=optimizer)
            # one_save_at_a_time: the second waited for the first
            complete = [path.name for path in committed(Path(directory))]
            assert complete[-1:] == [f"step-{step - 1:08d}"] * (step > 1)
            # staged_state_is_a_snapshot, and its collectives do not mix with the training thread's
            assert saver.busy and saver.status == f"saving step {step}"
            for i in range(20):
                total = torch.tensor([float(i + rank)])
                dist.all_reduce(total)
                assert float(total) == world_size * i + sum(range(world_size))
            step_once(model, optimizer, step)
        gates[3].set()
        saver.wait()
        assert [path.name for path in committed(Path(directory))] == [
            "step-00000002",
            "step-00000003",
        ]
        other, other_optimizer = build(mesh, seed=7)
        saver.load(model=other, optimizer=other_optimizer)
        return before, everything(other, other_optimizer)


def test_staged_state_is_a_snapshot_and_one_save_at_a_time(tmp_path):
    before, loaded = run_ranks(_busy_background, 2, str(tmp_path))[0]
    assert_equal(before, loaded)


# ---- bad input ----


def _bad_input(rank, world_size, directory):
    mesh = HDPMesh.create(device="cpu")
    model, _ = build(mesh)
    messages = []
    hdp.checkpoint.checkpointer._SHARED_FOLDER_TIMEOUT_S = 0.5

    def attempt(call):
        try:
            call()
        except ValueError as error:
            messages.append(str(error))

    attempt(lambda: saver_for(directory, mesh, keep_last=0))
    attempt(lambda: saver_for(directory, mesh, model_config={"dtype": torch.float32}))
    attempt(lambda: saver_for(Path(directory) / f"node{rank}", mesh))
    (Path(directory) / "file").write_text("")
    attempt(lambda: saver_for(Path(directory) / "file", mesh))
    with saver_for(Path(directory) / "run", mesh) as saver:
        attempt(lambda: saver.save(1, model=model, extra={"at": object()}))
        assert saver.status == "idle"
    return messages


def test_bad_input(tmp_path):
    by_rank = run_ranks(_bad_input, 2, str(tmp_path))
    keep, config, shared, file, extra = by_rank[0]
    assert keep == "keep_last=0 must be at least 1, or None to keep all"
    assert "model_config must be JSON-serializable" in config
    assert "node1 is not the folder that rank 0 sees" in shared and "(found by rank 1)" in shared
    assert "cannot create the checkpoint folder" in file
    assert "extra must be JSON-serializable" in extra
