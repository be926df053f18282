"""ordered_map(): maps a function over tasks in new processes, with results in task order.

This is not `multiprocessing`, because forking a process that uses CUDA, threads or a process group
is unsafe, and spawning imports the user's script again, which then needs a `__main__` guard. Here a
worker is a plain child that reads pickled tasks from stdin and writes pickled results to stdout.

Invariants, each with a test of the same name in tests/data/test_workers.py:

* no_orphans          a worker whose parent is gone (even by kill -9) sees its stdin close and exits
* death_is_reported   a worker that dies (out of memory, a crash in native code) raises an error
                      with its signal and the end of its stderr instead of hanging
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

# -I keeps the current folder off the path: a json.py there is not run instead of the library's.
# Before unpickling anything, a child gets the parent's sys.path so that it finds the same modules.
_START = (
    "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); "
    "from hdp.data.prepare.workers import serve; serve()"
)
_UTF8_MODE = ("-X", "utf8") if sys.flags.utf8_mode else ()  # -I ignores the variable for it
# There is one process per core, so each must use a single thread.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}


def num_cpus() -> int:
    """Number of cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


def ordered_map(
    function: Callable[[Any, Any], Any],
    context: Any,
    tasks: Sequence[Any],
    *,
    num_workers: int,
    on_done: Callable[[Any], None] = lambda task: None,
) -> Generator[Any, None, None]:
    """Yield function(context, task) for each task, in order.

    Args:
        function: a function in a module that children can import.
        context: pickled once per worker.
        tasks: pickled one at a time. With num_workers <= 1 they run here, without pickling.
        on_done: called with each task when it finishes (in any order, from any thread).

    Raises the first exception, in task order, that the function raises, or RuntimeError if a worker
    dies.
    """
    if num_workers <= 1:
        for task in tasks:
            yield function(context, task)
            on_done(task)
        return
    job = pickle.dumps((function, context))
    workers = [_Worker(job) for _ in range(num_workers)]
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def run(task: Any) -> Any:
        worker = idle.get()
        try:
            return worker.run(task)
        finally:
            idle.put(worker)
            on_done(task)

    threads = ThreadPoolExecutor(num_workers, thread_name_prefix="hdp-data")
    try:
        for future in [threads.submit(run, task) for task in tasks]:
            yield future.result()
    finally:
        for worker in workers:
            worker.kill()
        threads.shutdown(wait=True, cancel_futures=True)


class _Worker:
    def __init__(self, job: bytes) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed by kill()
        self._process = subprocess.Popen(
            [sys.executable, "-I", *_UTF8_MODE, "-c", _START],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, **_ENVIRONMENT},
        )
        self._job: bytes | None = pickle.dumps(sys.path) + job

    def run(self, task: Any) -> Any:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            if self._job is not None:  # sent from the worker's thread, so all workers start at once
                stdin.write(self._job)
                self._job = None
            pickle.dump(task, stdin)
            stdin.flush()
            is_result, value = pickle.load(stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            raise RuntimeError(self._death_message()) from error
        if is_result:
            return value
        raise value

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            try:
                if stream is not None:
                    stream.close()
            except OSError:
                pass  # closing a pipe with unsent bytes fails

    def _death_message(self) -> str:
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            code = 0
        cause = f"exit code {code}"
        if code < 0:
            cause = signal.Signals(-code).name
            cause += " (out of memory?)" if -code == signal.SIGKILL else ""
        self._errors.seek(0)
        stderr = self._errors.read()[-4000:].decode(errors="replace").strip()
        return f"a data worker died: {cause}" + (f"\n{stderr}" if stderr else "")


def serve() -> None:
    """A worker's main loop: tasks come from stdin, results go to the original stdout."""
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # library output must not mix with the results
    tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
    try:
        function, context = pickle.load(sys.stdin.buffer)
    except Exception as error:
        _send(results, False, _portable(error))
        return
    threading.Thread(target=_read_tasks, args=(tasks,), daemon=True).start()
    while True:
        try:
            value = function(context, tasks.get())
        except Exception as error:
            _send(results, False, _portable(error))
        else:
            _send(results, True, value)


def _read_tasks(tasks: queue.SimpleQueue[Any]) -> None:
    try:
        while True:
            tasks.put(pickle.load(sys.stdin.buffer))
    except BaseException:
        # The parent is gone or has closed the pipe. In a thread, sys.exit() would end only that.
        os._exit(0)


def _send(results: Any, is_result: bool, value: Any) -> None:
    pickle.dump((is_result, value), results)
    results.flush()


def _portable(error: Exception) -> Exception:
    """The error itself if it can be pickled, otherwise a RuntimeError with its traceback."""
    text = "".join(traceback.format_exception(error))
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(text)
    if not isinstance(error, ValueError):  # a ValueError is for users and needs no traceback
        copy.__cause__ = None
        print(text, file=sys.stderr, flush=True)
    return copy
