"""Deadlines: an upper bound on how long foreign code may take for one row.

A chat template is a program from somebody else, and a loop that does not end would hang the build
without a word. A thread watches how long the current row takes, and after the limit raises
RowTimeout in the thread that works on it. Python code can be stopped anywhere in this way, but not
a single operation of the interpreter, such as repeating a text a billion times.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class RowTimeout(BaseException):
    """A row took longer than its limit. Like KeyboardInterrupt, no `except Exception` stops it."""


class Deadlines:
    """Watches the thread that enters it; `with deadlines.row(limit_s):` bounds one row."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ends_at: float | None = None
        self._has_fired = False
        self._is_closed = threading.Event()

    def __enter__(self) -> Deadlines:
        self._worker = ctypes.c_ulong(threading.get_ident())
        self._is_closed.clear()
        self._thread = threading.Thread(target=self._watch, name="hdp-deadlines", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_closed.set()
        self._thread.join()

    @contextmanager
    def row(self, limit_s: float) -> Iterator[None]:
        """Raise RowTimeout in the block if it takes longer than limit_s."""
        with self._lock:
            self._ends_at, self._has_fired = time.monotonic() + limit_s, False
        was_raised = False
        try:
            yield
        except RowTimeout:
            was_raised = True
            raise
        finally:
            with self._lock:
                self._ends_at = None
            if self._has_fired and not was_raised:
                _let_it_come()

    def _watch(self) -> None:
        while not self._is_closed.wait(0.05):
            with self._lock:
                if self._ends_at is not None and time.monotonic() > self._ends_at:
                    self._ends_at, self._has_fired = None, True
                    error = ctypes.py_object(RowTimeout)
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(self._worker, error)


def _let_it_come() -> None:
    """Catch an exception that was set for this thread but not raised yet.

    It must not be withdrawn instead, by PyThreadState_SetAsyncExc(thread, NULL): CPython then keeps
    looking for it at every instruction, and never gets past one in a profiler or a debugger.
    """
    with suppress(RowTimeout):
        for _ in range(1000):
            time.sleep(0)
