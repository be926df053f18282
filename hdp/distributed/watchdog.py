"""Watchdog: when one rank dies, hangs or fails, the others name it and stop.

Without it, a lost rank leaves the others stuck in a collective until it times out, with a
"connection closed by peer" that names no rank. Here each rank has a daemon thread that reports what
its training thread is doing, over its own connection to the rendezvous store:

    with Watchdog.start(mesh, timeout_s=120) as watchdog:
        with watchdog.allow(1800, "tokenizing"):         # a long phase that is not a hang
            dataset = tokenize(...)
        for step in ...:
            for index, microbatch in enumerate(...):
                watchdog.progress(step=step, microbatch=index, ring=microbatch.ring)
                ...                                      # RingComm: watchdog.touch() per exchange
            with watchdog.waiting(what="gradient norm"):
                norm = ...item()

Rank 0's thread reads and judges the reports of all ranks (monitor.py). The others read only rank
0's report and the verdict, so each rank sends the store a few small requests per interval, whatever
the world size. On a verdict, each rank prints one line to stderr and exits with EXIT_CODE, and
torchrun restarts it; a rank whose collective broke raises RankFailure with the same text. An
exception that leaves the `with` block immediately becomes the verdict, with its message.

`timeout_s` must exceed the longest time between two signs of progress outside `allow`: one local
microbatch, or one exchange of a ring.

Invariants (tests of the same names in tests/distributed/test_watchdog.py): dead_rank_is_named,
stopped_rank_is_named, hanging_rank_is_named, failing_rank_is_quoted,
allowed_phase_and_slow_rank_are_not_hangs, finishing_apart_is_not_a_hang,
frozen_job_is_not_a_hang.
"""

from __future__ import annotations

import atexit
import faulthandler
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

import torch.distributed as dist

from hdp.errors import RankFailure

from .agree import is_collective_error
from .mesh import HDPMesh
from .monitor import Monitor, Report, Verdict, spans
from .tick_clock import TickClock

EXIT_CODE = 75  # EX_TEMPFAIL: a retry may succeed
TIMEOUT_S = 120.0
_STDERR = 2
LEAVE_S = 15.0  # how long a rank may take to exit by itself after raising


class Watchdog:
    """Sends this rank's reports and acts on the verdict. Does nothing in a single-rank run."""

    def __init__(self, *, rank: int, size: int, store: dist.Store | None, timeout_s: float) -> None:
        self.rank, self.size, self.timeout_s = rank, size, timeout_s
        # The store serves all ranks from one thread: at most about 2,000 ranks per second.
        self._interval_s = min(max(timeout_s / 10, 0.02), max(1.0, size / 2000))
        self._suspect_s = min(timeout_s, 4 * self._interval_s + 1.0)
        self._store = store
        self._process = f"{socket.gethostname()} pid {os.getpid()}"
        self._thread_id = threading.get_ident()  # the training thread's
        self._threads: list[threading.Thread] = []
        # Written by the training thread without a lock, read by the reporting thread.
        self._progress = 0
        self._place: dict[str, Any] = {}
        self._waiting_for: tuple[int, ...] | None = None
        self._allowance = _Allowance(0.0)
        self._stalled_s = 0.0
        # Guarded by _changed.
        self._changed = threading.Condition()
        self._asked = self._sent = 0  # flushes
        self._rounds = 0
        self._leaving = self._closing = self._done = False
        self._error = ""  # how a collective broke here
        self._accusation: Verdict | None = None  # this rank's, before all have adopted it
        self._verdict: Verdict | None = None

    @classmethod
    def off(cls) -> Watchdog:
        """A watchdog that watches nothing."""
        return cls(rank=0, size=1, store=None, timeout_s=TIMEOUT_S)

    @classmethod
    def start(cls, mesh: HDPMesh, *, timeout_s: float = TIMEOUT_S) -> Watchdog:
        """Start watching `mesh.hdp_group`. Collective. Use the result in a `with` statement.

        `timeout_s`: how long a rank may be silent, or all ranks may go without progress.
        """
        if not timeout_s > 0:
            raise ValueError(f"watchdog timeout_s={timeout_s} must be positive")
        if mesh.hdp_size == 1:
            return cls.off()
        nonce = [uuid.uuid4().hex]  # the store may survive a restart, and old reports with it
        source = dist.get_global_rank(mesh.hdp_group, 0)
        dist.broadcast_object_list(nonce, src=source, group=mesh.hdp_group)
        # A clone has its own connection, so the training thread never waits for ours.
        store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        store = dist.PrefixStore(f"hdp_watchdog/{nonce[0]}", store)
        watchdog = cls(rank=mesh.hdp_rank, size=mesh.hdp_size, store=store, timeout_s=timeout_s)
        store.set(f"report/{mesh.hdp_rank}", watchdog._report().to_json())
        if mesh.hdp_rank == 0:
            store.set("verdict", "")
        dist.barrier(group=mesh.hdp_group)  # now all keys exist: no read has to wait
        for name, loop in (("report", watchdog._report_loop), ("judge", watchdog._judge_loop)):
            thread = threading.Thread(target=loop, name=f"hdp-watchdog-{name}", daemon=True)
            watchdog._threads.append(thread)
            thread.start()
        atexit.register(watchdog._close)  # no thread may use the store while the interpreter exits
        return watchdog

    # ---- for the training thread: a few attribute writes ----

    def progress(
        self,
        *,
        step: int | None = None,
        microbatch: int | None = None,
        ring: tuple[int, ...] = (),
        what: str = "",
    ) -> None:
        """Signal progress and record where this rank is; `step` defaults to the current one.

        `ring`: ranks that share the microbatch.
        """
        step = self._place.get("step") if step is None else step
        self._place = {"step": step, "microbatch": microbatch, "ring": ring, "what": what}
        self._progress += 1

    def touch(self) -> None:
        """Signal progress without changing the recorded place."""
        self._progress += 1

    @contextmanager
    def waiting(self, ranks: tuple[int, ...] = (), what: str = "") -> Iterator[None]:
        """Wrap a wait for other ranks (() for all), so that this rank is not blamed for a hang."""
        place, outer = self._place, self._waiting_for
        self._place = {**place, "what": what} if what else place
        self._waiting_for = ranks
        self._progress += 1
        try:
            yield
            self._place = place  # not after an error: reports keep showing where it happened
        finally:
            self._waiting_for = outer
            self._progress += 1

    @contextmanager
    def allow(self, seconds: float, what: str) -> Iterator[None]:
        """Wrap a phase of up to `seconds` without progress: compilation, tokenization, export.

        Meanwhile no rank is considered hung, since all others may be waiting for this one.
        """
        place, outer = self._place, self._allowance
        self._place = {**place, "what": f"{what}, {seconds:g} s allowed"}
        self._allowance = _Allowance(seconds)
        self._progress += 1
        self._flush()  # the phase may hold the interpreter lock
        try:
            yield
            self._place = place
        finally:
            self._allowance = outer
            self._progress += 1

    # ---- leaving ----

    def stop(self) -> None:
        """Shut down cleanly: wait, still watching, until all ranks have called this."""
        if not self._threads or self._closing:
            return
        with self._changed:
            self._done = True
        self._flush()
        with self._changed:
            self._changed.wait_for(lambda: self._verdict is not None)
            self._leaving = True
        assert self._verdict is not None
        if self._verdict.ranks:
            raise self._failure(self._verdict)
        self._close()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None or (isinstance(error, SystemExit) and not error.code):
            self.stop()
        elif self._threads and not isinstance(error, RankFailure):
            self._leave_with(error)

    def _leave_with(self, error: BaseException) -> None:
        """Report `error` to the others; if a collective broke, first find out whose fault it is."""
        summary = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        victim = is_collective_error(error)
        with self._changed:
            self._leaving = True
            if victim:
                self._error = summary
            else:
                where = f"rank {self.rank} failed in {self._report().place}, {self._process}"
                self._accusation = Verdict(ranks=(self.rank,), text=f"{where}: {summary}")
        self._flush()
        if not victim:
            self._threads[0].join(timeout=self._farewell_s)
            return
        with self._changed:
            self._changed.wait_for(lambda: self._verdict is not None, timeout=3 * self.timeout_s)
        raise self._failure(self._verdict or Verdict(text=summary)) from error

    def _failure(self, verdict: Verdict) -> RankFailure:
        self._threads[0].join(timeout=self._farewell_s)
        return RankFailure(self._line(verdict), verdict.ranks)

    def _line(self, verdict: Verdict) -> str:
        return f"{verdict.text}; stopping rank {self.rank} in {self._report().place}"

    def _flush(self) -> None:
        """Have the reporting thread send a report now; give up after a short while."""
        if self._threads:
            with self._changed:
                self._asked += 1
                wanted = self._asked
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._sent >= wanted, timeout=self._farewell_s)

    def _close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(timeout=self._farewell_s)
        atexit.unregister(self._close)

    # ---- the reporting thread: the only one that uses the store ----

    @property
    def _farewell_s(self) -> float:
        """How long rank 0, which may host the store, stays so that others can read the verdict."""
        return 2 * self._interval_s + 0.5

    def _report_loop(self) -> None:
        monitor = Monitor(timeout_s=self.timeout_s, suspect_s=self._suspect_s)
        clock, progress = TickClock(2 * self._interval_s), self._progress
        try:
            while self._verdict is None and not self._closing:
                with self._changed:
                    self._changed.wait_for(self._wanted, timeout=self._interval_s)
                    asked = self._asked
                elapsed_s = clock.tick_s()
                self._stalled_s = 0.0 if progress != self._progress else self._stalled_s + elapsed_s
                progress = self._progress
                self._allowance.left_s = max(0.0, self._allowance.left_s - elapsed_s)
                verdict = self._round(monitor, elapsed_s)
                with self._changed:
                    self._rounds += 1
                    self._sent, self._verdict = asked, verdict
                    self._changed.notify_all()
            self._farewell()
        except RuntimeError as error:  # the store is unreachable: its host is gone
            self._lost_store(str(error).splitlines()[0])

    def _wanted(self) -> bool:
        return self._asked > self._sent or self._closing

    def _round(self, monitor: Monitor, elapsed_s: float) -> Verdict | None:
        """Send this rank's report, judge the reports it watches, and return the verdict, if any."""
        assert self._store is not None
        own = self._report()
        self._store.set(f"report/{self.rank}", own.to_json())
        watched = range(self.size) if self.rank == 0 else (0,)
        texts = self._store.multi_get([*(f"report/{rank}" for rank in watched), "verdict"])
        reports = {r: Report.from_json(text) for r, text in zip(watched, texts, strict=False)}
        monitor.hear(reports, elapsed_s, broken=bool(own.error))
        found = self._accusation or (monitor.verdict() if self.rank == 0 else monitor.silent())
        decided = texts[-1]
        if found and not decided:  # the first accusation becomes the verdict of all ranks
            decided = self._store.compare_set("verdict", "", json.dumps(asdict(found)))
        if not decided:
            return None
        fields = json.loads(decided)
        return Verdict(ranks=tuple(fields["ranks"]), text=fields["text"])

    def _report(self) -> Report:
        place = self._place
        line, in_collective = self._find_line() if self._stalled_s else ("", False)
        return Report(
            line=line,
            in_collective=in_collective,
            beat=self._rounds,
            stalled_s=self._stalled_s,
            allowed_s=self._allowance.left_s,
            waiting_for=None if self._waiting_for is None else spans(self._waiting_for),
            process=self._process,
            error=self._error,
            done=self._done,
            **(place | {"ring": spans(place.get("ring", ()))}),
        )

    def _find_line(self) -> tuple[str, bool]:
        """(the training thread's innermost line outside torch, whether in torch.distributed)."""
        frame = sys._current_frames().get(self._thread_id)
        if frame is None:
            return "thread exit", False
        in_collective = "torch/distributed/" in frame.f_code.co_filename
        while frame.f_back is not None and "/torch/" in frame.f_code.co_filename:
            frame = frame.f_back
        name = os.path.basename(frame.f_code.co_filename)
        return f"{name}:{frame.f_lineno} {frame.f_code.co_name}", in_collective

    def _farewell(self) -> None:
        assert self._store is not None
        left = self._store.add("left", 1)
        deadline = time.monotonic() + self._farewell_s
        while self.rank == 0 and left < self.size and time.monotonic() < deadline:
            time.sleep(self._interval_s / 10)
            left = self._store.add("left", 0)

    def _lost_store(self, reason: str) -> None:
        """The store's connection is lost: fine if this rank is done; else rank 0's node is gone."""
        text = f"rank 0 or its node stopped responding: its store is gone ({reason})"
        with self._changed:
            if self._verdict is None:
                self._verdict = Verdict() if self._done else Verdict(ranks=(0,), text=text)
            self._changed.notify_all()

    # ---- the judging thread: the only one that ends the process ----

    def _judge_loop(self) -> None:
        clock, rounds, silent_s = TickClock(2 * self._interval_s), 0, 0.0
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._closing or self._verdict is not None, timeout=self._interval_s
                )
                # A frozen store neither answers nor disconnects: the reporting thread is stuck.
                silent_s = silent_s + clock.tick_s() if rounds == self._rounds else 0.0
                rounds = self._rounds
                if silent_s > (self._suspect_s if self._error else self.timeout_s):
                    self._lost_store(f"no answer for {silent_s:.0f} s")
                if self._verdict is not None or self._closing:
                    break
        if self._verdict is not None and self._verdict.ranks:
            self._end_process(self._verdict)

    def _end_process(self, verdict: Verdict) -> None:
        # If all ranks raise the same error, ours is on its way out of the training thread too.
        with self._changed:
            self._changed.wait_for(lambda: self._leaving, timeout=min(1.0, self._farewell_s))
        if self._leaving:
            # The training thread raises, with its own traceback; threads that still wait for lost
            # ranks must not keep the process alive.
            time.sleep(LEAVE_S)
            self._say(f"rank {self.rank} still runs {LEAVE_S:g} s after its error; killing it")
            os._exit(EXIT_CODE)
        self._say(self._line(verdict))
        if self.rank in verdict.ranks:  # it hangs, but can still show where
            faulthandler.dump_traceback(file=_STDERR)
        self._threads[0].join(timeout=self._farewell_s)
        os._exit(EXIT_CODE)

    def _say(self, text: str) -> None:
        os.write(_STDERR, f"hdp watchdog: {text}\n".encode())  # a single write keeps lines intact


@dataclass(slots=True)
class _Allowance:
    """Time left of an allowed phase, counted down by the reporting thread."""

    left_s: float
