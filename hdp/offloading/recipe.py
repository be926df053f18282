"""Recipes: recompute a saved tensor from others that are saved anyway.

About half of what a decoder layer saves is the result of cheap element-wise operations: norm
outputs, SiLU(gate), the gated product, casts to fp32. None of it needs to stay on the device or go
to the host: it can be recomputed. A recipe is the sequence of operations that computed a tensor,
with references to their inputs:

    Held      a tensor, kept alive: a parameter, or a small one
    Use       a view of a Saved
    Part      a view of another result, which is recomputed first

This is activation checkpointing without regions: when backward needs a tensor, the same operations
run on the same bytes and give the same bits. No layer's forward runs again, no layer's activations
accumulate, and no communication or random number is repeated.

A recomputed tensor could be wrong in two ways, and both are detected. In-place writes that torch
tracks are seen by the tape (tape.py) and by version counters. For untracked ones, by a custom
kernel, `RecipeChecks` compares each recipe's first result with the original.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .store import Saved, Store
from .tensors import Geometry, touched_range
from .types import modified

POINTWISE, MATMUL = "pointwise", "matmul"  # kinds of operations, and of recipes


class Held(NamedTuple):
    """A tensor, kept alive: a parameter, a small one, or one that may have to be saved."""

    tensor: Tensor
    version: int
    new_bytes: int  # bytes that saving it would add; 0: it is small or held anyway
    fixed: bool  # a parameter

    @property
    def writes(self) -> int:
        return self.tensor._version - self.version

    @property
    def emptied(self) -> bool:
        """Whether its memory was freed: FSDP frees a layer's weights after its forward."""
        held = self.tensor.untyped_storage().nbytes()
        return bool(self.tensor.numel()) and held < touched_range(self.tensor).stop

    def get(self) -> Tensor:
        what = f"{str(self.tensor.dtype).removeprefix('torch.')} {tuple(self.tensor.shape)}"
        if self.writes:
            raise modified("an input of a recipe", what, self.writes)
        if self.emptied:
            raise RuntimeError(
                f"offload: the memory of {what}, needed to recompute a tensor in backward, was "
                "freed, perhaps by resharding a weight: use recompute_matmul=0"
            )
        return self.tensor


class Use(NamedTuple):
    """A view of a Saved."""

    saved: Saved
    geometry: Geometry


class Part(NamedTuple):
    """A view of a result."""

    result: Result
    geometry: Geometry


class Result:
    """How a storage was computed: as output `index` of an operation (None: its only output).

    kind: MATMUL if any operation that leads to it is a matrix product
    steps, matmuls: length of the longest chain of operations, and of products, that leads to it
    """

    __slots__ = (
        *("args", "function", "index", "kwargs", "num_bytes", "version", "kind"),
        *("steps", "matmuls"),
    )

    def __init__(
        self, function: Any, args: Any, kwargs: Any, index: int | None, out: Tensor, kind: str
    ) -> None:
        self.function, self.args, self.kwargs, self.index = function, args, kwargs, index
        self.num_bytes, self.version = out.untyped_storage().nbytes(), out._version
        parts = [x.result for x in self.leaves() if isinstance(x, Part)]
        recipes = [x.saved.recipe for x in self.leaves() if isinstance(x, Use)]
        below: list[Any] = [*parts, *(recipe for recipe in recipes if recipe is not None)]
        self.kind: str = MATMUL if any(part.kind == MATMUL for part in parts) else kind
        self.steps: int = 1 + max((x.steps for x in below), default=0)
        self.matmuls: int = (kind == MATMUL) + max((x.matmuls for x in below), default=0)

    @property
    def signature(self) -> str:
        """The operations, without their inputs."""
        inner = ",".join(x.result.signature for x in self.leaves() if isinstance(x, Part))
        return f"{self.function}({inner})"

    @property
    def usable(self) -> bool:
        """Whether all its inputs still exist, unmodified."""
        for x in self.leaves():
            if isinstance(x, Part):
                fine = x.result.usable
            elif isinstance(x, Use):
                fine = x.saved.owners > 0
            else:
                fine = not x.writes and not x.emptied
            if not fine:
                return False
        return True

    def uses(self) -> Iterator[Saved]:
        for x in self.leaves():
            if isinstance(x, Part):
                yield from x.result.uses()
            elif isinstance(x, Use):
                yield x.saved

    def leaves(self) -> Iterator[Any]:
        yield from leaves((self.args, self.kwargs))

    def run(self, value_of: Callable[[Saved], Tensor], done: dict[int, Tensor]) -> Tensor:
        """The recomputed output. done: results computed so far, by id."""
        if id(self) not in done:

            def get(x: Any) -> Any:
                if isinstance(x, Held):
                    return x.get()
                if isinstance(x, Use):
                    return x.saved.view(value_of(x.saved), x.geometry)
                return x.geometry.on(x.result.run(value_of, done).untyped_storage(), 0)

            out = self.function(*replace_leaves(self.args, get), **replace_leaves(self.kwargs, get))
            done[id(self)] = out if self.index is None else out[self.index]
        return done[id(self)]


class RecordedRecipe:
    """A Result as the `Recipe` of a Saved.

    pause: pauses the tape that recorded it, while the recipe runs
    """

    __slots__ = (
        *("_checksum", "_device_type", "_pause", "_result"),
        *("matmuls", "signature", "steps", "uses"),
    )

    def __init__(
        self, result: Result, device: torch.device, pause: Callable[[], AbstractContextManager]
    ) -> None:
        self._result, self._device_type, self._pause = result, device.type, pause
        self.uses = list(dict.fromkeys(result.uses()))
        self.signature, self.steps, self.matmuls = result.signature, result.steps, result.matmuls
        self._checksum: Tensor | None = None

    def run(self, value_of: Callable[[Saved], Tensor]) -> Tensor:
        """(num_bytes,) uint8, from the values of `uses`. On the current stream.

        Raises RuntimeError if the bits differ from those given to `expect`.
        """
        with self._pause(), torch.no_grad(), torch.autocast(self._device_type, enabled=False):
            storage = self._result.run(value_of, {}).untyped_storage()
            assert storage.nbytes() == self._result.num_bytes, storage.nbytes()
            value = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            if self._checksum is not None:
                self._compare(value)
        return value

    def expect(self, value: Tensor) -> None:
        """The next result must have the bits of `value`."""
        self._checksum = _checksum(value)

    def _compare(self, value: Tensor) -> None:
        expected, self._checksum = self._checksum, None
        assert expected is not None
        if not torch.equal(_checksum(value), expected):
            raise RuntimeError(
                f"recomputing {self.signature} gave different bits in backward than in forward: a "
                "kernel made an untracked in-place write to one of its inputs, or the operation is "
                "not deterministic. Use recompute_pointwise=0 and recompute_matmul=0"
            )


class RecipeChecks:
    """Tests each recipe once: its first result must be bitwise equal to the original.

    A recipe is identified by its operations and its index among recipes with the same operations
    in a forward. One that fails is never used: the tensor is saved, with a warning.
    """

    def __init__(self) -> None:
        self._verified: set[tuple[str, int]] = set()
        self._rejected: set[tuple[str, int]] = set()

    def accepts(self, saved: Saved, recipe: RecordedRecipe, place: int, store: Store) -> bool:
        """Whether the recipe reproduces saved.value bitwise. Waits for the device, once."""
        key = (recipe.signature, place)
        if key in self._verified:
            return True
        if key in self._rejected:
            return False
        assert saved.value is not None
        value = recipe.run(store.value)
        _let_go_sources(recipe, store)
        if torch.equal(value, saved.value):
            recipe.expect(saved.value)
            self._verified.add(key)
            return True
        self._rejected.add(key)
        warnings.warn(
            f"offload: recomputing {recipe.signature} gave different bits, {saved.num_bytes} "
            "bytes, likely an untracked in-place write; saving this tensor instead"
        )
        return False


def _let_go_sources(recipe: Any, store: Store) -> None:
    for source in recipe.uses:
        if source.recipe is not None:
            _let_go_sources(source.recipe, store)
        store.let_go(source)


def _checksum(value: Tensor) -> Tensor:
    words = value[: value.numel() // 8 * 8].view(torch.int64)
    return torch.stack((words.sum(), value[words.numel() * 8 :].sum(dtype=torch.int64)))


_REFERENCES = (Held, Use, Part)


def leaves(tree: Any, kinds: Any = _REFERENCES) -> Iterator[Any]:
    """The objects of the given types in nested lists, tuples and dicts."""
    if isinstance(tree, kinds):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from leaves(item, kinds)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from leaves(item, kinds)


def replace_leaves(tree: Any, get: Callable[[Any], Any], kinds: Any = _REFERENCES) -> Any:
    """The tree with each such object x replaced by get(x)."""
    if isinstance(tree, kinds):
        return get(tree)
    if isinstance(tree, (list, tuple)):
        return type(tree)(replace_leaves(item, get, kinds) for item in tree)
    if isinstance(tree, dict):
        return {key: replace_leaves(item, get, kinds) for key, item in tree.items()}
    return tree
