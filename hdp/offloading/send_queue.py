"""SendQueue: which of a forward's tensors go to the host, and when they leave.

A share of the bytes is sent, in whole tensors, spread evenly over the forward to keep the link
evenly busy. A tensor is sent once `keep_bytes` more have been saved after it. So the last tensors,
which backward needs first, stay, without knowing in advance where the forward ends.

The paper sends a share of each tensor's rows. Whole tensors give the link the same bytes at the
same pace without extra copies: rows that stay would have to be copied out of their tensor in
forward and back next to the fetched rows in backward, with both copies in memory meanwhile.
"""

from __future__ import annotations

import warnings
from collections import deque
from typing import Literal

from hdp.errors import OffloadMemoryError

from .pool import rounded
from .store import Saved, Store
from .types import CopyBuffers, PoolFull, text_of

OnFull = Literal["error", "keep"]


class Quota:
    """Selects a share of bytes evenly: after each tensor, the selected bytes are as close to the
    share of all bytes so far as whole tensors allow."""

    def __init__(self, share: float) -> None:
        self._share, self._due = share, 0.0

    def takes(self, num_bytes: int) -> bool:
        self._due += self._share * num_bytes
        if 2 * self._due < num_bytes or not self._share:
            return False
        self._due -= num_bytes
        return True


class SendQueue:
    """The tensors of one forward on their way to the host. ratio: the share of bytes to send."""

    def __init__(self, store: Store, ratio: float, buffers: CopyBuffers, on_full: OnFull) -> None:
        self._store, self._ratio, self._buffers, self._on_full = store, ratio, buffers, on_full
        self._quota = Quota(ratio)
        self._waiting: deque[tuple[Saved, int]] = deque()  # (Saved, bytes saved up to it)
        self._saved_bytes = 0
        self._sent_bytes = self._missed_bytes = self._largest_bytes = 0  # of host memory

    def offer(self, saved: Saved) -> None:
        """Queue a new Saved to be sent once enough is saved after it, or keep it."""
        self._saved_bytes += saved.num_bytes
        if self._quota.takes(saved.num_bytes):
            self._waiting.append((saved, self._saved_bytes))
        else:
            self._store.counts.kept += saved.num_bytes
        while self._waiting:
            oldest, until = self._waiting[0]
            if self._saved_bytes - until < self._buffers.keep_bytes:
                break
            self._waiting.popleft()
            self._send(oldest)

    def flush(self) -> None:
        """Send the last tensors too: another forward runs before this one's backward."""
        while self._waiting:
            self._send(self._waiting.popleft()[0])

    def keep_the_rest(self) -> None:
        """Keep all tensors not yet sent: backward has begun."""
        while self._waiting:
            saved, _ = self._waiting.popleft()
            self._store.counts.kept += saved.num_bytes

    def drop(self) -> None:
        """Send nothing more: the forward failed."""
        self._waiting.clear()

    def check(self) -> None:
        """Raise OffloadMemoryError if host memory ran out, unless on_full is "keep"."""
        if self._missed_bytes and self._on_full == "error":
            raise OffloadMemoryError(self._what_would_fit())

    def _send(self, saved: Saved) -> None:
        if not saved.owners or saved.value is None:
            return
        counts = self._store.counts
        if saved.emptied:
            counts.kept += saved.num_bytes
            return
        wanted = rounded(saved.num_bytes)
        self._largest_bytes = max(self._largest_bytes, wanted)
        try:
            self._store.send(saved, self._buffers.send_bytes)
            self._sent_bytes += wanted
            counts.sent += saved.num_bytes
        except (PoolFull, MemoryError) as error:
            if not self._missed_bytes and self._on_full == "keep":
                warnings.warn(f"offload: {error}; what does not fit stays on the device")
            self._missed_bytes += wanted
            counts.kept += saved.num_bytes

    def _what_would_fit(self) -> str:
        stats = self._store.link.stats()
        others = stats.in_use_bytes - self._sent_bytes
        wanted = self._sent_bytes + self._missed_bytes
        room = max(stats.max_bytes - others, 0)
        # A quota may overshoot by half a tensor.
        fits = int(100 * self._ratio * max(room - self._largest_bytes, 0) / wanted) / 100
        return (
            f"offload: at ratio {self._ratio:.2f} this forward sends {text_of(wanted)}, but the "
            f"host pool of {text_of(stats.max_bytes)} has room for {text_of(room)} next to other "
            f"live forwards: ratio {fits:.2f} fits, or a pool of {text_of(wanted + others)}; with "
            "on_full='keep' the rest stays on the device"
        )
