"""What stands in an autograd graph for the tensors that it saved.

    Saved     one value that backward needs, however many functions saved it, and where it is now
    Packed    what one function holds instead of its tensor: a view of a Saved
    Passed    what one function holds of a tensor that stays: small ones, parameters
    Wrapped   a tensor subclass (DTensor, float8) as its packed inner tensors

Autograd frees what it holds when a function has run backward for the last time. The `__del__` of a
Packed then tells the engine that the Saved has lost an owner; it may run in any thread at any time,
so it only leaves a note.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .tensors import Geometry, Range, VersionWatch
from .types import modified

if TYPE_CHECKING:
    from .engine import Forward
    from .recipe import Recipe


class Saved:
    """A range of a storage that backward needs.

    On the device (`value`), on the host (`block`), or to be made again (`recipe`); a block may have
    a value beside it. `leaving`: the copy out may still read `value`. `arriving`: the copy in may
    still write it. `owners`: Packed objects and recipes that need it; 0: freed. `home`: the stream
    that saved it, where backward asks for it; `stream`: the one that may use `value`.
    """

    __slots__ = (
        *("forward", "range", "value", "block", "recipe", "owners", "home", "stream"),
        *("leaving", "arriving", "ahead", "last_use", "asked", "checksum", "version"),
    )

    def __init__(self, forward: Forward, range_: Range, stream: Any, version: int) -> None:
        self.forward, self.range, self.version = forward, range_, version
        self.home = self.stream = stream
        self.value: Tensor | None = None  # (num_bytes,) uint8
        self.block: Any = None
        self.recipe: Recipe | None = None
        self.owners = 0
        self.leaving = self.arriving = self.ahead = False
        self.last_use = -1  # index in forward.uses
        self.asked = 0  # the last backward pass over its forward that asked for it; the first is 1
        self.checksum: Tensor | None = None  # of a value that was not yet seen to be remade rightly

    @property
    def num_bytes(self) -> int:
        return self.range.num_bytes

    @property
    def emptied(self) -> bool:
        """Whether the model took the memory of `value` away (resize_), to fill it again before
        backward: Megatron's recomputation of single outputs does."""
        value = self.value
        if value is None:
            return False
        return value.untyped_storage().nbytes() < int(value.storage_offset()) + self.num_bytes

    def view(self, value: Tensor, geometry: Geometry) -> Tensor:
        """`geometry`, a view of the storage that the range was part of, in `value`."""
        moved = self.range.start - int(value.storage_offset())
        return geometry.on(value.untyped_storage(), moved)


class Packed:
    """A saved tensor: a view of a Saved."""

    __slots__ = ("_dropped", "geometry", "name", "saved", "watch")

    def __init__(
        self, saved: Saved, geometry: Geometry, tensor: Tensor, name: str, dropped: deque[Saved]
    ) -> None:
        self.saved, self.geometry, self.name = saved, geometry, name
        self.watch = VersionWatch(tensor)
        self._dropped = dropped
        saved.owners += 1

    def check(self) -> None:
        if self.watch.num_writes:
            raise modified(self.name, str(self.geometry), self.watch.num_writes)

    def __del__(self) -> None:
        # Not there if the watch could not be made: then nobody counted on this owner.
        if hasattr(self, "_dropped"):
            self._dropped.append(self.saved)


class Passed:
    """A saved tensor that stays as it is."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        # An output that holds itself through its graph would never be freed.
        self.tensor = tensor if tensor.is_leaf else tensor.detach()
        self.version = tensor._version

    def unpack(self) -> Tensor:
        writes = self.tensor._version - self.version
        if writes:
            what = f"{str(self.tensor.dtype).removeprefix('torch.')} {tuple(self.tensor.shape)}"
            raise modified("a tensor that stays on the device", what, writes)
        return self.tensor


class Wrapped:
    """A tensor subclass that is made of other tensors, and of other things: a DTensor's mesh."""

    __slots__ = ("context", "inner", "kind", "others", "size", "stride")

    def __init__(self, tensor: Any, pack: Callable[[Tensor], Any]) -> None:
        names, self.context = tensor.__tensor_flatten__()
        parts = {name: getattr(tensor, name) for name in names}
        self.inner = {name: pack(x) for name, x in parts.items() if isinstance(x, Tensor)}
        self.others = {name: x for name, x in parts.items() if not isinstance(x, Tensor)}
        self.kind, self.size, self.stride = type(tensor), tensor.size(), tensor.stride()

    def unpack(self, unpack: Callable[[Any], Tensor]) -> Tensor:
        inner = {name: unpack(packed) for name, packed in self.inner.items()} | self.others
        return self.kind.__tensor_unflatten__(inner, self.context, self.size, self.stride)
