"""Which bytes of a saved tensor move: ranges of storages, not tensors.

A tensor is a view of a storage. A range of the storage's bytes moves out; a new storage comes back,
with a view of the same sizes, strides and alignment, so that kernels make the same choices and
gradients are bitwise equal. Views of the same range (the (1, tokens, hidden) and (tokens, hidden)
that different functions save) share it, and it moves once.

    dense                  its own range
    with gaps, or          the whole storage, shared with its siblings (slices of a fused QKV),
    overlapping            unless that is much more than the tensor needs
    expanded               only the few bytes that it is expanded from

Some tensors stay, held as autograd would hold them: small ones, parameters and their views and
casts, tensors on other devices, and layouts that are not strided.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Restored ranges start at a multiple of this, as allocations by torch do.
ALIGN_BYTES = 512
# A tensor with gaps moves its whole storage if that is at most this many times its elements.
_MOST_GAPS = 4
_VIEWS_AND_CASTS = (
    *("TBackward0", "TransposeBackward0", "PermuteBackward0", "ViewBackward0", "SliceBackward0"),
    *("UnsafeViewBackward0", "ReshapeAliasBackward0", "AsStridedBackward0", "AliasBackward0"),
    *("ToCopyBackward0", "SelectBackward0", "SplitBackward0", "ExpandBackward0"),
    *("UnsqueezeBackward0", "SqueezeBackward0", "SqueezeBackward1", "CloneBackward0"),
    *("SplitWithSizesBackward0", "UnbindBackward0"),
)


@dataclass(frozen=True, slots=True)
class Geometry:
    """A view of a storage; offset in elements."""

    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def on(self, storage: torch.UntypedStorage, moved_bytes: int) -> Tensor:
        """The same view, of a storage that starts moved_bytes later."""
        offset = self.offset - moved_bytes // self.dtype.itemsize
        view = torch.empty(0, dtype=self.dtype, device=storage.device)
        return view.set_(storage, offset, self.size, self.stride)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {tuple(self.size)}"


def geometry(tensor: Tensor) -> Geometry:
    return Geometry(tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()))


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes [start, stop) of a storage."""

    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start

    def covers(self, other: Range) -> bool:
        return self.start <= other.start and other.stop <= self.stop

    def of(self, storage: torch.UntypedStorage) -> Tensor:
        """(num_bytes,) uint8 view of the range. It keeps the storage alive."""
        view = torch.empty(0, dtype=torch.uint8, device=storage.device)
        return view.set_(storage, self.start, (self.num_bytes,), (1,))


def touched_range(tensor: Tensor) -> Range:
    """The range that holds all elements, from an aligned start."""
    size = tensor.element_size()
    start = int(tensor.storage_offset()) * size
    span = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return Range(start // ALIGN_BYTES * ALIGN_BYTES, start + (span + 1) * size)


def travelling_range(tensor: Tensor) -> Range | None:
    """The range to move for a nonempty strided tensor; None: too many gaps to move it."""
    touched = touched_range(tensor)
    if _is_dense(tensor):
        return touched
    whole = Range(0, tensor.untyped_storage().nbytes())
    distinct = 1
    for n, step in zip(tensor.shape, tensor.stride(), strict=True):
        distinct *= n if step else 1
    needed = distinct * tensor.element_size()
    if whole.num_bytes <= _MOST_GAPS * needed:
        return whole
    return touched if touched.num_bytes <= _MOST_GAPS * needed else None


def _is_dense(tensor: Tensor) -> bool:
    """No gaps and no overlaps: a permutation of a contiguous tensor."""
    expected = 1
    for step, n in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if n == 1:
            continue
        if step != expected:
            return False
        expected *= n
    return True


def storage_key(storage: torch.UntypedStorage) -> int:
    """A number shared by all tensors of one storage, unique until it is freed."""
    return storage._cdata


def is_parameter(tensor: Tensor) -> bool:
    """Whether it is a parameter, or views and casts of only one (autocast's weights)."""
    base = tensor._base if tensor._is_view() else None
    if isinstance(tensor, nn.Parameter) or isinstance(base, nn.Parameter):
        return True
    node: Any = tensor.grad_fn
    while node is not None and node.name() in _VIEWS_AND_CASTS:
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        node = parents[0] if len(parents) == 1 else None
    return isinstance(getattr(node, "variable", None), nn.Parameter)


class VersionWatch:
    """Detects in-place writes to a tensor without keeping its memory alive.

    Autograd checks this for tensors that it saves itself, but not for those saved through hooks.
    """

    __slots__ = ("_counter", "_version")

    def __init__(self, tensor: Tensor) -> None:
        self._version = tensor._version
        # As nn.Parameter does: an alias that shares the version counter and keeps it when given
        # another storage. A view would keep its base alive.
        counter = Tensor._make_subclass(Tensor, tensor)
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(counter):
            counter.set_(torch.UntypedStorage(0, device=tensor.device), 0, (0,), (1,))
        self._counter = counter

    @property
    def num_writes(self) -> int:
        return self._counter._version - self._version
