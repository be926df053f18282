"""Forward: one forward pass, seen through what autograd saves in it. See engine.py."""

from __future__ import annotations

import warnings
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hdp.errors import OffloadMemoryError

from .pool import rounded
from .recipe import MATMUL, POINTWISE, Recipe, Tape
from .saved import Packed, Passed, Saved, Wrapped
from .tensors import Range, geometry, is_parameter, storage_key, travelling_range
from .types import ActivationPolicy, CopyBuffers, PoolFull, text_of

if TYPE_CHECKING:
    from .engine import OffloadEngine


class _Quota:
    """Chooses a share of bytes, evenly: after each tensor the chosen bytes are as near to the share
    of all bytes so far as whole tensors allow."""

    def __init__(self, share: float) -> None:
        self._share, self._due = share, 0.0

    def takes(self, num_bytes: int) -> bool:
        self._due += self._share * num_bytes
        if 2 * self._due < num_bytes or not self._share:
            return False
        self._due -= num_bytes
        return True


class Forward:
    """A context around one forward pass; its backward may come at any time after it.

    Made by `OffloadEngine.forward`. Enter it once.
    """

    def __init__(
        self, engine: OffloadEngine, policy: ActivationPolicy, buffers: CopyBuffers, min_bytes: int
    ) -> None:
        if min_bytes < 1:
            raise ValueError(f"offload: min_bytes={min_bytes} must be 1 or more")
        self._engine, self._min_bytes = engine, min_bytes
        self.policy, self.buffers, self.device = policy, buffers, engine.link.device
        self.uses: list[Saved] = []  # in the order in which forward saved them, again and again
        self._cursor: int | None = None  # in backward: the uses before it are still to be fetched
        self._num_passes = 1  # backward passes, the present one counted
        self._num_alive = 0
        self._known: dict[int, tuple[list[Saved], weakref.ref]] = {}  # by storage
        self._total_bytes = 0
        self._sent_bytes = self._missed_bytes = self._largest_bytes = 0  # of host memory
        self._to_send: deque[tuple[Saved, int]] = deque()  # with the bytes saved up to it
        self._num_packed = 0
        self._num_recipes: dict[str, int] = {}
        self._quota = _Quota(policy.ratio)
        self._recipe_quotas = {
            POINTWISE: _Quota(policy.recompute_pointwise),
            MATMUL: _Quota(policy.recompute_matmul),
        }
        kinds = {kind for kind in (POINTWISE, MATMUL) if getattr(policy, f"recompute_{kind}")}
        self._tape = Tape(self, kinds, min_bytes) if kinds else None
        self._hooks: Any = None

    # ---- the context ----

    def __enter__(self) -> Forward:
        assert self._hooks is None, "a Forward is entered once; make another one"
        self._engine._begin(self)
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, self._engine.unpack)
        self._hooks.__enter__()
        if self._tape is not None:
            self._tape.__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self._tape is not None:
            self._tape.__exit__(kind, error, trace)
            self._tape.clear()
        self._hooks.__exit__(kind, error, trace)
        if kind is not None:
            self._to_send.clear()
        elif self._missed_bytes and self._engine.on_full == "error":
            raise OffloadMemoryError(self._what_would_fit())

    # ---- saving ----

    def pack(self, tensor: Tensor) -> Any:
        """What stands for `tensor` in the autograd graph; `OffloadEngine.unpack` gives it back."""
        self._num_packed += 1
        if self._stays(tensor):
            return Passed(tensor)
        if hasattr(tensor, "trigger_wait"):  # a collective may still write to it
            return self.pack(tensor.trigger_wait())
        if is_traceable_wrapper_subclass(tensor):
            return Wrapped(tensor, self.pack)
        with self._engine._state.lock, self.recording_paused():
            self._engine._collect()
            range_ = travelling_range(tensor)
            if range_ is None or range_.num_bytes < self._min_bytes:
                return Passed(tensor)
            saved = self.find(tensor)
            fresh = saved is None
            if saved is None:
                saved = self._new(tensor, range_)
            name = "an input" if tensor.grad_fn is None else f"output of {tensor.grad_fn.name()}"
            name = f"saved tensor {self._num_packed} of the forward ({name})"
            packed = Packed(saved, geometry(tensor), tensor, name, self._engine._state.dropped)
            if fresh:
                self._treat(saved, tensor)
            self._use(saved)
            return packed

    def find(self, tensor: Tensor) -> Saved | None:
        """The Saved that holds the present value of `tensor`, if there is one."""
        entry = self._known.get(storage_key(tensor.untyped_storage()))
        if entry is None:
            return None
        wanted, version = travelling_range(tensor), tensor._version
        for saved in entry[0]:
            if wanted and saved.owners and saved.version == version and saved.range.covers(wanted):
                return saved
        return None

    def save_source(self, tensor: Tensor) -> Saved:
        """A Saved for what a recipe needs. It has no owner yet."""
        whole = Range(0, tensor.untyped_storage().nbytes())
        return self.find(tensor) or self._new(tensor, whole)

    def before_write(self, tensor: Tensor) -> None:
        """`tensor` is about to be modified in place: recipes go on using its present value."""
        entry = self._known.get(storage_key(tensor.untyped_storage()))
        with self._engine._state.lock, self.recording_paused():
            for saved in entry[0] if entry is not None else ():
                if saved.value is None or not saved.owners:
                    continue
                if saved.block is not None or saved.recipe is not None:
                    self._engine._let_go(saved)
                else:
                    saved.value = saved.value.clone()

    @contextmanager
    def recording_paused(self) -> Iterator[None]:
        """What runs inside is ours, not the model's."""
        if self._tape is None or self._tape.paused:
            yield
            return
        self._tape.paused = True
        try:
            yield
        finally:
            self._tape.paused = False

    def _stays(self, tensor: Tensor) -> bool:
        plain = tensor.layout == torch.strided and tensor.device == self.device
        if not plain or not tensor.numel() or tensor.is_quantized:
            return True
        if tensor.is_conj() or tensor.is_neg():
            return True
        if not is_traceable_wrapper_subclass(tensor):
            if type(tensor) is not Tensor:
                return True
            if tensor.untyped_storage().nbytes() < self._min_bytes:
                return True
        return is_parameter(tensor)

    def _new(self, tensor: Tensor, range_: Range) -> Saved:
        storage = tensor.untyped_storage()
        saved = Saved(self, range_, self._engine.link.stream(), tensor._version)
        saved.value = range_.of(storage)
        key = storage_key(storage)
        if key not in self._known:
            known = weakref.ref(self)

            def died(_: Any) -> None:
                forward = known()
                if forward is not None:
                    forward._known.pop(key, None)

            self._known[key] = ([], weakref.ref(storage, died))
        self._known[key][0].append(saved)
        self._num_alive += 1
        return saved

    def _treat(self, saved: Saved, tensor: Tensor) -> None:
        """Decide whether a new Saved is made again, travels or stays."""
        recipe = self._recipe(saved, tensor)
        if recipe is None:
            self._offer(saved)
            return
        saved.recipe, saved.value = recipe, None
        self._engine.counts.recomputed += saved.num_bytes

    def _recipe(self, saved: Saved, tensor: Tensor) -> Recipe | None:
        if self._tape is None:
            return None
        kind = self._tape.kind_of(tensor)
        recipe = None
        if kind is not None and self._recipe_quotas[kind].takes(saved.num_bytes):
            recipe = self._tape.recipe(tensor)
        self._tape.forget(tensor)
        if recipe is None:
            return None
        saved.range = Range(0, tensor.untyped_storage().nbytes())
        saved.value = saved.range.of(tensor.untyped_storage())
        place = self._num_recipes.get(recipe.signature, 0)
        self._num_recipes[recipe.signature] = place + 1
        fresh = [source for source in recipe.uses if not source.owners]
        for source in recipe.uses:
            source.owners += 1
        if not self._engine._accepts(saved, recipe, (recipe.signature, place)):
            self._engine._state.dropped.extend(recipe.uses)
            return None
        for source in fresh:
            self._offer(source)
        return recipe

    def _offer(self, saved: Saved) -> None:
        """Step 1 and 2 of engine.py: it may travel, once enough has been saved after it."""
        self._total_bytes += saved.num_bytes
        if self._quota.takes(saved.num_bytes):
            self._to_send.append((saved, self._total_bytes))
        else:
            self._engine.counts.kept += saved.num_bytes
        while self._to_send:
            oldest, until = self._to_send[0]
            if self._total_bytes - until < self.buffers.keep_bytes:
                break
            self._to_send.popleft()
            self._send(oldest)

    def _send(self, saved: Saved) -> None:
        if not saved.owners or saved.value is None:
            return
        if saved.emptied:
            self._engine.counts.kept += saved.num_bytes
            return
        wanted = rounded(saved.num_bytes)
        self._largest_bytes = max(self._largest_bytes, wanted)
        try:
            self._engine._send(saved)
            self._sent_bytes += wanted
            self._engine.counts.sent += saved.num_bytes
        except (PoolFull, MemoryError) as error:
            if not self._missed_bytes and self._engine.on_full == "keep":
                warnings.warn(f"offload: {error}; what does not fit stays on the device")
            self._missed_bytes += wanted
            self._engine.counts.kept += saved.num_bytes

    def _keep_the_rest(self) -> None:
        """What is still to be sent stays."""
        while self._to_send:
            saved, _ = self._to_send.popleft()
            self._engine.counts.kept += saved.num_bytes

    def flush(self) -> None:
        """Send the last ones too: another forward runs before this one's backward."""
        while self._to_send:
            self._send(self._to_send.popleft()[0])

    def _what_would_fit(self) -> str:
        stats = self._engine.link.stats()
        others = stats.in_use_bytes - self._sent_bytes
        wanted = self._sent_bytes + self._missed_bytes
        room, ratio = max(stats.max_bytes - others, 0), self.policy.ratio
        # A quota may be over by half a tensor.
        fits = int(100 * ratio * max(room - self._largest_bytes, 0) / wanted) / 100
        return (
            f"offload: at ratio {ratio:.2f} this forward sends {text_of(wanted)}, but the host "
            f"pool of {text_of(stats.max_bytes)} has room for {text_of(room)} beside other live "
            f"forwards: ratio {fits:.2f} fits, or a pool of {text_of(wanted + others)}; with "
            "on_full='keep' the rest stays on the device"
        )

    # ---- backward ----

    def _use(self, saved: Saved) -> None:
        for source in saved.recipe.uses if saved.recipe is not None else ():
            self._use(source)
        if saved.recipe is None:
            self.uses.append(saved)
        saved.last_use = len(self.uses) - 1

    def _prefetch(self, saved: Saved, late: bool) -> None:
        """Step 4 of engine.py: fetch what was saved before `saved`, latest first.

        late: it was not fetched ahead, so backward is not where we expected it.
        """
        self._keep_the_rest()  # backward has begun
        engine, stream = self._engine, self._engine.link.stream()
        if late and saved.asked == self._num_passes:
            self._num_passes += 1  # the graph was retained, and backward runs again
        if late or self._cursor is None:
            self._cursor = saved.last_use
        while self._cursor > 0 and engine._state.ahead_bytes < self.buffers.prefetch_bytes:
            self._cursor -= 1
            earlier = self.uses[self._cursor]
            there = earlier.value is not None or earlier.block is None or earlier.home != stream
            if earlier.owners and not there and earlier.asked < self._num_passes:
                try:
                    engine._fetch(earlier)
                except torch.OutOfMemoryError:  # there is time: it is asked for later
                    self._cursor += 1
                    return

    def _freed(self, saved: Saved) -> None:
        self._num_alive -= 1
        if not self._num_alive:
            self.uses.clear()
            self._known.clear()
            self._cursor = None
