"""The watchdog with real processes: kill -9, kill -STOP, hangs, errors, slow ranks, torchrun."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hdp.attention.comm import RingComm
from hdp.distributed.agree import is_collective_error
from hdp.distributed.mesh import HDPMesh
from hdp.distributed.watchdog import EXIT_CODE, Watchdog
from hdp.errors import RankFailure
from tests.patience import patience, wait_for
from tests.run_ranks import RankError, run_ranks

TIMEOUT_S = 1.5  # with patience: a busy machine may keep a rank from running for a second
FIRM_S = 60.0  # the limit of run_ranks and gloo, which no test may get close to


def _watched(rank, world_size, scene, directory, timeout_s, *args):
    """Run `scene` under a watchdog; the rank's stderr goes to a file."""
    log = os.open(Path(directory) / f"stderr{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 2)
    mesh = HDPMesh.create(device="cpu")
    with Watchdog.start(mesh, timeout_s=timeout_s) as watchdog:
        return scene(rank, mesh, watchdog, *args)


@pytest.fixture(autouse=True)
def _short_grace(monkeypatch):
    monkeypatch.setattr("tests.run_ranks.GRACE_S", 4.0)


def _run(scene, world_size, directory, *args):
    """(results by rank or None, {rank: how it failed, with its stderr})."""
    failures: dict[int, str] = {}
    args = (scene, str(directory), patience(TIMEOUT_S), *args)
    try:
        results = run_ranks(_watched, world_size, *args, timeout_s=FIRM_S)
    except RankError as error:
        results = None
        parts = re.split(r"\n\nrank (\d+) (?:failed|hung|was left)", str(error))
        failures = {int(rank): text for rank, text in zip(parts[1::2], parts[2::2], strict=True)}
    for rank in range(world_size):
        path = Path(directory) / f"stderr{rank}"
        if path.exists() and rank in failures:
            failures[rank] += "\n" + path.read_text()
    return results, failures


def _reduce():
    dist.all_reduce(torch.ones(4))


def _train(rank, mesh, watchdog, culprit, fault, mark=True):
    """Run steps of one all-reduce each; in step 3, rank `culprit` calls `fault`."""
    for step in range(1000):
        watchdog.progress(step=step, microbatch=0)
        if step == 3 and rank == culprit:
            time.sleep(0.3 * watchdog.timeout_s)  # long enough to be reported
            fault()
        if mark:
            with watchdog.waiting(what="the reduction"):
                _reduce()
        else:
            _reduce()
        time.sleep(0.01)


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


def _freeze():
    os.kill(os.getpid(), signal.SIGSTOP)


def _hang():
    time.sleep(1000)


def _hang_with_interpreter_lock():
    ctypes.PyDLL(None).sleep(1000)


def _raise():
    raise ValueError("document 17 of\nshard 3 is empty")


# ---- faults ----


def test_dead_rank_is_named(tmp_path):
    _, failures = _run(_train, 3, tmp_path, 2, _die)
    assert "SIGKILL" in failures[2]
    for rank in (0, 1):
        assert "rank 2 stopped responding: last seen" in failures[rank]
        assert "in step 3 microbatch 0" in failures[rank]
        assert f"stopping rank {rank} in step 3 microbatch 0 (the reduction" in failures[rank]


@pytest.mark.parametrize("culprit", [0, 1])
def test_stopped_rank_is_named(tmp_path, culprit):
    _, failures = _run(_train, 3, tmp_path, culprit, _freeze)
    for rank in {0, 1, 2} - {culprit}:
        assert f"rank {culprit} stopped responding" in failures[rank], failures[rank]
        # The second rank to exit may see the first one's connection close before its own verdict.
        assert f"exit code {EXIT_CODE}" in failures[rank] or "RankFailure" in failures[rank]
    assert f"exit code {EXIT_CODE}" in str(failures)


@pytest.mark.parametrize("mark", [True, False], ids=["marked", "unmarked"])
def test_hanging_rank_is_named(tmp_path, mark):
    _, failures = _run(_train, 2, tmp_path, 1, _hang, mark)
    for rank in (0, 1):
        named = re.search(r"ranks? (.*) makes? no progress", failures[rank])
        assert named, failures[rank]
        assert named[1] == "1" and "in step 3 microbatch 0" in failures[rank]
        assert re.search(r" at test_watchdog.py:\d+ _hang, ", failures[rank])
    # The hung rank shows where.
    assert "in _hang" in failures[1]


def _ring(rank, mesh, watchdog, culprit):
    """Rank `culprit` hangs inside its microbatch while its ring waits for keys, as in training."""
    comm = RingComm(mesh.hdp_group, on_exchange=watchdog.touch, on_wait=watchdog.waiting)
    watchdog.progress(step=3, microbatch=0, ring=(0, 1, 2))
    block = torch.zeros(2, 4, 1, 1)
    comm.shift(block, (0, 1, 2), rank, block.shape).wait()
    if rank == culprit:
        _hang()
    comm.shift(block, (0, 1, 2), rank, block.shape).wait()
    comm.shift(block, (0, 1, 2), rank, block.shape).wait()


def test_only_the_hanging_rank_of_a_ring_is_named(tmp_path):
    """The others wait in C code, for each other; that is not their fault."""
    _, failures = _run(_ring, 3, tmp_path, 1)
    for rank in range(3):
        named = re.search(r"(ranks? .*?) makes? no progress", failures[rank])
        assert named and named[1] == "rank 1", failures[rank]
    assert "waiting for ranks 1" in failures[0] + failures[2]


def test_hang_that_holds_the_interpreter_lock_is_named(tmp_path):
    _, failures = _run(_train, 2, tmp_path, 1, _hang_with_interpreter_lock)
    assert "rank 1 stopped responding" in failures[0]


@pytest.mark.parametrize("culprit", [0, 1])
def test_failing_rank_is_quoted(tmp_path, culprit):
    _, failures = _run(_train, 3, tmp_path, culprit, _raise)
    assert "ValueError: document 17 of\nshard 3 is empty" in failures[culprit]
    quoted = f"rank {culprit} failed in step 3 microbatch 0, "
    for rank in {0, 1, 2} - {culprit}:
        assert quoted in failures[rank], failures[rank]
        assert "ValueError: document 17 of shard 3 is empty; stopping rank" in failures[rank]


def _fail_together(rank, mesh, watchdog):
    watchdog.progress(step=1)
    _reduce()
    raise ValueError(f"non-finite loss on rank {rank}")


def test_error_on_all_ranks_keeps_every_traceback(tmp_path):
    _, failures = _run(_fail_together, 3, tmp_path)
    for rank in range(3):
        assert f"ValueError: non-finite loss on rank {rank}" in failures[rank]
        assert "in _fail_together" in failures[rank]


# The store lives in rank 0's process, as without torchrun, and dies with it.


def _store_in_rank_0(rank, world_size, directory, timeout_s, fault):
    dist.destroy_process_group()
    port_file, port = Path(directory) / "port", 0
    if rank:
        wait_for(port_file.exists)
        port = int(port_file.read_text())
    store = dist.TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False)
    if rank == 0:
        (Path(directory) / "new").write_text(str(store.port))
        (Path(directory) / "new").rename(port_file)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    return _watched(rank, world_size, _train, directory, timeout_s, 0, fault)


@pytest.mark.parametrize("fault", [_die, _freeze, _raise])
def test_rank_that_hosts_the_store_is_named(tmp_path, fault):
    args = (str(tmp_path), patience(TIMEOUT_S), fault)
    with pytest.raises(RankError) as info:
        run_ranks(_store_in_rank_0, 2, *args, timeout_s=FIRM_S)
    text = str(info.value) + (tmp_path / "stderr1").read_text()
    blame = "rank 0 failed in step 3" if fault is _raise else "rank 0 (or its node )?stopped"
    assert re.search(blame, text), text


# ---- no faults ----


def _slow(rank, mesh, watchdog):
    with watchdog.allow(30, "tokenizing"):
        if rank == 0:
            ctypes.PyDLL(None).usleep(int(1.6 * watchdog.timeout_s * 1e6))  # holds the lock
    _reduce()  # the others have been waiting here, unmarked
    if rank == 1:
        for _ in range(16):
            time.sleep(0.1 * watchdog.timeout_s)
            watchdog.touch()
    _reduce()
    return True


def test_allowed_phase_and_slow_rank_are_not_hangs(tmp_path):
    results, failures = _run(_slow, 3, tmp_path)
    assert results == [True] * 3, failures


def _finish_apart(rank, mesh, watchdog):
    last = rank == mesh.hdp_size - 1
    for _ in range(20 if last else 1):
        time.sleep(0.1 * watchdog.timeout_s)
        watchdog.touch()
    return True


def test_finishing_apart_is_not_a_hang(tmp_path):
    results, failures = _run(_finish_apart, 3, tmp_path)
    assert results == [True] * 3, failures


def _all_frozen(rank, mesh, watchdog):
    pids = [torch.zeros(1, dtype=torch.int64) for _ in range(mesh.hdp_size)]
    dist.all_gather(pids, torch.tensor([os.getpid()]))
    everyone = " ".join(str(int(pid)) for pid in pids)
    if rank == 0:
        frozen_s = 2.5 * watchdog.timeout_s
        script = f"sleep 0.3; kill -STOP {everyone}; sleep {frozen_s}; kill -CONT {everyone}"
        subprocess.Popen(["sh", "-c", script])
    began = time.monotonic()
    while time.monotonic() < began + 3.5 * watchdog.timeout_s:
        time.sleep(0.05)
        watchdog.touch()
    return True


def test_frozen_job_is_not_a_hang(tmp_path):
    results, failures = _run(_all_frozen, 2, tmp_path)
    assert results == [True] * 2, failures


def test_one_rank_needs_no_watchdog():
    with HDPMesh.create(device="cpu") as mesh:
        with Watchdog.start(mesh) as watchdog:
            watchdog.progress(step=1)
            with watchdog.waiting((0,)), watchdog.allow(1, "this"):
                watchdog.touch()
        with pytest.raises(KeyError), Watchdog.start(mesh):
            raise KeyError("mine")
        with pytest.raises(ValueError, match="timeout_s=0"):
            Watchdog.start(mesh, timeout_s=0)


def test_collective_errors_are_recognized():
    broken = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:7")
    assert is_collective_error(broken)
    assert is_collective_error(dist.DistNetworkError("socket"))
    wrapped = RuntimeError("saving step 3 failed")
    wrapped.__cause__ = broken
    assert is_collective_error(wrapped)
    assert not is_collective_error(ValueError("gloo"))
    assert not is_collective_error(RuntimeError("shape mismatch"))
    assert RankFailure("x", (2,)).ranks == (2,)


# ---- under torchrun ----

_SCRIPT = """
import os, signal
from pathlib import Path
import torch, torch.distributed as dist
from hdp.distributed.agree import is_collective_error
from hdp.distributed.mesh import HDPMesh
from hdp.distributed.watchdog import Watchdog

first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
patience_s = float(os.environ["PATIENCE_S"])
with HDPMesh.create(device="cpu") as mesh, Watchdog.start(mesh, timeout_s=patience_s) as watchdog:
    for step in range(20):
        watchdog.progress(step=step)
        if first and step == 5 and mesh.hdp_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.ones(1))
    Path(f"finished-{mesh.hdp_rank}").touch()
"""


def test_torchrun_restarts_after_kill_9(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(_SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "--max-restarts=1", str(script)],
        capture_output=True,
        text=True,
        env={**os.environ, "PATIENCE_S": str(patience(5))},
        timeout=patience(90),  # far below the collectives' half hour: the watchdog ends it
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(file.name for file in tmp_path.glob("finished-*")) == ["finished-0", "finished-1"]
