"""Watchdog: when one rank dies, hangs or fails, the others say which one and stop.

Without it a lost rank shows as the others sitting in a collective until its timeout, and then as a
"connection closed by peer" that names no rank. Here each rank has a daemon thread that tells the
others what its training thread is doing, through a connection of its own to the rendezvous store:

    with Watchdog.start(mesh, timeout_s=120) as watchdog:
        with watchdog.allow(1800, "tokenising"):         # a long phase that is no hang
            dataset = tokenise(...)
        for step in ...:
            for index, microbatch in enumerate(...):
                watchdog.progress(step=step, microbatch=index, ring=microbatch.ring)
                ...                                      # RingComm: watchdog.touch() per exchange
            with watchdog.waiting(what="gradient norm"):
                norm = ...item()

Rank 0's thread reads the reports of all ranks and judges them (monitor.py); all others read only
rank 0's report and its verdict, so the store sees a few small requests per rank and interval,
whatever the world size. On a verdict each rank prints one line on stderr and ends with EXIT_CODE,
so that torchrun restarts it; a rank whose collective broke raises RankFailure with the same text.
An exception that leaves the `with` block becomes the verdict at once, with its message.

`timeout_s` must exceed the longest time between two signs of progress outside `allow`: one local
microbatch, or one exchange of a ring.

Invariants (tests of the same names in tests/distributed/test_watchdog.py): dead_rank_is_named,
stopped_rank_is_named, hanging_rank_is_named, failing_rank_is_quoted, allowed_phase_is_no_hang,
slow_rank_is_no_hang, finishing_apart_is_no_alarm, frozen_job_is_no_alarm, progress_is_cheap.
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

EXIT_CODE = 75  # EX_TEMPFAIL: worth another try
TIMEOUT_S = 120.0
_STDERR = 2
LEAVE_S = 15.0  # how long a rank that raises may take to end by itself


class Watchdog:
    """This rank's reports, and its reaction to the verdict. With one rank it does nothing."""

    def __init__(self, *, rank: int, size: int, store: dist.Store | None, timeout_s: float) -> None:
        self.rank, self.size, self.timeout_s = rank, size, timeout_s
        # The store has one thread for all ranks: at most some 2,000 ranks per second.
        self._interval_s = min(max(timeout_s / 10, 0.02), max(1.0, size / 2000))
        self._suspect_s = min(timeout_s, 4 * self._interval_s + 1.0)
        self._store = store
        self._process = f"{socket.gethostname()} pid {os.getpid()}"
        self._thread_id = threading.get_ident()  # the training thread's
        self._threads: list[threading.Thread] = []
        # Written by the training thread without a lock, read by the talking thread.
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
        self._error = ""  # a collective broke here
        self._accusation: Verdict | None = None  # found here, not yet the verdict of all
        self._verdict: Verdict | None = None

    @classmethod
    def off(cls) -> Watchdog:
        """One that watches nobody."""
        return cls(rank=0, size=1, store=None, timeout_s=TIMEOUT_S)

    @classmethod
    def start(cls, mesh: HDPMesh, *, timeout_s: float = TIMEOUT_S) -> Watchdog:
        """Start watching over `mesh.hdp_group`. Collective. Use the result in a `with` statement.

        `timeout_s`: how long silence of a rank, or lack of progress of all ranks, may last.
        """
        if not timeout_s > 0:
            raise ValueError(f"watchdog timeout_s={timeout_s} must be positive")
        if mesh.hdp_size == 1:
            return cls.off()
        nonce = [uuid.uuid4().hex]  # the store may outlive a restart: old reports must not count
        source = dist.get_global_rank(mesh.hdp_group, 0)
        dist.broadcast_object_list(nonce, src=source, group=mesh.hdp_group)
        # A clone has a connection of its own: it never makes the training thread wait.
        store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        store = dist.PrefixStore(f"hdp_watchdog/{nonce[0]}", store)
        watchdog = cls(rank=mesh.hdp_rank, size=mesh.hdp_size, store=store, timeout_s=timeout_s)
        store.set(f"report/{mesh.hdp_rank}", watchdog._report().to_json())
        if mesh.hdp_rank == 0:
            store.set("verdict", "")
        dist.barrier(group=mesh.hdp_group)  # all keys exist: no read has to wait
        for name, loop in (("talk", watchdog._talk), ("judge", watchdog._judge)):
            thread = threading.Thread(target=loop, name=f"hdp-watchdog-{name}", daemon=True)
            watchdog._threads.append(thread)
            thread.start()
        atexit.register(watchdog._close)  # no thread may be in the store when the interpreter goes
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
        """A sign of progress, and where this rank is; without `step`, in the same step as before.

        `ring`: ranks that share the microbatch.
        """
        step = self._place.get("step") if step is None else step
        self._place = {"step": step, "microbatch": microbatch, "ring": ring, "what": what}
        self._progress += 1

    def touch(self) -> None:
        """A sign of progress in the same place."""
        self._progress += 1

    @contextmanager
    def waiting(self, ranks: tuple[int, ...] = (), what: str = "") -> Iterator[None]:
        """Around a wait for other ranks ((): all): this rank is not the culprit of a hang."""
        place = self._place
        self._place = {**place, "what": what} if what else place
        self._waiting_for = ranks
        self._progress += 1
        try:
            yield
            self._place = place  # but after an error the report keeps telling where it happened
        finally:
            self._waiting_for = None
            self._progress += 1

    @contextmanager
    def allow(self, seconds: float, what: str) -> Iterator[None]:
        """Around a phase without progress of up to `seconds`: compilation, tokenising, export.

        No rank is taken for hanging meanwhile, as all others may be waiting for this one.
        """
        place, outer = self._place, self._allowance
        self._place = {**place, "what": f"{what}, {seconds:g} s allowed"}
        self._allowance = _Allowance(seconds)
        self._progress += 1
        self._flush()  # what follows may hold the interpreter lock
        try:
            yield
            self._place = place
        finally:
            self._allowance = outer
            self._progress += 1

    # ---- leaving ----

    def stop(self) -> None:
        """End well: wait until all ranks have got here, watching them until then."""
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
        """Tell the others of `error`; if a collective broke, find out whose fault it is first."""
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
        """Have the talking thread send a report now; do not insist."""
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

    # ---- the talking thread: the only one that uses the store ----

    @property
    def _farewell_s(self) -> float:
        """How long rank 0, which may host the store, stays for others to read the verdict."""
        return 2 * self._interval_s + 0.5

    def _talk(self) -> None:
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
        except RuntimeError as error:  # the store broke: its host is gone
            self._lost_store(str(error).splitlines()[0])

    def _wanted(self) -> bool:
        return self._asked > self._sent or self._closing

    def _round(self, monitor: Monitor, elapsed_s: float) -> Verdict | None:
        """Send this rank's report; read and judge those that it watches; return the verdict."""
        assert self._store is not None
        own = self._report()
        self._store.set(f"report/{self.rank}", own.to_json())
        watched = range(self.size) if self.rank == 0 else (0,)
        texts = self._store.multi_get([*(f"report/{rank}" for rank in watched), "verdict"])
        reports = {r: Report.from_json(text) for r, text in zip(watched, texts, strict=False)}
        monitor.hear(reports, elapsed_s, broken=bool(own.error))
        found = self._accusation or (monitor.verdict() if self.rank == 0 else monitor.silent())
        decided = texts[-1]
        if found and not decided:  # the first to say so is the one that all ranks repeat
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
        """The training thread's place in code outside of torch, and: is it in torch.distributed?"""
        frame = sys._current_frames().get(self._thread_id)
        if frame is None:
            return "its end", False
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
        """End of the connection to the store: good if all are done, else rank 0's node is gone."""
        text = f"rank 0 or its node stopped answering: its store is gone ({reason})"
        with self._changed:
            if self._verdict is None:
                self._verdict = Verdict() if self._done else Verdict(ranks=(0,), text=text)
            self._changed.notify_all()

    # ---- the judging thread: the only one that ends the process ----

    def _judge(self) -> None:
        clock, rounds, silent_s = TickClock(2 * self._interval_s), 0, 0.0
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._closing or self._verdict is not None, timeout=self._interval_s
                )
                # A stopped store answers nothing and breaks no connection: the talk never returns.
                silent_s = silent_s + clock.tick_s() if rounds == self._rounds else 0.0
                rounds = self._rounds
                if silent_s > (self._suspect_s if self._error else self.timeout_s):
                    self._lost_store(f"no answer for {silent_s:.0f} s")
                if self._verdict is not None or self._closing:
                    break
        if self._verdict is not None and self._verdict.ranks:
            self._end_process(self._verdict)

    def _end_process(self, verdict: Verdict) -> None:
        # An error that all ranks agree on is on its way out of the training thread here too.
        with self._changed:
            self._changed.wait_for(lambda: self._leaving, timeout=min(1.0, self._farewell_s))
        if self._leaving:
            # It raises, with its own traceback. Threads that wait for lost ranks must not keep it.
            time.sleep(LEAVE_S)
            self._say(f"rank {self.rank} still runs {LEAVE_S:g} s after its error; stopping it")
            os._exit(EXIT_CODE)
        self._say(self._line(verdict))
        if self.rank in verdict.ranks:  # it hangs, but can still tell where
            faulthandler.dump_traceback(file=_STDERR)
        self._threads[0].join(timeout=self._farewell_s)
        os._exit(EXIT_CODE)

    def _say(self, text: str) -> None:
        os.write(_STDERR, f"hdp watchdog: {text}\n".encode())  # one write: lines stay whole


@dataclass(slots=True)
class _Allowance:
    """What is left of an allowed phase, counted down by the talking thread."""

    left_s: float
