"""BackwardOrder: predicts what backward needs next, to prefetch it.

Backward visits a forward's saved tensors in roughly reverse order. So each request also fetches the
preceding ones, until `prefetch_bytes` are in flight or waiting. If backward turns out to be
elsewhere (branches, a retained graph), prefetching continues from there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .send_queue import SendQueue
from .store import Saved, Store


class BackwardOrder:
    """The uses of a forward's Saved, in the order in which forward saved them."""

    def __init__(self, store: Store, queue: SendQueue, prefetch_bytes: int) -> None:
        self.store, self._queue, self._prefetch_bytes = store, queue, prefetch_bytes
        self._uses: list[Saved] = []  # a Saved may appear several times
        # In backward, the uses before it are yet to be fetched. None: backward has not begun.
        self._cursor: int | None = None
        self._num_passes = 1  # backward passes, including the current one

    def add(self, saved: Saved) -> None:
        """Append a use: a function saved it. Its recipe's sources are needed at the same time."""
        while self._uses and not self._uses[-1].owners:  # backward is done with these
            self._uses.pop()
        self._cursor = None
        self._add(saved)

    def take(self, saved: Saved) -> Tensor:
        """Its value for backward, (num_bytes,) uint8; prefetches the uses before it."""
        late = self.store.request(saved)
        self._queue.keep_the_rest()
        self._prefetch(saved, late)
        return self.store.value(saved, self._num_passes)

    def _add(self, saved: Saved) -> None:
        for source in saved.recipe.uses if saved.recipe is not None else ():
            self._add(source)
        if saved.recipe is None:
            self._uses.append(saved)
        saved.last_use = len(self._uses) - 1

    def _prefetch(self, saved: Saved, late: bool) -> None:
        """Fetch the uses before `saved`. late: it was not prefetched; backward is elsewhere."""
        store, stream = self.store, self.store.link.stream()
        if late and saved.asked == self._num_passes:
            self._num_passes += 1  # the graph was retained, and backward runs again
        if late or self._cursor is None:
            self._cursor = saved.last_use
        while self._cursor > 0 and store.ahead_bytes < self._prefetch_bytes:
            self._cursor -= 1
            earlier = self._uses[self._cursor]
            there = earlier.value is not None or earlier.block is None or earlier.home != stream
            if earlier.owners and not there and earlier.asked < self._num_passes:
                try:
                    store.fetch(earlier)
                except torch.OutOfMemoryError:  # not urgent: it is fetched on request
                    self._cursor += 1
                    return
