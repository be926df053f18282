"""StopSignals: a signal ends a run after the current step, with a checkpoint.

Schedulers announce the end of a job by SIGTERM (torchrun passes it on to its ranks and kills them
30 s later) or by a signal that the job script asks for (Slurm: `--signal=USR1@600`); SIGINT is
Ctrl-C, SIGHUP a closed terminal. While a run trains, each of them only sets a flag. The loop reads
it between steps, and all ranks stop after the same one. A second Ctrl-C stops at once.

A signal that the process ignores already (nohup) stays ignored. Outside the main thread Python
cannot install handlers; there the signals keep their usual effect.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

STOPPING = tuple(
    getattr(signal, name)
    for name in ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP")
    if hasattr(signal, name)
)


class StopSignals:
    """A context manager; `received` is the number of the first signal, or 0."""

    def __init__(self, say: Callable[[str], None] = lambda message: None) -> None:
        self.received = 0
        self._say = say
        self._previous: dict[int, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.received:
            self.received = number
            again = "; press Ctrl-C again to stop now" if number == signal.SIGINT else ""
            name = signal.Signals(number).name
            self._say(f"{name}: saving a checkpoint after this step, then stopping{again}")

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            # None: a handler that was not installed from Python, which we cannot restore.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}
