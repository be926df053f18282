"""run_ranks: run one function on several gloo ranks, one process each, and collect the results.

    def check(rank, world_size, seqlen):          # module-level, because it is pickled by name
        x = torch.full((seqlen,), float(rank))
        dist.all_reduce(x)
        return x

    results = run_ranks(check, 4, 10)             # [result of rank 0, ..., result of rank 3]

The default process group is initialized when `fn` starts, and every process has one thread. On
failure, a rank that raises is reported with its number and traceback, and a rank that dies with its
signal; ranks that hang are killed at the timeout and reported with their Python stacks.

Processes come from a fork server that imports torch once, so a run costs tenths of a second.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing as mp
import multiprocessing.connection
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.patience import patience

GRACE_S = 5.0  # after a first failure, the other ranks get this long to report their own

# One thread per rank, set before the fork server loads numeric libraries; and the checkout under
# test, not an installed hdp.
_ROOT = str(Path(__file__).resolve().parent.parent)
_ENVIRON = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, [_ROOT, os.environ.get("PYTHONPATH")])),
}

# Imported once by the fork server, which saves each rank half a second of CPU; modules that are not
# installed are skipped.
_PRELOAD = [
    "hypothesis",
    "pytest",
    "hdp.training.loop",  # imports torch and most of hdp
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
]


class RankError(AssertionError):
    """At least one rank failed, died or hung; `ranks` names them, the first to fail first."""

    def __init__(self, message: str, ranks: list[int]) -> None:
        super().__init__(message)
        self.ranks = ranks


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120.0
) -> list[Any]:
    """Run `fn(rank, world_size, *args)` on `world_size` gloo ranks; return the results by rank.

    Args:
        fn: a module-level function; `args` and results must be picklable (tensors are copied).
        timeout_s: limit in seconds for the whole run, including process start; scaled up on a
            loaded machine (tests/patience.py).

    Raises:
        RankError: a rank raised, died or hung; the message has its number and its traceback or
            stack.
    """
    timeout_s, grace_s = patience(timeout_s), patience(GRACE_S)
    with tempfile.TemporaryDirectory(prefix="run_ranks_") as directory:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        payload = pickle.dumps((fn, args))
        context = _fork_server()
        processes, pipes = [], []
        with _environ(_ENVIRON):  # the fork server starts with the first process
            for rank in range(world_size):
                receive, send = context.Pipe(duplex=False)
                process = context.Process(
                    target=_rank_main,
                    args=(rank, world_size, store.port, directory, timeout_s, send, payload),
                    name=f"rank{rank}",
                    daemon=True,
                )
                process.start()
                send.close()  # our copy: from now on, EOF on `receive` means the rank is gone
                processes.append(process)
                pipes.append(receive)
        try:
            return _collect(fn, processes, pipes, Path(directory), timeout_s, grace_s)
        finally:
            for process in processes:
                process.join(timeout=grace_s)
                if process.is_alive():
                    process.kill()
                    process.join()
            for pipe in pipes:
                pipe.close()


def _collect(fn, processes, pipes, directory: Path, timeout_s: float, grace_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    deadline = time.monotonic() + timeout_s
    waiting = dict(enumerate(pipes))
    while waiting and (left := deadline - time.monotonic()) > 0:
        for pipe in multiprocessing.connection.wait(list(waiting.values()), timeout=left):
            rank = pipes.index(pipe)
            del waiting[rank]
            try:
                ok, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                processes[rank].join(timeout=grace_s)
                ok, value = False, f"died without a result: {_exit_reason(processes[rank])}"
            if ok:
                results[rank] = value
            elif rank not in failures:
                failures[rank] = value
        if failures:
            deadline = min(deadline, time.monotonic() + grace_s)

    hung = {rank: _stack_of(processes[rank], rank, directory) for rank in waiting}
    for rank in waiting:
        processes[rank].kill()
    if failures or hung:
        # After a failure, waiting ranks are only a consequence; without one, they are the bug.
        reports = [f"rank {rank} failed: {text}" for rank, text in failures.items()]
        verb = "was left waiting in" if failures else f"hung for {timeout_s:g} s in"
        reports += [f"rank {rank} {verb}:\n{text}" for rank, text in hung.items()]
        name = getattr(fn, "__qualname__", fn)
        head = f"{name} on {len(processes)} ranks: {len(failures)} failed, {len(hung)} hung"
        raise RankError("\n\n".join([head, *reports]), [*failures, *hung])
    return [results[rank] for rank in range(len(processes))]


def _rank_main(rank, world_size, port, directory, timeout_s, send, payload) -> None:
    stacks = open(Path(directory) / f"stack{rank}", "w")  # noqa: SIM115 - open as long as the process
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        dist.init_process_group(
            "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
        fn, args = pickle.loads(payload)
        message = pickle.dumps((True, fn(rank, world_size, *args)))
    except BaseException:
        send.send_bytes(pickle.dumps((False, "\n" + traceback.format_exc())))
        os._exit(1)  # a group that lost a rank may hang in its destructor
    send.send_bytes(message)
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):
            dist.barrier()  # do not close sockets that other ranks are still reading from
            dist.destroy_process_group()
    os._exit(0)


def _exit_reason(process) -> str:
    code = process.exitcode
    if code is not None and code < 0:
        return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"


def _stack_of(process, rank: int, directory: Path) -> str:
    """The Python stack of a running rank, dumped by its own signal handler."""
    path = directory / f"stack{rank}"
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGUSR1)
    for _ in range(20):
        if path.exists() and path.stat().st_size:
            break
        time.sleep(0.05)
    return path.read_text() if path.exists() else "(it never started)"


def _fork_server():
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


@contextlib.contextmanager
def _environ(values: dict[str, str]) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
