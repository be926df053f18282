"""Tape: records a forward's operations, to know how to recompute what it saves.

It sees operations below autograd, so casts and fused kernels appear as they run, and records which
operation computed each cheap result from which inputs. When autograd saves such a result, a recipe
can take the place of its memory. Results of unknown operations (attention kernels, custom
functions) are saved.

A result is recorded only if its sources add less memory than the result itself: parameters, small
tensors and tensors saved already add none. So a norm's fp32 copy is recomputed from its bf16 input,
while the sum of two new tensors is itself the cheapest thing to save.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .recipe import (
    MATMUL,
    POINTWISE,
    Held,
    Part,
    RecordedRecipe,
    Result,
    Use,
    leaves,
    replace_leaves,
)
from .registry import Registry
from .tensors import geometry, storage_key

_aten = torch.ops.aten

# Memory-bound operations that give the same bits for the same input.
_POINTWISE_NAMES = (
    *("add", "sub", "mul", "div", "neg", "abs", "reciprocal", "rsqrt", "sqrt", "pow", "exp", "log"),
    *("sigmoid", "tanh", "silu", "gelu", "relu", "leaky_relu", "softplus", "hardswish", "mish"),
    *("clamp", "where", "masked_fill", "cat", "clone", "_to_copy", "maximum"),
    *("minimum", "sin", "cos", "mean", "sum", "native_layer_norm", "_fused_rms_norm", "glu"),
)
# Recomputed only if recompute_matmul is above 0: a plan sets it if the link costs more.
_MATMUL_NAMES = ("mm", "addmm", "bmm", "baddbmm")

# Recipes that use other recipes form a chain. Along the residual stream it would reach back through
# all layers, and all its sources would have to be on the device at once. These limits cut it at
# each layer's input and allow any chain within a layer.
_MOST_STEPS = 12
_MOST_MATMULS = 2
_MOST_SOURCES = 3  # new tensors that one recipe may cause to be saved

_PLAIN = (Tensor, nn.Parameter)


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


class Tape(TorchDispatchMode):
    """Records how results are computed while entered. kinds: POINTWISE, MATMUL or both."""

    supports_higher_order_operators = True

    def __init__(self, registry: Registry, kinds: set[str], min_bytes: int) -> None:
        super().__init__()
        self._registry, self._min_bytes = registry, min_bytes
        self._kinds = {f: kind for f, kind in _kinds().items() if kind in kinds}
        # By storage; the weakref removes the entry when the storage dies.
        self._results: dict[int, tuple[Result, weakref.ref]] = {}
        self._paused = False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._paused or any(issubclass(t, Tensor) and t not in _PLAIN for t in types):
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

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Record nothing inside: these operations are the engine's, not the model's."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def recipe(self, tensor: Tensor) -> RecordedRecipe | None:
        """How to recompute the storage of `tensor`; registers its sources as saved."""
        result = self._of(tensor)
        if result is None or not result.usable:
            return None
        self._resolve(result, set())
        return RecordedRecipe(result, tensor.device, self.pause)

    def kind_of(self, tensor: Tensor) -> str | None:
        """POINTWISE or MATMUL if the tape recorded how the storage of `tensor` was computed."""
        result = self._of(tensor)
        return None if result is None else result.kind

    def forget(self, tensor: Tensor) -> None:
        """Let no recipe go through `tensor`: it is a Saved now, or is written to."""
        self._results.pop(storage_key(tensor.untyped_storage()), None)

    def clear(self) -> None:
        self._results.clear()

    def _of(self, tensor: Tensor) -> Result | None:
        entry = self._results.get(storage_key(tensor.untyped_storage()))
        result = entry[0] if entry is not None else None
        return result if result is not None and result.version == tensor._version else None

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any, index: int | None, kind: str):
        if type(out) is not Tensor or out.device != self._registry.device:
            return
        storage = out.untyped_storage()
        if out.storage_offset() or storage.nbytes() < self._min_bytes:
            return
        if any(x.is_inference() for x in leaves((out, args, kwargs), Tensor)):
            return  # inference tensors have no version counter
        refer = self._refer
        refers = (replace_leaves(args, refer, Tensor), replace_leaves(kwargs, refer, Tensor))
        result = Result(func, *refers, index, out, kind)
        if result.steps > _MOST_STEPS or result.matmuls > _MOST_MATMULS:
            return
        if result.kind == MATMUL and kind == POINTWISE and result.matmuls > 1:
            return  # a layer's output: cut here, or the next layer's chains get too deep
        sources: dict[int, Held] = {}
        _collect_sources(result, sources, set())
        new_bytes = sum(held.new_bytes for held in sources.values())
        if new_bytes >= result.num_bytes or len(sources) > _MOST_SOURCES:
            return
        key = storage_key(storage)
        table = weakref.ref(self)

        def died(_: Any) -> None:
            tape = table()
            if tape is not None:
                tape._results.pop(key, None)

        self._results[key] = (result, weakref.ref(storage, died))

    def _refer(self, tensor: Tensor) -> Any:
        result = self._of(tensor)
        if result is not None:
            return Part(result, geometry(tensor))
        saved = self._registry.find(tensor)
        if saved is not None:
            return Use(saved, geometry(tensor))
        base = tensor._base if tensor._is_view() else None
        fixed = isinstance(tensor, nn.Parameter) or isinstance(base, nn.Parameter)
        new_bytes = tensor.untyped_storage().nbytes()
        if fixed or new_bytes < self._min_bytes or tensor.device != self._registry.device:
            new_bytes = 0
        return Held(tensor, tensor._version, new_bytes, fixed)

    def _resolve(self, result: Result, seen: set[int]) -> None:
        """Register sources not saved yet; then the only large things `result` uses are Saved."""
        if id(result) in seen:
            return
        seen.add(id(result))

        def settle(x: Any) -> Any:
            if isinstance(x, Part):
                self._resolve(x.result, seen)
            elif isinstance(x, Held) and x.new_bytes:
                return Use(self._registry.find_or_add(x.get()), geometry(x.tensor))
            elif isinstance(x, Held):
                # Detach: its graph could hold a reference back to us. Here, above autograd, detach
                # shares the version counter; where the tape sees operations, it does not.
                tensor = x.tensor.detach() if x.fixed else x.tensor.detach().clone()
                return Held(tensor, tensor._version, 0, x.fixed)
            return x

        result.args = replace_leaves(result.args, settle)
        result.kwargs = replace_leaves(result.kwargs, settle)

    def _before_write(self, func: Any, args: Any, kwargs: Any) -> None:
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            written = args[position] if position < len(args) else kwargs.get(argument.name)
            for tensor in written if isinstance(written, (list, tuple)) else (written,):
                if type(tensor) in _PLAIN:
                    self.forget(tensor)
                    with self.pause():
                        self._registry.before_write(tensor)


def _collect_sources(result: Result, sources: dict[int, Held], seen: set[int]) -> None:
    """Collect into `sources` the tensors that would have to be saved, by storage."""
    # Not a recursive closure: that is a reference cycle, and would keep the tensors in it alive
    # until the garbage collector runs.
    if id(result) in seen:
        return
    seen.add(id(result))
    for x in result.leaves():
        if isinstance(x, Part):
            _collect_sources(x.result, sources, seen)
        elif isinstance(x, Held) and x.new_bytes:
            sources[storage_key(x.tensor.untyped_storage())] = x
