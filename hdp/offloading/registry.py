"""Registry: finds the Saved that holds the current value of a tensor. One per forward.

Several functions may save the same tensor or views of one storage, and recipes use tensors that are
saved anyway. All of them share the existing Saved, as long as the tensor has not been written to
since.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from .store import Saved, Store
from .tensors import Range, storage_key, travelling_range


class Registry:
    """A forward's Saved, by storage."""

    def __init__(self, store: Store) -> None:
        self.store, self.device = store, store.device
        self._known: dict[int, tuple[list[Saved], weakref.ref]] = {}

    def find(self, tensor: Tensor) -> Saved | None:
        """The Saved that holds the current value of `tensor`, if any."""
        entry = self._known.get(storage_key(tensor.untyped_storage()))
        if entry is None:
            return None
        wanted, version = travelling_range(tensor), tensor._version
        for saved in entry[0]:
            if wanted and saved.owners and saved.version == version and saved.range.covers(wanted):
                return saved
        return None

    def add(self, tensor: Tensor, range_: Range) -> Saved:
        """A new Saved for a range of the storage of `tensor`. It has no owner yet."""
        storage = tensor.untyped_storage()
        stream = self.store.link.stream()
        saved = Saved(range_, range_.of(storage), stream, tensor._version)
        self._entry(storage).append(saved)
        return saved

    def find_or_add(self, tensor: Tensor) -> Saved:
        """The Saved of `tensor`, for a recipe; a new one covers its whole storage."""
        return self.find(tensor) or self.add(tensor, whole_storage(tensor))

    def before_write(self, tensor: Tensor) -> None:
        """Preserve the value of `tensor` for recipes, before an in-place write."""
        entry = self._known.get(storage_key(tensor.untyped_storage()))
        with self.store.lock:
            for saved in entry[0] if entry is not None else ():
                if saved.value is None or not saved.owners:
                    continue
                if saved.block is not None or saved.recipe is not None:
                    self.store.let_go(saved)
                else:
                    saved.value = saved.value.clone()

    def clear(self) -> None:
        self._known.clear()

    def _entry(self, storage: torch.UntypedStorage) -> list[Saved]:
        key = storage_key(storage)
        if key not in self._known:
            registry = weakref.ref(self)

            def died(_: object) -> None:
                known = registry()
                if known is not None:
                    known._known.pop(key, None)

            self._known[key] = ([], weakref.ref(storage, died))
        return self._known[key][0]


def whole_storage(tensor: Tensor) -> Range:
    return Range(0, tensor.untyped_storage().nbytes())
