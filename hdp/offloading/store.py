"""Store: tracks where the values that backward needs are, and moves them.

A Saved is a range of bytes that backward needs, shared by all functions that saved it. Its value is

    on the device    `value`
    on the host      `block`; `value` is also set during copies and after a fetch
    nowhere          `recipe` recomputes it from other Saved

The store moves values over one link. The host never waits, and the device memory of copies in
flight stays within a given limit. All methods are called with `lock` held.

A Saved is freed when its last owner is gone. Owners may go away in any thread at any time (in a
`__del__`), so they only append the Saved to `dropped`; `collect` frees it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from hdp.errors import OffloadFreedError

from .link import Link
from .tensors import Geometry, Range
from .types import Counts


class Recipe(Protocol):
    """How to recompute a Saved (recipe.py has the only implementation)."""

    uses: list[Saved]

    def run(self, value_of: Callable[[Saved], Tensor]) -> Tensor:
        """(num_bytes,) uint8, from the values of `uses`. On the current stream."""
        ...


class Saved:
    """A range of a storage that backward needs. See the module docstring.

    owners: graph nodes and recipes that need it; 0: freed
    home: the stream that saved it, on which backward will request it
    stream: the one that may use `value`
    leaving: the copy out may still read `value`; arriving: the copy in may still write it
    ahead: fetched but not requested yet
    asked: the last backward pass that requested it, counted from 1
    last_use: its last index in its forward's BackwardOrder
    """

    __slots__ = (
        *("range", "value", "block", "recipe", "owners", "home", "stream", "version"),
        *("leaving", "arriving", "ahead", "last_use", "asked"),
    )

    def __init__(self, range_: Range, value: Tensor, stream: Any, version: int) -> None:
        self.range, self.version = range_, version
        self.value: Tensor | None = value  # (num_bytes,) uint8
        self.home = self.stream = stream
        self.block: Any = None
        self.recipe: Recipe | None = None
        self.owners = 0
        self.leaving = self.arriving = self.ahead = False
        self.last_use = -1
        self.asked = 0

    @property
    def num_bytes(self) -> int:
        return self.range.num_bytes

    @property
    def emptied(self) -> bool:
        """Whether the model freed the memory of `value` (resize_), to refill it before backward, as
        Megatron's recomputation of single outputs does."""
        value = self.value
        if value is None:
            return False
        return value.untyped_storage().nbytes() < int(value.storage_offset()) + self.num_bytes

    def view(self, value: Tensor, geometry: Geometry) -> Tensor:
        """The view `geometry` of the original storage, rebuilt on `value`."""
        moved = self.range.start - int(value.storage_offset())
        return geometry.on(value.untyped_storage(), moved)


class Store:
    """See the module docstring."""

    def __init__(self, link: Link) -> None:
        self.link, self.device, self.counts = link, link.device, Counts()
        self.lock = threading.RLock()
        self.dropped: deque[Saved] = deque()  # one entry per lost owner
        self.ahead_bytes = 0  # fetched, not requested yet
        self.leaving_bytes = 0  # sent, device memory not released yet
        self.closed = False
        self._leaving: deque[Saved] = deque()

    def request(self, saved: Saved) -> bool:
        """Start every copy that `value` will wait for; return whether there was one."""
        if saved.value is not None and saved.stream != self.link.stream():
            self.let_go(saved)  # its value is ready for another stream only
        if saved.value is not None:
            return False
        if saved.recipe is not None:
            late = [self.request(source) for source in saved.recipe.uses]  # a list: request all
            return any(late)
        if saved.block is not None:
            self.fetch(saved)
        return True

    def value(self, saved: Saved, backward_pass: int = 0) -> Tensor:
        """(num_bytes,) uint8 on the device, ready for the caller's stream.

        backward_pass: the pass that requests it; 0: not requested by backward.
        """
        if not saved.owners:
            raise OffloadFreedError(
                f"a saved tensor of {saved.num_bytes} bytes was used after it was freed"
            )
        self.request(saved)
        if saved.value is None:
            assert saved.recipe is not None
            value = saved.recipe.run(lambda source: self.value(source, backward_pass))
            saved.value, saved.stream = value, self.link.stream()
            for source in saved.recipe.uses:
                if source.owners == 1:  # only this recipe needs it, and can get it again
                    self.let_go(source)
        self._settle(saved)
        self._arrived(saved)
        if backward_pass:
            saved.asked = backward_pass
        return saved.value

    def fetch(self, saved: Saved) -> None:
        """Start the copy to the device."""
        stream = saved.stream = self.link.stream()
        saved.value = torch.empty(saved.num_bytes, dtype=torch.uint8, device=self.device)
        self.link.fetch(saved.block, saved.value, stream)
        saved.arriving = saved.ahead = True
        self.ahead_bytes += saved.num_bytes

    def send(self, saved: Saved, send_bytes: int) -> None:
        """Start the copy to the host. Release the device memory of the oldest copies until at most
        send_bytes are left. Raises PoolFull."""
        assert saved.value is not None and saved.block is None
        saved.block = self.link.send(saved.value, saved.stream)
        saved.leaving = True
        self._leaving.append(saved)
        self.leaving_bytes += saved.num_bytes
        while self.leaving_bytes > send_bytes or (self._leaving and not self._leaving[0].leaving):
            oldest = self._leaving.popleft()
            if oldest.leaving:
                self.let_go(oldest)

    def let_go(self, saved: Saved) -> None:
        """Release its device memory, if it can be fetched or recomputed."""
        if saved.value is None or (saved.block is None and saved.recipe is None):
            return
        self._settle(saved)
        self._arrived(saved)
        if saved.emptied:  # perhaps during the copy out: use what the model refills
            self.link.free(saved.block)
            saved.block = None
            return
        saved.value = None

    def collect(self) -> None:
        """Free every Saved that has lost its last owner."""
        while self.dropped:
            saved = self.dropped.popleft()
            saved.owners -= 1
            assert saved.owners >= 0
            if saved.owners:
                continue
            if not self.closed:
                self._settle(saved)
            self._arrived(saved)
            saved.value = None
            if saved.block is not None:
                self.link.free(saved.block)
                saved.block = None
            if saved.recipe is not None:
                self.dropped.extend(saved.recipe.uses)
                saved.recipe = None

    def close(self) -> None:
        """Free all host memory."""
        self.collect()
        self.closed = True
        self._leaving.clear()
        self.link.close()

    def _settle(self, saved: Saved) -> None:
        """Make the stream that owns the value wait for copies that read or write it."""
        if saved.leaving:
            saved.leaving = False
            self.leaving_bytes -= saved.num_bytes
            self.link.sent(saved.block, saved.stream)
        if saved.arriving:
            saved.arriving = False
            self.link.fetched(saved.block, saved.stream)

    def _arrived(self, saved: Saved) -> None:
        """Stop counting it as prefetched."""
        if saved.ahead:
            saved.ahead = False
            self.ahead_bytes -= saved.num_bytes
