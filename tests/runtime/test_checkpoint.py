"""Checkpointer on gloo ranks with an FSDP2 model: resharding, kills, full disks, damage."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard

import hdp.checkpoint
import hdp.checkpoint_dir
from hdp.checkpoint import Checkpointer, CheckpointError, full_state_dict
from hdp.checkpoint_dir import ChecksumStream, committed
from hdp.mesh import HDPMesh
from hdp.rng import seed_rng
from tests.run_ranks import RankError, run_ranks

CONFIG = {"hidden_size": 6, "layers": 2}


class Toy(torch.nn.Module):
    """Odd sizes, so that shards are uneven and some empty; tied embedding and head; a buffer."""

    def __init__(self, hidden: int = 6) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(11, hidden)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(hidden, hidden) for _ in range(2))
        self.scale = torch.nn.Parameter(torch.ones(3))
        self.head = torch.nn.Linear(hidden, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.zeros(1))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x) * self.scale.sum()


def _build(mesh, seed=0, hidden=6):
    torch.manual_seed(seed)
    model = Toy(hidden)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh.device_mesh)
    fully_shard(model, mesh=mesh.device_mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=0.05)


def _step(model, optimizer, step):
    """The same batch on all ranks: the gradient's mean does not depend on how many there are."""
    tokens = torch.arange(7) * (step + 3) % 11
    loss = torch.nn.functional.cross_entropy(model(tokens), tokens.roll(-1))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.count += 1
    return float(loss.detach())


def _everything(model, optimizer):
    """Whole model and optimizer state, on rank 0."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = {f"model.{k}": v.clone() for k, v in full_state_dict(model).items()}
    optimizer_state = get_optimizer_state_dict(model, optimizer, options=options)
    for name, fields in optimizer_state.get("state", {}).items():
        state |= {f"optimizer.{name}.{k}": v.clone() for k, v in fields.items()}
    return state


def _saver(directory, mesh, **options):
    return Checkpointer(directory, mesh, **({"model_config": CONFIG, "seed": 5} | options))


def _assert_equal(a, b):
    assert a.keys() == b.keys() and a
    for name in a:
        assert torch.equal(a[name], b[name]), name


def _slow(write_s):
    """From now on every write of this process takes a while."""
    write = ChecksumStream.write

    def slow_write(self, data):
        time.sleep(write_s)
        return write(self, data)

    ChecksumStream.write = slow_write


# ---- resuming ----


def _save_run(rank, world_size, directory):
    mesh = HDPMesh.create(device="cpu")
    model, optimizer = _build(mesh)
    with _saver(directory, mesh) as saver:
        assert saver.load(model=model, optimizer=optimizer) is None and saver.latest() is None
        losses = [_step(model, optimizer, step) for step in range(3)]
        seed_rng(1, rank=rank)
        saver.save(3, model=model, optimizer=optimizer, extra={"sampler": {"position": 24}})
        draws = (torch.rand(2).tolist(), np.random.rand(), random.random())
        state = _everything(model, optimizer)
        losses += [_step(model, optimizer, step) for step in range(3, 6)]
    assert saver.status.startswith("saved step 3 in ")
    return losses, state, draws


def _load_run(rank, world_size, directory):
    mesh = HDPMesh.create(device="cpu")
    model, optimizer = _build(mesh, seed=7)  # other weights: all must come from the checkpoint
    with _saver(directory, mesh) as saver:
        restored = saver.load(model=model, optimizer=optimizer)
        assert restored.path == Path(directory) / "step-00000003" == saver.latest()
        assert restored.extra == {"sampler": {"position": 24}}
        draws = (torch.rand(2).tolist(), np.random.rand(), random.random())
        state = _everything(model, optimizer)
        losses = [_step(model, optimizer, step) for step in range(restored.step, 6)]
        assert float(model.count) == 6
        saver.load(model=model, optimizer=optimizer)  # over a used optimizer, gradients and all
        assert _step(model, optimizer, 3) == losses[0]
    return losses, state, draws, restored.world_size


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    return directory, run_ranks(_save_run, 4, str(directory))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_any_number_of_ranks(saved, world_size):
    directory, by_rank = saved
    results = run_ranks(_load_run, world_size, str(directory))
    _assert_equal(results[0][1], by_rank[0][1])
    for losses, _, _, written_by in results:
        assert losses == pytest.approx(by_rank[0][0][3:], rel=1e-6) and written_by == 4
    draws = [result[2] for result in results]
    if world_size == 4:  # random numbers continue ...
        assert draws == [result[2] for result in by_rank]
    else:  # ... or start anew, apart from each other and the same each time
        assert len({draw[1] for draw in draws}) == world_size
        seed_rng(5, step=3, rank=0)
        assert draws[0] == (torch.rand(2).tolist(), np.random.rand(), random.random())


def _full_state(rank, world_size):
    mesh = HDPMesh.create(device="cpu")
    model, _ = _build(mesh)
    return full_state_dict(model)


def test_full_state_dict():
    first, *others = run_ranks(_full_state, 3)
    torch.manual_seed(0)
    _assert_equal(first, dict(Toy().state_dict()))
    assert others == [{}, {}]


# ---- the background ----


def _busy_background(rank, world_size, directory):
    mesh = HDPMesh.create(device="cpu")
    model, optimizer = _build(mesh)
    _step(model, optimizer, 0)
    _slow(0.0005)
    with _saver(directory, mesh, keep_last=2) as saver:
        for step in (1, 2, 3):
            before = _everything(model, optimizer)
            began = time.monotonic()
            saver.save(step, model=model, optimizer=optimizer)
            blocked_s = time.monotonic() - began
            # one_save_at_a_time: the second waited for the first
            assert blocked_s > 0.1 or step == 1, blocked_s
            # staged_state_is_a_snapshot, and its collectives do not mix with the training thread's
            assert saver.busy and saver.status == f"saving step {step}"
            for i in range(20):
                total = torch.tensor([float(i + rank)])
                dist.all_reduce(total)
                assert float(total) == world_size * i + sum(range(world_size))
            _step(model, optimizer, step)
        saver.wait()
        assert [path.name for path in committed(Path(directory))] == [
            "step-00000002",
            "step-00000003",
        ]
        other, other_optimizer = _build(mesh, seed=7)
        saver.load(model=other, optimizer=other_optimizer)
        return before, _everything(other, other_optimizer)


def test_staged_state_is_a_snapshot_and_one_save_at_a_time(tmp_path):
    before, loaded = run_ranks(_busy_background, 2, str(tmp_path))[0]
    _assert_equal(before, loaded)


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
    """The kernel refuses to let a file grow: what a quota or a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (800, hard))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _fail_commit(rank):
    commit = hdp.checkpoint.commit

    def failing(path, final):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    hdp.checkpoint.commit = failing
    return lambda: setattr(hdp.checkpoint, "commit", commit)


def _failing_saves(rank, world_size, directory):
    mesh = HDPMesh.create(device="cpu")
    model, optimizer = _build(mesh)
    directory = Path(directory)
    messages = []
    with _saver(directory, mesh) as saver:
        saver.save(1, model=model, optimizer=optimizer, extra={"good": True})
        saver.wait()
        for culprit, fail in ((1, _fail_write), (2, _fail_limit), (0, _fail_commit)):
            heal = fail(rank) if rank == culprit else lambda: None
            saver.save(2, model=model, optimizer=optimizer)
            _step(model, optimizer, 0)  # training goes on meanwhile
            try:
                saver.save(3, model=model, optimizer=optimizer)
            except CheckpointError as error:
                messages.append(str(error))
            heal()
            dist.barrier()
            entries = {path.name for path in directory.iterdir()} - {".lock"}
            assert entries == {"step-00000001"}, entries
            saver.wait()  # told once
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
    model, optimizer = _build(mesh)
    _slow(0.0005)
    try:
        with _saver(directory, mesh) as saver:
            saver.save(1, model=model, optimizer=optimizer)
            assert saver.busy
            raise ValueError("non-finite loss")
    except ValueError:
        return committed(Path(directory))


def test_save_in_progress_survives_an_error_of_all(tmp_path):
    assert run_ranks(_error_in_training, 2, str(tmp_path)) == [[tmp_path / "step-00000001"]] * 2


def _two_meshes(rank, world_size, directory):
    """As with other parallel axes: the HDP axis is a part of the world."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mesh = HDPMesh.from_group(groups[rank // 2], device="cpu")
    model, optimizer = _build(mesh, seed=rank // 2)
    with _saver(Path(directory) / str(rank // 2), mesh) as saver:
        before = [p.to_local().tolist() for p in model.parameters()]
        saver.save(1, model=model, optimizer=optimizer)
        _step(model, optimizer, 0)
        changed = [p.to_local().tolist() for p in model.parameters()]
        saver.load(model=model, optimizer=optimizer)
        return before, changed, [p.to_local().tolist() for p in model.parameters()]


def test_part_of_the_world(tmp_path):
    for before, changed, after in run_ranks(_two_meshes, 4, str(tmp_path)):
        assert before == after != changed


# ---- killed saves ----


def _kill_at(stage, rank):
    """kill -9 of this process at a stage of its next save."""

    def die(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    def die_if(condition, function):
        return lambda *a, **k: die() if condition(*a) else function(*a, **k)

    if stage == "write":  # on all ranks: a survivor would clean up
        write = ChecksumStream.write
        ChecksumStream.write = die_if(lambda self, data: self.num_bytes > 500, write)
    elif rank == 0 and stage == "before commit":
        hdp.checkpoint.commit = die
    elif rank == 0 and stage == "within commit":  # between its two renames
        Path.rename = die_if(lambda self, to: ".saving-" in self.name, Path.rename)
    elif rank == 0 and stage == "prune":
        shutil.rmtree = die_if(
            lambda path: ".removing-" in str(path) and path.exists(), shutil.rmtree
        )


def _killed_save(rank, world_size, directory, stage, step):
    mesh = HDPMesh.create(device="cpu")
    model, optimizer = _build(mesh)
    saver = _saver(directory, mesh, keep_last=1)
    _step(model, optimizer, 0)
    saver.save(1, model=model, optimizer=optimizer, extra={"which": "first"})
    saver.wait()
    _kill_at(stage, rank)
    _step(model, optimizer, 1)
    saver.save(step, model=model, optimizer=optimizer, extra={"which": "second"})
    saver.wait()


def _after_kill(rank, world_size, directory):
    mesh = HDPMesh.create(device="cpu")
    model, optimizer = _build(mesh, seed=7)
    with _saver(directory, mesh) as saver:
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
    assert list(tmp_path.glob(".*-step-*")), "the kill left nothing to clean up: a weak test"
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
    model, optimizer = _build(mesh)
    _step(model, optimizer, 0)
    before = _everything(model, optimizer)
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
        with _saver(folder, mesh) as saver:
            attempt(name, saver)
    with _saver(good, mesh, model_config={"hidden_size": 8, "layers": 2}) as saver:
        attempt("other config", saver)
    with _saver(good, mesh, model_config=None) as saver:
        wide, wide_optimizer = _build(mesh, hidden=4)
        attempt("other shapes", saver, model=wide, optimizer=wide_optimizer)
        half, _ = _build(mesh)
        attempt("other dtype", saver, model=half.to(torch.bfloat16), optimizer=None)
        plain = torch.nn.Linear(3, 3)
        attempt("other names", saver, model=plain, optimizer=None)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        attempt("other optimizer", saver, optimizer=sgd)
        attempt("nowhere", saver, path=Path(good) / "step-00000009")
    return messages, before, _everything(model, optimizer)


def test_damage_is_found_before_anything_changes(saved, tmp_path):
    results = run_ranks(_bad_loads, 2, str(saved[0]), str(tmp_path))
    messages, before, after = results[0]
    assert results[1][0] == messages
    _assert_equal(before, after)
    expected = {
        "truncated shard": "__1_0.distcp is truncated or foreign: ",
        "flipped bit": "__3_0.distcp is damaged: its checksum differs",
        "missing shard": "__2_0.distcp is missing; remove it to start anew",
        "truncated metadata": ".metadata is truncated or foreign",
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


# ---- bad input ----


def _bad_input(rank, world_size, directory):
    mesh = HDPMesh.create(device="cpu")
    model, _ = _build(mesh)
    messages = []
    hdp.checkpoint._SHARED_S = 0.5

    def attempt(call):
        try:
            call()
        except ValueError as error:
            messages.append(str(error))

    attempt(lambda: _saver(directory, mesh, keep_last=0))
    attempt(lambda: _saver(directory, mesh, model_config={"dtype": torch.float32}))
    attempt(lambda: _saver(Path(directory) / f"node{rank}", mesh))
    (Path(directory) / "file").write_text("")
    attempt(lambda: _saver(Path(directory) / "file", mesh))
    with _saver(Path(directory) / "run", mesh) as saver:
        attempt(lambda: saver.save(1, model=model, extra={"at": object()}))
        assert saver.status == "idle"
    return messages


def test_bad_input(tmp_path):
    by_rank = run_ranks(_bad_input, 2, str(tmp_path))
    keep, config, shared, file, extra = by_rank[0]
    assert keep == "keep_last=0 must be at least 1, or None to keep all"
    assert "model_config must hold only what JSON can" in config
    assert "node1 is not the folder that rank 0 sees" in shared and "(found by rank 1)" in shared
    assert "cannot make the checkpoint folder" in file
    assert "extra must hold only what JSON can" in extra
