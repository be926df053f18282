"""OffloadEngine: what autograd saves in forward leaves the device and is back when backward asks.

`Forward` is one forward pass: a context around any model's forward, by saved_tensors_hooks. Each
tensor that autograd saves is kept, sent to the host, or replaced by a recipe (recipe.py). Copies
run on two streams of their own and are ordered by events (link.py); the host never waits for the
device, and so every decision is made in program order and memory does not depend on timing:

  1. pack: a share `ratio` of the bytes is to travel, in whole tensors, spread evenly over the
     forward so that the link is busy evenly too.
  2. A tensor is sent once `keep_bytes` more were saved after it. So the last ones, which backward
     needs first, never travel, without knowing beforehand where the forward ends.
  3. Device memory of a sent tensor is let go when `send_bytes` more were sent: by then its copy
     has usually left; where it has not, the kernels that would reuse it wait, the host does not.
  4. unpack: backward walks the saved tensors in about the reverse order, so whenever one is asked
     for, the ones before it are fetched until `prefetch_bytes` are on their way or waiting.
  5. When the last function that needs a tensor has run, its host memory is free for the next one.

Whole tensors and not a share of each one's rows, as the paper has it: the link sees the same
bytes at the same pace, but rows that stay would have to be copied out of their tensor in forward
and beside the returning ones in backward, and until then both copies take memory.

Invariants (each has a test of the same name in tests/runtime/test_offload*.py):

* gradients_are_bitwise_equal   to those without offload, for any ratio, buffers and copy timing
* no_race                       every two conflicting accesses are ordered by events
* nothing_leaks                 after backward, an exception or a dropped graph nothing is held
* modified_in_place_is_named    as without offload, and with the tensor's name
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from hdp.errors import FreedError

from .forward import Forward
from .link import Link
from .recipe import Recipe
from .saved import Passed, Saved, Wrapped
from .types import ActivationPolicy, CopyBuffers, Counts, LinkStats


@dataclass(slots=True, kw_only=True)
class _State:
    """What the engine and its forwards share."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    dropped: deque[Saved] = field(default_factory=deque)  # one entry per lost owner
    leaving: deque[Saved] = field(default_factory=deque)
    leaving_bytes: int = 0
    ahead_bytes: int = 0  # fetched and not yet asked for
    # Recipes by what they do and their place among the same ones of a forward.
    verified: set[tuple[str, int]] = field(default_factory=set)
    rejected: set[tuple[str, int]] = field(default_factory=set)


class OffloadEngine:
    """Moves what autograd saves over one link. One per device; any number of forwards.

    buffers: of forwards that are not given others.
    on_full: when the pool is full, "error" raises OffloadMemoryError at the end of the forward with
        what would have been needed; "keep" says so once and keeps tensors on the device.
    """

    def __init__(
        self,
        link: Link,
        *,
        buffers: CopyBuffers,
        on_full: Literal["error", "keep"] = "error",
    ) -> None:
        self.link, self.buffers, self.on_full = link, buffers, on_full
        self.counts = Counts()
        self._state = _State()
        self._open: weakref.WeakSet[Forward] = weakref.WeakSet()  # with tensors still to be sent
        self._closed = False

    def forward(
        self,
        policy: ActivationPolicy | None = None,
        *,
        buffers: CopyBuffers | None = None,
        min_bytes: int = 1 << 20,
    ) -> Forward:
        """Context manager around one forward pass. Tensors below min_bytes do not travel."""
        if self._closed:
            raise FreedError("the offload engine is closed")
        return Forward(self, policy or ActivationPolicy(), buffers or self.buffers, min_bytes)

    def stats(self) -> LinkStats:
        """What the link holds and has moved."""
        with self._state.lock:
            self._collect()
            return self.link.stats()

    def close(self) -> None:
        """Give all host memory back. A backward that still needs some of it raises FreedError."""
        with self._state.lock:
            self._collect()
            self._closed = True
            self._state.leaving.clear()
            self.link.close()

    def unpack(self, packed: Any) -> Tensor:
        """The tensor that `Forward.pack` was given. Raises ModifiedError or FreedError."""
        if isinstance(packed, Passed):
            return packed.unpack()
        if isinstance(packed, Wrapped):
            return packed.unpack(self.unpack)
        with self._state.lock:
            if self._closed:
                raise FreedError("backward needs tensors of an offload engine that was closed")
            self._collect()
            packed.check()
            saved = packed.saved
            late = self._request(saved)
            saved.forward._prefetch(saved, late)
            tensor = saved.view(self._value(saved), packed.geometry)
            if saved.owners == 1:  # whoever asked holds it now; another time it is fetched again
                self._let_go(saved)
            return tensor

    def _begin(self, forward: Forward) -> None:
        """A forward is entered. Those before it will be needed later than it: send their last."""
        with self._state.lock:
            self._collect()
            for earlier in list(self._open):
                earlier.flush()
            self._open.clear()
            self._open.add(forward)

    # ---- where values are ----

    def _request(self, saved: Saved) -> bool:
        """Start every copy that `_value` will wait for. Whether there was one."""
        if saved.value is not None and saved.stream != self.link.stream():
            self._let_go(saved)  # it is there for another stream
        if saved.value is not None:
            return False
        if saved.recipe is not None:
            late = [self._request(source) for source in saved.recipe.uses]  # all of them
            return any(late)
        if saved.block is not None:
            self._fetch(saved)
        return True

    def _value(self, saved: Saved) -> Tensor:
        """(num_bytes,) uint8 on the device, ready for the caller's stream."""
        if not saved.owners:
            raise FreedError(f"a saved tensor of {saved.num_bytes} bytes was used after its free")
        self._request(saved)
        if saved.value is None:
            assert saved.recipe is not None
            with saved.forward.recording_paused():
                saved.value, saved.stream = saved.recipe.run(self._value), self.link.stream()
            self._verify_checksum(saved)
            for source in saved.recipe.uses:
                if source.owners == 1:  # only us: it can be fetched or made again
                    self._let_go(source)
        self._settle(saved)
        self._arrived(saved)
        saved.asked = saved.forward._num_passes
        return saved.value

    def _fetch(self, saved: Saved) -> None:
        stream = saved.stream = self.link.stream()
        device = self.link.device
        saved.value = torch.empty(saved.num_bytes, dtype=torch.uint8, device=device)
        self.link.fetch(saved.block, saved.value, stream)
        saved.arriving = saved.ahead = True
        self._state.ahead_bytes += saved.num_bytes

    def _settle(self, saved: Saved) -> None:
        """Let the stream that owns the value wait for copies that read or write it."""
        if saved.leaving:
            saved.leaving = False
            self._state.leaving_bytes -= saved.num_bytes
            self.link.sent(saved.block, saved.stream)
        if saved.arriving:
            saved.arriving = False
            self.link.fetched(saved.block, saved.stream)

    def _let_go(self, saved: Saved) -> None:
        """Free the device memory of what can be had again."""
        if saved.value is None or (saved.block is None and saved.recipe is None):
            return
        self._settle(saved)
        self._arrived(saved)
        if saved.emptied:  # perhaps while it left: what the model fills in is what counts
            self.link.free(saved.block)
            saved.block = None
            return
        saved.value = None

    def _arrived(self, saved: Saved) -> None:
        """It is no longer fetched ahead of need."""
        if saved.ahead:
            saved.ahead = False
            self._state.ahead_bytes -= saved.num_bytes

    def _send(self, saved: Saved) -> None:
        """Start the copy out. Raises PoolFull."""
        assert saved.value is not None and saved.block is None
        state = self._state
        saved.block = self.link.send(saved.value, saved.stream)
        saved.leaving = True
        state.leaving.append(saved)
        state.leaving_bytes += saved.num_bytes
        while state.leaving_bytes > saved.forward.buffers.send_bytes or (
            state.leaving and not state.leaving[0].leaving
        ):
            oldest = state.leaving.popleft()
            if oldest.leaving:
                self._let_go(oldest)

    def _collect(self) -> None:
        """Free what has lost its last owner."""
        dropped = self._state.dropped
        while dropped:
            saved = dropped.popleft()
            saved.owners -= 1
            assert saved.owners >= 0
            if saved.owners:
                continue
            if not self._closed:
                self._settle(saved)
            self._arrived(saved)
            saved.value = None
            if saved.block is not None:
                self.link.free(saved.block)
                saved.block = None
            if saved.recipe is not None:
                dropped.extend(saved.recipe.uses)
                saved.recipe = None
            saved.forward._freed(saved)

    # ---- recipes that are used for the first time ----

    def _accepts(self, saved: Saved, recipe: Recipe, key: tuple[str, int]) -> bool:
        """Whether the recipe gives the bits that saved.value has. Waits for the device, once."""
        state = self._state
        if key in state.verified:
            return True
        if key in state.rejected:
            return False
        assert saved.value is not None
        with saved.forward.recording_paused():
            remade = recipe.run(self._value)
        self._let_go_sources(recipe)
        if torch.equal(remade, saved.value):
            saved.checksum = _checksum(saved.value)
            state.verified.add(key)
            return True
        state.rejected.add(key)
        warnings.warn(
            f"offload: a tensor of {saved.num_bytes} bytes is not what {recipe.signature} makes of "
            "its inputs, a kernel must have written to it unseen; it is saved instead"
        )
        return False

    def _let_go_sources(self, recipe: Recipe) -> None:
        for source in recipe.uses:
            if source.recipe is not None:
                self._let_go_sources(source.recipe)
            self._let_go(source)

    def _verify_checksum(self, saved: Saved) -> None:
        if saved.checksum is None:
            return
        assert saved.value is not None and saved.recipe is not None
        same = torch.equal(_checksum(saved.value), saved.checksum)
        saved.checksum = None
        if not same:
            raise RuntimeError(
                f"{saved.recipe.signature} made other bits in backward than in forward: an input "
                "was written to by a kernel that torch does not know of, or the operation is not "
                "deterministic. Use recompute_pointwise=0 and recompute_matmul=0 for this model"
            )


def _checksum(value: Tensor) -> Tensor:
    words = value[: value.numel() // 8 * 8].view(torch.int64)
    return torch.stack((words.sum(), value[words.numel() * 8 :].sum(dtype=torch.int64)))
