"""TwinStreams: a test double for a device, to check ordering by streams and events.

The engine runs on it unchanged. "Device" memory is ordinary CPU memory, kernels of the caller's
stream run at once (they are CPU kernels), and the copies of OUT and IN wait in queues. It answers
three questions without a GPU:

* Is every read ordered after what it reads? Copies run as late as the events allow (`order="lazy"`:
  only when someone waits for them), or at random moments. New memory is filled with NaN. So a
  missing wait shows up as a wrong gradient.
* Is it so under *any* timing? Every access has a vector clock, advanced by stream order and events
  alone. Two accesses to the same bytes, one of them a write, that no chain of events orders are
  added to `races`, whichever ran first. Freeing device memory is a write on the
  caller's stream, because the allocator hands it to that stream's next kernel.
* How long would it take? With `bytes_per_s` set, copies have start and end times; the caller says
  how long its kernels take (`compute`), and `stalled_s` is how long it had to wait for copies.
"""

from __future__ import annotations

import random
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hdp.offloading.streams import IN, OUT

CALLER, SIDE = "caller", "side"  # a model may queue kernels on a second stream
_CALLERS = (CALLER, SIDE)
_STREAMS = (*_CALLERS, OUT, IN)
_POISON = 255  # NaN in every floating-point format, -1 in every integer


@dataclass(frozen=True, slots=True)
class _Event:
    stream: str
    position: int  # operations queued on the stream before it
    clock: dict[str, int]
    time_s: float


@dataclass(frozen=True, slots=True)
class _Access:
    stream: str
    tick: int  # clock of its own stream
    start: int
    stop: int
    write: bool
    what: str


class TwinStreams:
    """See the module docstring.

    bytes_per_s: in each direction; None: copies take no time.
    """

    def __init__(
        self,
        *,
        order: Literal["lazy", "random", "eager"] = "lazy",
        seed: int = 0,
        bytes_per_s: float | None = None,
    ) -> None:
        self.device = torch.device("cpu")
        self.caller = CALLER  # the present one
        self.races: list[str] = []
        self.stalled_s = self.now_s = 0.0
        self._order, self._random, self._bytes_per_s = order, random.Random(seed), bytes_per_s
        self._queues: dict[str, deque[Callable[[], None] | _Event]] = {
            OUT: deque(),
            IN: deque(),
        }
        self._num_queued = dict.fromkeys(_STREAMS, 0)
        self._num_done = dict.fromkeys(_STREAMS, 0)
        self._clocks = {name: dict.fromkeys(_STREAMS, 0) for name in _STREAMS}
        self._ready_s = dict.fromkeys(_STREAMS, 0.0)
        self._accesses: dict[int, list[_Access]] = {}  # by storage
        self._storages: dict[int, weakref.ref] = {}

    # ---- Streams ----

    def current(self) -> str:
        return self.caller

    def record(self, stream: str) -> _Event:
        self._tick(stream)
        time_s = self.now_s if stream in _CALLERS else self._ready_s[stream]
        return _Event(stream, self._num_queued[stream], dict(self._clocks[stream]), time_s)

    def wait(self, stream: str, event: _Event) -> None:
        self._after(stream, event.clock)
        if stream in _CALLERS:
            self.stalled_s += max(0.0, event.time_s - self.now_s)
            self.now_s = max(self.now_s, event.time_s)
            self._run_until(event)
            return
        self._ready_s[stream] = max(self._ready_s[stream], event.time_s)
        self._queue(stream, event)

    def copy(self, stream: str, dst: Tensor, src: Tensor) -> None:
        assert dst.numel() == src.numel() and dst.dtype == src.dtype == torch.uint8
        mine = self._clocks[stream]
        if all(mine[caller] < self._clocks[caller][caller] for caller in self._used_callers()):
            self.races.append(f"a copy on {stream} does not wait for the caller's kernels so far")
        tick = self._tick(stream)
        sides = []
        for tensor, write in ((dst, True), (src, False)):
            storage, start = tensor.untyped_storage(), int(tensor.storage_offset())
            what = f"{'write' if write else 'read'} by a copy on {stream}"
            access = _Access(stream, tick, start, start + tensor.numel(), write, what)
            self._note(storage, access)
            sides.append((weakref.ref(storage), start))
        if stream == IN:
            dst.fill_(_POISON)
        if self._bytes_per_s:
            self._ready_s[stream] += dst.numel() / self._bytes_per_s
        num_bytes, (to, source) = dst.numel(), sides
        self._queue(stream, lambda: self._move(num_bytes, to, source, stream))

    def new_slab(self, num_bytes: int) -> Tensor:
        return torch.full((num_bytes,), _POISON, dtype=torch.uint8)

    def free_slab(self, slab: Tensor) -> None:
        slab.fill_(_POISON)

    def synchronize(self) -> None:
        """Return when OUT and IN are idle: what the caller does now is after all of it."""
        self._run_all()
        for stream in (OUT, IN):
            self._after(CALLER, self._clocks[stream])

    # ---- for simulations ----

    def read(self, tensor: Tensor) -> None:
        """A kernel of the present caller's stream reads the storage of `tensor`."""
        storage = tensor.untyped_storage()
        if id(storage) in self._accesses:
            what = f"read on {self.caller}"
            self._check(id(storage), _Access(self.caller, 0, 0, storage.nbytes(), False, what))

    def compute(self, seconds: float) -> None:
        """The caller's kernels take so long."""
        self.now_s += seconds

    # ---- running queued copies ----

    def _queue(self, stream: str, operation: Callable[[], None] | _Event) -> None:
        self._queues[stream].append(operation)
        self._num_queued[stream] += 1
        if self._order == "eager":
            self._run_all()
        while self._order == "random" and self._random.random() < 0.5:
            name = self._random.choice((OUT, IN))
            if self._queues[name]:
                self._run_next(name)

    def _run_all(self) -> None:
        for stream in (OUT, IN):
            while self._queues[stream]:
                self._run_next(stream)

    def _run_until(self, event: _Event) -> None:
        while self._num_done[event.stream] < event.position:
            self._run_next(event.stream)

    def _run_next(self, stream: str) -> None:
        operation = self._queues[stream][0]
        if isinstance(operation, _Event):
            if operation.stream not in _CALLERS:
                self._run_until(operation)
        else:
            operation()
        self._queues[stream].popleft()
        self._num_done[stream] += 1

    def _move(
        self,
        num_bytes: int,
        to: tuple[weakref.ref, int],
        source: tuple[weakref.ref, int],
        stream: str,
    ) -> None:
        storages = [ref() for ref, _ in (to, source)]
        if None in storages:
            self.races.append(f"a copy of {num_bytes} bytes on {stream} ran after memory was freed")
            return
        views = []
        for storage, (_, start) in zip(storages, (to, source), strict=True):
            view = torch.full((num_bytes,), _POISON, dtype=torch.uint8)
            if storage.nbytes() >= start + num_bytes:  # type: ignore[union-attr]
                view.set_(storage, start, (num_bytes,), (1,))  # type: ignore[arg-type]
            views.append(view)  # resized meanwhile: that memory is someone else's
        dst, src = views
        dst.copy_(src)

    # ---- happens-before order ----

    def _after(self, stream: str, clock: dict[str, int]) -> None:
        mine = self._clocks[stream]
        for name, tick in clock.items():
            mine[name] = max(mine[name], tick)

    def _tick(self, stream: str) -> int:
        self._clocks[stream][stream] += 1
        return self._clocks[stream][stream]

    def _used_callers(self) -> list[str]:
        return [x for x in _CALLERS if self._clocks[x][x]] or [CALLER]

    def _note(self, storage: Any, access: _Access) -> None:
        key = id(storage)
        if key not in self._storages:
            self._accesses[key] = []
            self._storages[key] = weakref.ref(storage, lambda _: self._freed(key))
        self._check(key, access)
        seen = self._accesses[key]
        if access.write:  # it is ordered after what it covers, or that was reported
            seen[:] = [x for x in seen if x.start < access.start or x.stop > access.stop]
        seen.append(access)

    def _freed(self, key: int) -> None:
        if self._accesses[key]:
            stop = max(x.stop for x in self._accesses[key])
            # Which caller's stream it is handed to is not known; one of them must be in order.
            known = len(self.races)
            for caller in self._used_callers():
                del self.races[known:]
                self._check(key, _Access(caller, 0, 0, stop, True, "freed"))
                if len(self.races) == known:
                    break
        del self._accesses[key], self._storages[key]

    def _check(self, key: int, new: _Access) -> None:
        clock = self._clocks[new.stream]
        for old in self._accesses[key]:
            overlap = max(old.start, new.start) < min(old.stop, new.stop)
            if overlap and (old.write or new.write) and old.tick > clock[old.stream]:
                num_bytes = min(old.stop, new.stop) - max(old.start, new.start)
                self.races.append(f"{num_bytes} bytes: {old.what} and {new.what} are not ordered")
