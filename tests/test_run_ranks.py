"""The test harness itself: results by rank, and failures that name the rank."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

import tests.patience
from tests.patience import patience, wait_for
from tests.run_ranks import RankError, run_ranks


def _sum_of_ranks(rank, world_size, scale):
    assert torch.get_num_threads() == 1
    x = torch.tensor([rank * scale])
    dist.all_reduce(x)
    return rank, world_size, x


def _raise_on_one(rank, world_size):
    if rank == 1:
        raise ValueError("a planted failure")
    dist.barrier()


def _die_on_one(rank, world_size):
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def _planted_hang(rank, world_size):
    if rank == 1:
        time.sleep(1000)


def test_results_come_by_rank():
    results = run_ranks(_sum_of_ranks, 3, 10)
    assert [(rank, world, int(x)) for rank, world, x in results] == [(r, 3, 30) for r in range(3)]


def test_failure_names_rank_and_traceback():
    with pytest.raises(RankError, match=r"rank 1 failed(.|\n)*a planted failure") as caught:
        run_ranks(_raise_on_one, 3)
    assert caught.value.ranks[0] == 1


def test_death_names_rank_and_signal():
    with pytest.raises(RankError, match=r"rank 2 .*SIGKILL"):
        run_ranks(_die_on_one, 3)


def test_hang_is_killed_and_shows_where(monkeypatch):
    factor = patience(2.0)
    monkeypatch.setenv("HDP_TEST_PATIENCE", str(factor))
    told = rf"rank 1 hung for {1.5 * factor:g} s(.|\n)*_planted_hang"
    with pytest.raises(RankError, match=told) as caught:
        run_ranks(_planted_hang, 2, timeout_s=1.5)
    assert caught.value.ranks == [1]
    assert not [p for p in multiprocessing.active_children() if p.name.startswith("rank")]


def test_patience_grows_with_the_load(monkeypatch):
    load = 0.0
    monkeypatch.delenv("HDP_TEST_PATIENCE", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(tests.patience, "_slowness", lambda: 0.2)
    assert patience(10) == 10
    load = 12.0
    assert patience(10) == 30
    monkeypatch.setattr(tests.patience, "_slowness", lambda: 5.0)
    assert patience(10) == 50
    load = 4000.0
    assert patience(10) == 10 * tests.patience.MOST
    monkeypatch.setenv("HDP_TEST_PATIENCE", "2")
    assert patience(10) == 20


@pytest.mark.timeout(500)
def test_every_test_has_a_limit_that_grows(request):
    """Set by conftest.py as the test starts; `--timeout` on the command line is taken as it is."""
    if request.config.getoption("timeout") is not None or "HDP_TEST_PATIENCE" in os.environ:
        pytest.skip("limits are set by hand")
    limit = request.node.get_closest_marker("timeout").args[0]
    assert 500 <= limit <= 500 * tests.patience.MOST
    assert float(request.config.getini("timeout")) > 0


def test_wait_for_gives_up(monkeypatch):
    monkeypatch.setenv("HDP_TEST_PATIENCE", "0.5")
    answers = iter([False, False, True])
    wait_for(lambda: next(answers))
    with pytest.raises(AssertionError, match="timed out"):
        wait_for(lambda: False, seconds=0.1)
