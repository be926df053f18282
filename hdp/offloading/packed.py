"""What an autograd graph holds in place of the tensors that it saved.

    Packed     a view of a Saved, in place of one function's tensor
    Passed     a tensor that stays on the device: a small one, or a parameter
    Wrapped    a tensor subclass (DTensor, float8) as its packed inner tensors

`unpack()` returns the tensor. Autograd frees what it holds after a function's last backward;
`Packed.__del__` then tells the store that its Saved has lost an owner.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from hdp.errors import OffloadFreedError

from .backward_order import BackwardOrder
from .store import Saved
from .tensors import Geometry, VersionWatch
from .types import modified


class Packed:
    """A saved tensor: a view of a Saved."""

    __slots__ = ("_dropped", "_order", "geometry", "name", "saved", "watch")

    def __init__(
        self, saved: Saved, geometry: Geometry, tensor: Tensor, name: str, order: BackwardOrder
    ) -> None:
        self.saved, self.geometry, self.name, self._order = saved, geometry, name, order
        self.watch = VersionWatch(tensor)
        self._dropped = order.store.dropped
        saved.owners += 1

    def unpack(self) -> Tensor:
        """The tensor. Raises OffloadModifiedError or OffloadFreedError."""
        store, saved = self._order.store, self.saved
        with store.lock:
            if store.closed:
                raise OffloadFreedError(
                    "backward needs a tensor from a closed offload engine; close it after backward"
                )
            store.collect()
            if self.watch.num_writes:
                raise modified(self.name, str(self.geometry), self.watch.num_writes)
            tensor = saved.view(self._order.take(saved), self.geometry)
            if saved.owners == 1:  # the caller holds it now; a later request fetches it again
                store.let_go(saved)
            return tensor

    def __del__(self) -> None:
        # Missing if creating the watch failed: then this owner was never counted.
        if hasattr(self, "_dropped"):
            self._dropped.append(self.saved)


class Passed:
    """A saved tensor that stays on the device."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        # Detach: an output that holds itself through its graph would never be freed.
        self.tensor = tensor if tensor.is_leaf else tensor.detach()
        self.version = tensor._version

    def unpack(self) -> Tensor:
        writes = self.tensor._version - self.version
        if writes:
            what = f"{str(self.tensor.dtype).removeprefix('torch.')} {tuple(self.tensor.shape)}"
            raise modified("a tensor that stays on the device", what, writes)
        return self.tensor


class Wrapped:
    """A tensor subclass made of tensors and other values, such as a DTensor's mesh."""

    __slots__ = ("context", "inner", "kind", "others", "size", "stride")

    def __init__(self, tensor: Any, pack: Callable[[Tensor], Any]) -> None:
        names, self.context = tensor.__tensor_flatten__()
        parts = {name: getattr(tensor, name) for name in names}
        self.inner = {name: pack(x) for name, x in parts.items() if isinstance(x, Tensor)}
        self.others = {name: x for name, x in parts.items() if not isinstance(x, Tensor)}
        self.kind, self.size, self.stride = type(tensor), tensor.size(), tensor.stride()

    def unpack(self) -> Tensor:
        inner = {name: packed.unpack() for name, packed in self.inner.items()} | self.others
        return self.kind.__tensor_unflatten__(inner, self.context, self.size, self.stride)


def unpack(packed: Packed | Passed | Wrapped) -> Tensor:
    """The unpack hook that autograd calls."""
    return packed.unpack()
