"""Recipes: how to make a saved tensor again from others that are saved anyway.

About half of what a decoder layer saves is the result of cheap element-wise operations: norm
outputs, SiLU(gate), the gated product, casts to fp32. None of it needs to be kept or to travel. The
tape watches the operations of a forward (below autograd, so casts and fused kernels are seen as
they are) and notes for each cheap result which operation made it from what. When autograd saves
such a result, it gets a recipe in place of memory.

This is activation checkpointing without regions: what is made again is one tensor, at the moment
when backward asks for it, by the same operation on the same bytes, hence the same bits. No second
forward of a layer, no peak of a whole layer's activations, no communication or random number a
second time; what the tape does not know (attention kernels, custom functions) is simply saved.

A result is noted only if what it is made from costs less memory than itself: parameters, what is
saved already, and small tensors cost nothing. So a norm's fp32 copy is remade from its bf16 input,
while the sum of two new tensors is itself the cheapest thing to save.

Two things could make a remade tensor wrong, and both are found: an in-place write that torch knows
of (the tape sees it, and the version counters), and one that it does not (a custom kernel): the
first time that each recipe of a forward is used its result is compared with the original.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .saved import Saved
from .tensors import Geometry, geometry, storage_key, touched_range
from .types import modified

if TYPE_CHECKING:
    from .engine import Forward

_aten = torch.ops.aten

# Memory-bound operations that give the same bits for the same input.
POINTWISE = "pointwise"
_POINTWISE_NAMES = (
    *("add", "sub", "mul", "div", "neg", "abs", "reciprocal", "rsqrt", "sqrt", "pow", "exp", "log"),
    *("sigmoid", "tanh", "silu", "gelu", "relu", "leaky_relu", "softplus", "hardswish", "mish"),
    *("clamp", "where", "masked_fill", "cat", "clone", "_to_copy", "maximum"),
    *("minimum", "sin", "cos", "mean", "sum", "native_layer_norm", "_fused_rms_norm", "glu"),
)
# Products: remade only where a plan says that this is cheaper than the link.
MATMUL = "matmul"
_MATMUL_NAMES = ("mm", "addmm", "bmm", "baddbmm")

# A recipe that uses what has a recipe itself is a chain. Along the residual stream it would go back
# through all layers: its sources would have to be on the device together. These limits cut it at
# each layer's input, and allow any chain inside of a layer.
_MOST_STEPS = 12
_MOST_MATMULS = 2
_MOST_SOURCES = 3  # new tensors that one recipe may make us save


def _kinds() -> dict[Any, str]:
    kinds = {}
    for kind, names in ((POINTWISE, _POINTWISE_NAMES), (MATMUL, _MATMUL_NAMES)):
        for packet in (getattr(_aten, name, None) for name in names):
            for overload in packet.overloads() if packet is not None else ():
                operation = getattr(packet, overload)
                schema = operation._schema
                aliases = any(result.alias_info is not None for result in schema.returns)
                if not schema.is_mutable and not aliases:
                    kinds[operation] = kind
    return kinds


class _Held(NamedTuple):
    """A tensor, kept alive: a parameter, a small one, or one that may have to be saved."""

    tensor: Tensor
    version: int
    new_bytes: int  # to save it; 0: it is small, or there anyway
    fixed: bool  # a parameter

    @property
    def writes(self) -> int:
        return self.tensor._version - self.version

    @property
    def emptied(self) -> bool:
        """Whether its memory was taken away: FSDP frees a layer's weights after its forward."""
        held = self.tensor.untyped_storage().nbytes()
        return bool(self.tensor.numel()) and held < touched_range(self.tensor).stop

    def get(self) -> Tensor:
        what = f"{str(self.tensor.dtype).removeprefix('torch.')} {tuple(self.tensor.shape)}"
        if self.writes:
            raise modified("an input of a recipe", what, self.writes)
        if self.emptied:
            raise RuntimeError(
                f"offload: {what}, with which backward makes a tensor again, has no memory by "
                "now, as if a weight was sharded again. Use recompute_matmul=0"
            )
        return self.tensor


class _Use(NamedTuple):
    """A view of a Saved."""

    saved: Saved
    geometry: Geometry


class _Part(NamedTuple):
    """A view of a noted result."""

    made: _Made
    geometry: Geometry


class _Made:
    """A noted result: the whole storage of output `index` of an operation.

    steps, matmuls: the longest chain of operations that leads to it, and of products among them.
    """

    __slots__ = (
        *("args", "function", "index", "kwargs", "num_bytes", "version", "kind"),
        *("steps", "matmuls"),
    )

    def __init__(
        self, function: Any, args: Any, kwargs: Any, index: int | None, out: Tensor, kind: str
    ) -> None:
        self.function, self.args, self.kwargs, self.index = function, args, kwargs, index
        self.kind: str
        self.steps: int
        self.matmuls: int
        self.num_bytes, self.version = out.untyped_storage().nbytes(), out._version
        parts = [x.made for x in self.leaves() if isinstance(x, _Part)]
        recipes = [x.saved.recipe for x in self.leaves() if isinstance(x, _Use)]
        below: list[Any] = [*parts, *(recipe for recipe in recipes if recipe is not None)]
        self.kind = MATMUL if any(part.kind == MATMUL for part in parts) else kind
        self.steps = 1 + max((x.steps for x in below), default=0)
        self.matmuls = (kind == MATMUL) + max((x.matmuls for x in below), default=0)

    def leaves(self) -> Iterator[Any]:
        yield from _leaves((self.args, self.kwargs))


class Recipe:
    """Steps that give one Saved its value again; `uses`: the Saved that it needs."""

    __slots__ = ("_device_type", "_made", "kind", "matmuls", "signature", "steps", "uses")

    def __init__(self, made: _Made, uses: list[Saved], device: torch.device) -> None:
        self._made, self.uses, self._device_type = made, uses, device.type
        self.kind, self.signature = made.kind, _signature(made)
        self.steps, self.matmuls = made.steps, made.matmuls

    def run(self, value_of: Callable[[Saved], Tensor]) -> Tensor:
        """(num_bytes,) uint8, from the values of the Saved. On the current stream."""
        with torch.no_grad(), torch.autocast(self._device_type, enabled=False):
            storage = _run(self._made, value_of, {}).untyped_storage()
        assert storage.nbytes() == self._made.num_bytes, (storage.nbytes(), self._made.num_bytes)
        return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _run(made: _Made, value_of: Callable[[Saved], Tensor], done: dict[int, Tensor]) -> Tensor:
    if id(made) not in done:

        def get(x: Any) -> Any:
            if isinstance(x, _Held):
                return x.get()
            if isinstance(x, _Use):
                return x.saved.view(value_of(x.saved), x.geometry)
            return x.geometry.on(_run(x.made, value_of, done).untyped_storage(), 0)

        out = made.function(*_replace(made.args, get), **_replace(made.kwargs, get))
        done[id(made)] = out if made.index is None else out[made.index]
    return done[id(made)]


class Tape(TorchDispatchMode):
    """Notes how results are made while it is entered. kinds: POINTWISE, MATMUL or both."""

    supports_higher_order_operators = True

    def __init__(self, forward: Forward, kinds: set[str], min_bytes: int) -> None:
        super().__init__()
        self._forward, self._min_bytes = weakref.proxy(forward), min_bytes
        self._kinds = {f: kind for f, kind in _kinds().items() if kind in kinds}
        self._made: dict[int, tuple[_Made, Any]] = {}  # by storage, with what removes the entry
        self.paused = False  # while the engine itself computes

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.paused or any(issubclass(t, Tensor) and t not in _PLAIN for t in types):
            return func(*args, **kwargs)
        kind = self._kinds.get(func)
        if kind is None:
            if getattr(func, "_schema", None) is not None and func._schema.is_mutable:
                self._before_write(func, args, kwargs)
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        index = 0 if isinstance(result, tuple) else None
        self._note(func, args, kwargs, result[0] if index == 0 else result, index, kind)
        return result

    def recipe(self, tensor: Tensor) -> Recipe | None:
        """How to make the storage of `tensor` again. What has to be saved for it is saved now."""
        made = self._of(tensor)
        if made is None or not _usable(made):
            return None
        self._resolve(made, set())
        return Recipe(made, list(dict.fromkeys(_uses(made))), tensor.device)

    def kind_of(self, tensor: Tensor) -> str | None:
        """POINTWISE or MATMUL if there is a recipe for the storage of `tensor`."""
        made = self._of(tensor)
        return None if made is None else made.kind

    def forget(self, tensor: Tensor) -> None:
        """The tensor is a Saved now, or has been written to: no recipe goes through its making."""
        self._made.pop(storage_key(tensor.untyped_storage()), None)

    def clear(self) -> None:
        self._made.clear()

    def _of(self, tensor: Tensor) -> _Made | None:
        entry = self._made.get(storage_key(tensor.untyped_storage()))
        made = entry[0] if entry is not None else None
        return made if made is not None and made.version == tensor._version else None

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any, index: int | None, kind: str):
        if type(out) is not Tensor or out.device != self._forward.device:
            return
        storage = out.untyped_storage()
        if out.storage_offset() or storage.nbytes() < self._min_bytes:
            return
        if any(x.is_inference() for x in _leaves((out, args, kwargs), Tensor)):
            return  # writes to these are not counted
        refers = (_replace(args, self._refer, Tensor), _replace(kwargs, self._refer, Tensor))
        made = _Made(func, *refers, index, out, kind)
        if made.steps > _MOST_STEPS or made.matmuls > _MOST_MATMULS:
            return
        if made.kind == MATMUL and kind == POINTWISE and made.matmuls > 1:
            return  # a layer's output: cut here, or the next layer's products are too deep
        sources = _sources(made)
        new_bytes = sum(held.new_bytes for held in sources.values())
        if new_bytes >= made.num_bytes or len(sources) > _MOST_SOURCES:
            return
        key = storage_key(storage)
        table = weakref.ref(self)

        def died(_: Any) -> None:
            tape = table()
            if tape is not None:
                tape._made.pop(key, None)

        self._made[key] = (made, weakref.ref(storage, died))

    def _refer(self, tensor: Tensor) -> Any:
        made = self._of(tensor)
        if made is not None:
            return _Part(made, geometry(tensor))
        saved = self._forward.find(tensor)
        if saved is not None:
            return _Use(saved, geometry(tensor))
        base = tensor._base if tensor._is_view() else None
        fixed = isinstance(tensor, nn.Parameter) or isinstance(base, nn.Parameter)
        new_bytes = tensor.untyped_storage().nbytes()
        if fixed or new_bytes < self._min_bytes or tensor.device != self._forward.device:
            new_bytes = 0
        return _Held(tensor, tensor._version, new_bytes, fixed)

    def _resolve(self, made: _Made, seen: set[int]) -> None:
        """Save what is not saved yet; afterwards `made` refers to nothing large but Saved."""
        if id(made) in seen:
            return
        seen.add(id(made))

        def settle(x: Any) -> Any:
            if isinstance(x, _Part):
                self._resolve(x.made, seen)
            elif isinstance(x, _Held) and x.new_bytes:
                return _Use(self._forward.save_source(x.get()), geometry(x.tensor))
            elif isinstance(x, _Held):
                # With its graph it would hold whoever holds us. Above autograd, where we are now,
                # detach shares the version counter; where the tape sees operations, it does not.
                tensor = x.tensor.detach() if x.fixed else x.tensor.detach().clone()
                return _Held(tensor, tensor._version, 0, x.fixed)
            return x

        made.args, made.kwargs = _replace(made.args, settle), _replace(made.kwargs, settle)

    def _before_write(self, func: Any, args: Any, kwargs: Any) -> None:
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            written = args[position] if position < len(args) else kwargs.get(argument.name)
            for tensor in written if isinstance(written, (list, tuple)) else (written,):
                if type(tensor) in _PLAIN:
                    self.forget(tensor)
                    self._forward.before_write(tensor)


_PLAIN = (Tensor, nn.Parameter)


def _sources(made: _Made) -> dict[int, _Held]:
    """What would have to be saved, by storage."""
    sources: dict[int, _Held] = {}
    _collect_sources(made, sources, set())
    return sources


def _collect_sources(made: _Made, sources: dict[int, _Held], seen: set[int]) -> None:
    # No nested function that calls itself: it would be a reference cycle, and the tensors in it
    # would live until the garbage collector comes.
    if id(made) in seen:
        return
    seen.add(id(made))
    for x in made.leaves():
        if isinstance(x, _Part):
            _collect_sources(x.made, sources, seen)
        elif isinstance(x, _Held) and x.new_bytes:
            sources[storage_key(x.tensor.untyped_storage())] = x


def _usable(made: _Made) -> bool:
    """Whether all that it needs is still there, as it was."""
    for x in made.leaves():
        if isinstance(x, _Part):
            fine = _usable(x.made)
        elif isinstance(x, _Use):
            fine = x.saved.owners > 0
        else:
            fine = not x.writes and not x.emptied
        if not fine:
            return False
    return True


def _uses(made: _Made) -> Iterator[Saved]:
    for x in made.leaves():
        if isinstance(x, _Part):
            yield from _uses(x.made)
        elif isinstance(x, _Use):
            yield x.saved


def _signature(made: _Made) -> str:
    inner = ",".join(_signature(x.made) for x in made.leaves() if isinstance(x, _Part))
    return f"{made.function}({inner})"


_REFERENCES = (_Held, _Use, _Part)


def _leaves(tree: Any, kinds: Any = _REFERENCES) -> Iterator[Any]:
    if isinstance(tree, kinds):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _leaves(item, kinds)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from _leaves(item, kinds)


def _replace(tree: Any, get: Callable[[Any], Any], kinds: Any = _REFERENCES) -> Any:
    if isinstance(tree, kinds):
        return get(tree)
    if isinstance(tree, (list, tuple)):
        return type(tree)(_replace(item, get, kinds) for item in tree)
    if isinstance(tree, dict):
        return {key: _replace(item, get, kinds) for key, item in tree.items()}
    return tree
