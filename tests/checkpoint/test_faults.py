"""Checkpoint faults: full disks, kill -9 at each stage of a save, damaged files."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import hdp.checkpoint.files
from hdp.checkpoint.directory import ChecksumStream, committed
from hdp.distributed.mesh import HDPMesh
from hdp.errors import CheckpointError
from tests.checkpoint.checkpoints import (
    assert_equal,
    build,
    everything,
    hold_writes,
    saver_for,
    set_soon,
    step_once,
)
from tests.run_ranks import RankError, run_ranks

# ---- failing saves ----


def _fail_write(rank):
    write = ChecksumStream.write

    def full_disk(self, data):
        if self.num_bytes > 500:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    ChecksumStream.write = full_disk
    return lambda: setattr(ChecksumStream, "write", write)


def _fail_limit(rank):
    """The kernel does not let files grow, as with a quota or a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (800, hard))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _fail_commit(rank):
    commit = hdp.checkpoint.files.commit

    def failing(path, final):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    hdp.checkpoint.files.commit = failing
    return lambda: setattr(hdp.checkpoint.files, "commit", commit)


def _failing_saves(rank, world_size, directory):
    mesh = HDPMesh.create(device="cpu")
    model, optimizer = build(mesh)
    directory = Path(directory)
    messages = []
    with saver_for(directory, mesh) as saver:
        saver.save(1, model=model, optimizer=optimizer, extra={"good": True})
        saver.wait()
        for culprit, fail in ((1, _fail_write), (2, _fail_limit), (0, _fail_commit)):
            undo = fail(rank) if rank == culprit else lambda: None
            saver.save(2, model=model, optimizer=optimizer)
            step_once(model, optimizer, 0)  # training continues
            try:
                saver.save(3, model=model, optimizer=optimizer)
            except CheckpointError as error:
                messages.append(str(error))
            undo()
            dist.barrier()
            entries = {path.name for path in directory.iterdir()} - {".lock"}
            assert entries == {"step-00000001"}, entries
            saver.wait()  # an error is raised only once
        assert saver.status == "saving step 2 failed"
        saver.save(2, model=model, optimizer=optimizer)
        saver.wait()
        assert saver.latest() == directory / "step-00000002"
        assert saver.load(model=model, path=directory / "step-00000001").extra == {"good": True}
    return messages


def test_failed_save_leaves_the_previous_one_and_error_reaches_all_ranks(tmp_path):
    by_rank = run_ranks(_failing_saves, 3, str(tmp_path))
    assert by_rank[0] == by_rank[1] == by_rank[2]
    write, limit, commit = by_rank[0]
    assert "step-00000002 failed on rank 1: OSError: [Errno 28] No space left" in write
    assert "it was removed, step-00000001 is intact" in write
    assert "failed on rank 2: OSError: [Errno 27] File too large" in limit
    assert "failed on rank 0: OSError: [Errno 122] Disk quota exceeded" in commit


def _error_in_training(rank, world_size, directory):
    mesh = HDPMesh.create(device="cpu")
    model, optimizer = build(mesh)
    gates = hold_writes()
    try:
        with saver_for(directory, mesh) as saver:
            saver.save(1, model=model, optimizer=optimizer)
            assert saver.busy
            set_soon(gates[1])
            raise ValueError("non-finite loss")
    except ValueError:
        return committed(Path(directory))


def test_save_in_progress_finishes_after_an_error_on_all_ranks(tmp_path):
    assert run_ranks(_error_in_training, 2, str(tmp_path)) == [[tmp_path / "step-00000001"]] * 2


# ---- killed saves ----


def _kill_at(stage, rank):
    """Make this process kill -9 itself at a stage of its next save."""

    def die(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    def die_if(condition, function):
        return lambda *a, **k: die() if condition(*a) else function(*a, **k)

    if stage == "write":  # on all ranks: a survivor would clean up
        write = ChecksumStream.write
        ChecksumStream.write = die_if(lambda self, data: self.num_bytes > 500, write)
    elif rank == 0 and stage == "before commit":
        hdp.checkpoint.files.commit = die
    elif rank == 0 and stage == "within commit":  # between its two renames
        Path.rename = die_if(lambda self, to: ".saving-" in self.name, Path.rename)
    elif rank == 0 and stage == "prune":
        shutil.rmtree = die_if(
            lambda path: ".removing-" in str(path) and path.exists(), shutil.rmtree
        )


def _killed_save(rank, world_size, directory, stage, step):
    mesh = HDPMesh.create(device="cpu")
    model, optimizer = build(mesh)
    saver = saver_for(directory, mesh, keep_last=1)
    step_once(model, optimizer, 0)
    saver.save(1, model=model, optimizer=optimizer, extra={"which": "first"})
    saver.wait()
    _kill_at(stage, rank)
    step_once(model, optimizer, 1)
    saver.save(step, model=model, optimizer=optimizer, extra={"which": "second"})
    saver.wait()


def _after_kill(rank, world_size, directory):
    mesh = HDPMesh.create(device="cpu")
    model, optimizer = build(mesh, seed=7)
    with saver_for(directory, mesh) as saver:
        restored = saver.load(model=model, optimizer=optimizer)
        entries = {path.name for path in Path(directory).iterdir()}
    steps_taken = int(model.count)
    return restored.step, restored.extra["which"], steps_taken, sorted(entries - {".lock"})


@pytest.mark.parametrize(
    ("stage", "step", "survivor"),
    [
        ("write", 2, (1, "first", 1)),
        ("before commit", 2, (1, "first", 1)),
        ("within commit", 1, (1, "first", 1)),
        ("prune", 2, (2, "second", 2)),
    ],
)
def test_killed_save_leaves_the_previous_one(tmp_path, monkeypatch, stage, step, survivor):
    monkeypatch.setattr("tests.run_ranks.GRACE_S", 1.0)
    with pytest.raises(RankError, match="SIGKILL"):
        run_ranks(_killed_save, 2, str(tmp_path), stage, step, timeout_s=30)
    assert list(tmp_path.glob(".*-step-*")), "the kill left nothing to clean up: the test is weak"
    for facts in run_ranks(_after_kill, 2, str(tmp_path)):
        assert facts == (*survivor, [f"step-{survivor[0]:08d}"])


# ---- damage ----


def _truncate(path):
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _bad_loads(rank, world_size, good, directory):
    mesh = HDPMesh.create(device="cpu")
    model, optimizer = build(mesh)
    step_once(model, optimizer, 0)
    before = everything(model, optimizer)
    messages = {}

    def attempt(name, saver, **targets):
        try:
            saver.load(**({"model": model, "optimizer": optimizer} | targets))
        except ValueError as error:
            messages[name] = str(error)

    cases = {
        "truncated shard": lambda c: _truncate(c / "__1_0.distcp"),
        "flipped bit": lambda c: _flip(c / "__3_0.distcp"),
        "missing shard": lambda c: (c / "__2_0.distcp").unlink(),
        "truncated metadata": lambda c: _truncate(c / ".metadata"),
        "truncated info": lambda c: _truncate(c / "hdp.json"),
        "foreign": lambda c: (c / "hdp.json").write_text('{"model_type": "llama"}'),
    }
    for name, damage in cases.items():
        folder = Path(directory) / name
        if rank == 0:
            shutil.copytree(good, folder)
            damage(folder / "step-00000003")
        dist.barrier()
        with saver_for(folder, mesh) as saver:
            attempt(name, saver)
    with saver_for(good, mesh, model_config={"hidden_size": 8, "layers": 2}) as saver:
        attempt("other config", saver)
    newer = {"hidden_size": 6, "layers": 2, "lib_version": "2", "_path": "/b", "new_option": 0}
    with saver_for(good, mesh, model_config=newer) as saver:
        twin, twin_optimizer = build(mesh)
        saver.load(model=twin, optimizer=twin_optimizer)  # a newer library, but the same model
    with saver_for(good, mesh, model_config=None) as saver:
        wide, wide_optimizer = build(mesh, hidden=4)
        attempt("other shapes", saver, model=wide, optimizer=wide_optimizer)
        half, _ = build(mesh)
        attempt("other dtype", saver, model=half.to(torch.bfloat16), optimizer=None)
        plain = torch.nn.Linear(3, 3)
        attempt("other names", saver, model=plain, optimizer=None)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        attempt("other optimizer", saver, optimizer=sgd)
        attempt("nowhere", saver, path=Path(good) / "step-00000009")
    return messages, before, everything(model, optimizer)


def _good_save(rank, world_size, directory):
    mesh = HDPMesh.create(device="cpu")
    model, optimizer = build(mesh)
    with saver_for(directory, mesh) as saver:
        step_once(model, optimizer, 0)
        saver.save(3, model=model, optimizer=optimizer)


def test_damage_is_found_before_anything_changes(tmp_path):
    good = tmp_path / "good"
    run_ranks(_good_save, 4, str(good))
    results = run_ranks(_bad_loads, 2, str(good), str(tmp_path))
    messages, before, after = results[0]
    assert results[1][0] == messages
    assert_equal(before, after)
    expected = {
        "truncated shard": "__1_0.distcp is truncated or replaced: ",
        "flipped bit": "__3_0.distcp is damaged: its checksum differs",
        "missing shard": "__2_0.distcp is missing; remove it to start from scratch",
        "truncated metadata": ".metadata is truncated or replaced",
        "truncated info": "hdp.json is truncated or damaged",
        "foreign": "hdp.json was not written by hdp",
        "other config": "is of another model: hidden_size=6 there and 8 here",
        "other shapes": "model.embed.weight is torch.float32 (11, 6) there and torch.float32 (11,",
        "other dtype": "model.scale is torch.float32 (3,) there and torch.bfloat16 (3,) here",
        "other names": "model.weight is missing; model.bias is missing; model.",
        "other optimizer": "momentum",
        "nowhere": "step-00000009 does not exist; checkpoints in its folder: step-00000003",
    }
    for name, text in expected.items():
        assert text in messages[name], f"{name}: {messages[name]}"
