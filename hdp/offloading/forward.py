"""Forward: decides what happens to each tensor that autograd saves in one forward pass.

A context around any model's forward, built on torch's saved_tensors_hooks. Each saved tensor is
kept (small ones, parameters), sent to the host, or replaced by a recipe that recomputes it.
Everything that runs inside belongs to this forward; its backward may run at any later time.
"""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .backward_order import BackwardOrder
from .packed import Packed, Passed, Wrapped, unpack
from .recipe import MATMUL, POINTWISE, RecipeChecks, RecordedRecipe
from .registry import Registry, whole_storage
from .send_queue import OnFull, Quota, SendQueue
from .store import Saved, Store
from .tape import Tape
from .tensors import geometry, is_parameter, travelling_range
from .types import ActivationPolicy, CopyBuffers


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """State shared by the forwards of an engine."""

    store: Store
    on_full: OnFull
    checks: RecipeChecks = field(default_factory=RecipeChecks)
    queues: weakref.WeakSet[SendQueue] = field(default_factory=weakref.WeakSet)  # not yet flushed


class Forward:
    """A context around one forward pass, from `OffloadEngine.forward`; enter it once."""

    def __init__(
        self, shared: Shared, policy: ActivationPolicy, buffers: CopyBuffers, min_bytes: int
    ) -> None:
        if min_bytes < 1:
            raise ValueError(f"offload: min_bytes={min_bytes} must be 1 or more")
        self._shared, self._store, self._min_bytes = shared, shared.store, min_bytes
        self._registry = Registry(self._store)
        self._queue = SendQueue(self._store, policy.ratio, buffers, shared.on_full)
        self._order = BackwardOrder(self._store, self._queue, buffers.prefetch_bytes)
        shares = {POINTWISE: policy.recompute_pointwise, MATMUL: policy.recompute_matmul}
        self._quotas = {kind: Quota(share) for kind, share in shares.items() if share}
        self._tape = Tape(self._registry, set(self._quotas), min_bytes) if self._quotas else None
        self._num_packed = 0
        self._num_recipes: dict[str, int] = {}  # by signature
        self._hooks: Any = None
        self._entered = False

    def __enter__(self) -> Forward:
        assert not self._entered, "a Forward can be entered only once; create another one"
        self._entered = True
        with self._store.lock:
            self._store.collect()
            # Backward needs earlier forwards after this one: send their last tensors too.
            for queue in list(self._shared.queues):
                queue.flush()
            self._shared.queues.clear()
            self._shared.queues.add(self._queue)
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, unpack)
        self._hooks.__enter__()
        if self._tape is not None:
            self._tape.__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self._tape is not None:
            self._tape.__exit__(kind, error, trace)
            self._tape.clear()
        self._hooks.__exit__(kind, error, trace)
        self._hooks = None  # the hooks hold a reference to self
        self._registry.clear()
        if kind is not None:
            self._queue.drop()
        else:
            self._queue.check()

    def pack(self, tensor: Tensor) -> Packed | Passed | Wrapped:
        """What the autograd graph holds in place of `tensor`."""
        self._num_packed += 1
        if self._stays(tensor):
            return Passed(tensor)
        if hasattr(tensor, "trigger_wait"):  # a collective may still write to it
            return self.pack(tensor.trigger_wait())
        if is_traceable_wrapper_subclass(tensor):
            return Wrapped(tensor, self.pack)
        with self._store.lock, self._recording_paused():
            self._store.collect()
            range_ = travelling_range(tensor)
            if range_ is None or range_.num_bytes < self._min_bytes:
                return Passed(tensor)
            saved = self._registry.find(tensor)
            fresh = saved is None
            if saved is None:
                saved = self._registry.add(tensor, range_)
            name = "an input" if tensor.grad_fn is None else f"output of {tensor.grad_fn.name()}"
            name = f"saved tensor {self._num_packed} of the forward ({name})"
            packed = Packed(saved, geometry(tensor), tensor, name, self._order)
            if fresh:
                self._decide(saved, tensor)
            self._order.add(saved)
            return packed

    def _recording_paused(self) -> AbstractContextManager:
        return nullcontext() if self._tape is None else self._tape.pause()

    def _stays(self, tensor: Tensor) -> bool:
        plain = tensor.layout == torch.strided and tensor.device == self._store.device
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

    def _decide(self, saved: Saved, tensor: Tensor) -> None:
        """Recompute a new Saved if it has a recipe; otherwise offer it to the send queue."""
        recipe = self._recipe(saved, tensor)
        if recipe is None:
            self._queue.offer(saved)
            return
        saved.recipe, saved.value = recipe, None
        self._store.counts.recomputed += saved.num_bytes

    def _recipe(self, saved: Saved, tensor: Tensor) -> RecordedRecipe | None:
        if self._tape is None:
            return None
        kind = self._tape.kind_of(tensor)
        recipe = None
        if kind is not None and self._quotas[kind].takes(saved.num_bytes):
            recipe = self._tape.recipe(tensor)
        self._tape.forget(tensor)
        if recipe is None:
            return None
        saved.range = whole_storage(tensor)
        saved.value = saved.range.of(tensor.untyped_storage())
        place = self._num_recipes.get(recipe.signature, 0)
        self._num_recipes[recipe.signature] = place + 1
        fresh = [source for source in recipe.uses if not source.owners]
        for source in recipe.uses:
            source.owners += 1
        if not self._shared.checks.accepts(saved, recipe, place, self._store):
            self._store.dropped.extend(recipe.uses)
            return None
        for source in fresh:
            self._queue.offer(source)
        return recipe
