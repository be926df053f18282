"""The test harness itself: results by rank, and failures that name the rank."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

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


def test_hang_is_killed_and_shows_where():
    start = time.monotonic()
    with pytest.raises(RankError, match=r"rank 1 hung for 3 s(.|\n)*_planted_hang") as caught:
        run_ranks(_planted_hang, 2, timeout_s=3)
    assert caught.value.ranks == [1]
    assert time.monotonic() - start < 20
