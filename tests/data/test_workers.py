"""ordered_map(): order of results, errors, and worker processes that die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hdp.data.prepare.workers import ordered_map
from tests.patience import wait_for


def scale(context, task):
    print("noise on stdout")  # must not mix with the results
    time.sleep(0.01 * (5 - task % 5))  # later tasks finish first
    return context * task


def fail_at_three(context, task):
    if task == 3:
        raise ValueError(f"task {task} is bad")
    if task == 4:
        raise Unpicklable(lambda: None)
    return task


def die_at_three(context, task):
    if task == 3:
        print("last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return task


class Unpicklable(Exception):
    pass


@pytest.mark.parametrize("num_workers", [1, 3])
def test_results_in_order(num_workers):
    done = []
    results = list(
        ordered_map(scale, 10, list(range(20)), num_workers=num_workers, on_done=done.append)
    )
    assert results == [10 * task for task in range(20)]
    assert sorted(done) == list(range(20))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_errors_keep_their_type(num_workers):
    results = ordered_map(fail_at_three, None, list(range(4)), num_workers=num_workers)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="task 3 is bad"):
        next(results)


def test_unpicklable_errors_arrive_as_text():
    with pytest.raises(RuntimeError, match="Unpicklable"):
        list(ordered_map(fail_at_three, None, [4], num_workers=2))


def test_death_is_reported():
    with pytest.raises(RuntimeError, match=r"(?s)SIGKILL \(out of memory\?\).*last words"):
        list(ordered_map(die_at_three, None, list(range(8)), num_workers=2))


PARENT = """
import os, sys, time
from hdp.data.prepare.workers import ordered_map
sys.path.insert(0, {folder!r})
import slow_task

if "child" in os.environ:  # the script has no __main__ guard: children must not run it again
    raise SystemExit("imported again")
os.environ["child"] = "1"
print(os.getpid(), flush=True)
list(ordered_map(slow_task.run, {log!r}, list(range(4)), num_workers=2))
"""
SLOW_TASK = """
import os, time

def run(log, task):
    with open(log, "a") as file:
        file.write(f"{os.getpid()}\\n")
    time.sleep(1000)
"""


def test_no_orphans(tmp_path):
    """After kill -9 of the parent, its workers exit immediately, even while running a task."""
    log = tmp_path / "pids"
    (tmp_path / "slow_task.py").write_text(SLOW_TASK)
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(folder=str(tmp_path), log=str(log)))
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE)
    try:
        wait_for(lambda: log.exists() and len(log.read_text().split()) == 2)
    finally:
        parent.kill()
    pids = [int(pid) for pid in log.read_text().split()]
    wait_for(lambda: not any(is_running(pid) for pid in pids))


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
