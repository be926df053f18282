"""BackwardOrder: what backward will ask for next, so that it is fetched before.

Backward walks the saved tensors of a forward in about the reverse order. So whenever one is asked
for, the ones before it are fetched until `prefetch_bytes` are on their way or waiting. Where
backward turns out to be elsewhere (branches, a retained graph), it goes on from there.
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
        self._uses: list[Saved] = []  # one Saved can be in it several times
        # In backward: the uses before it are still to be fetched. None: it has not begun.
        self._cursor: int | None = None
        self._num_passes = 1  # backward passes, the present one counted

    def add(self, saved: Saved) -> None:
        """A function saved it. What it is recomputed from is used by then, too."""
        while self._uses and not self._uses[-1].owners:  # backward is through with these
            self._uses.pop()
        self._cursor = None
        self._add(saved)

    def take(self, saved: Saved) -> Tensor:
        """(num_bytes,) uint8: backward asks for its value. Those before it are fetched."""
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
        """late: it was not fetched ahead, so backward is not where we expected it."""
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
                except torch.OutOfMemoryError:  # there is time: it is asked for later
                    self._cursor += 1
                    return
