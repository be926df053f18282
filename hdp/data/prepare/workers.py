"""ordered_map(): a function over tasks in fresh processes, results in the order of the tasks.

Not `multiprocessing`: a fork of a process that holds CUDA, threads or a process group is not safe,
and its spawn imports the user's script again, which then needs a `__main__` guard. Here a worker is
a plain child that reads pickled tasks from its stdin and writes pickled results to its stdout.

* no_orphans      a worker whose parent is gone (kill -9 included) sees its stdin end, and exits
* death_is_told   a worker that dies (out of memory, a crash in native code) is an error with its
                  signal and its last words, not a hang
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

# Children find modules where the parent does, before they unpickle anything.
_START = (
    "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); "
    "from hdp.data.prepare.workers import serve; serve()"
)
# One process per core is all the parallelism there is.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}


def num_cpus() -> int:
    """Cores that this process may use."""
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
    """Yields function(context, task) for each task, in order.

    Args:
        function: a function of a module that children can import.
        context: pickled once per worker.
        tasks: pickled one by one. num_workers <= 1 runs them here, without pickling.
        on_done: called with each task that is done, as it gets done (in any order and thread).

    Raises what the function raises (the first in the order of tasks), or RuntimeError if a worker
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
            [sys.executable, "-c", _START],
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
            if self._job is not None:  # in the worker's thread: all start at once
                stdin.write(self._job)
                self._job = None
            pickle.dump(task, stdin)
            stdin.flush()
            is_result, value = pickle.load(stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            raise RuntimeError(self._last_words()) from error
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
                pass  # a pipe with unsent bytes

    def _last_words(self) -> str:
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            code = 0
        cause = f"exit code {code}"
        if code < 0:
            cause = signal.Signals(-code).name
            cause += " (out of memory?)" if -code == signal.SIGKILL else ""
        self._errors.seek(0)
        words = self._errors.read()[-4000:].decode(errors="replace").strip()
        return f"a data worker died: {cause}" + (f"\n{words}" if words else "")


def serve() -> None:
    """What a worker runs: tasks from stdin, results to the pipe that stdout was."""
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not get between the results
    tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
    try:
        function, context = pickle.load(sys.stdin.buffer)
    except Exception as error:
        _answer(results, False, _explained(error))
        return
    threading.Thread(target=_read_tasks, args=(tasks,), daemon=True).start()
    while True:
        try:
            value = function(context, tasks.get())
        except Exception as error:
            _answer(results, False, _explained(error))
        else:
            _answer(results, True, value)


def _read_tasks(tasks: queue.SimpleQueue[Any]) -> None:
    try:
        while True:
            tasks.put(pickle.load(sys.stdin.buffer))
    except BaseException:
        # The parent is gone, or wants no more. A thread cannot end a process politely.
        os._exit(0)


def _answer(results: Any, is_result: bool, value: Any) -> None:
    pickle.dump((is_result, value), results)
    results.flush()


def _explained(error: Exception) -> Exception:
    """The error itself if the parent can have it with its type, else what it said."""
    text = "".join(traceback.format_exception(error))
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(text)
    if not isinstance(error, ValueError):  # a ValueError is for users and says all
        copy.__cause__ = None
        print(text, file=sys.stderr, flush=True)
    return copy
