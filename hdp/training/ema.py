"""EMA: an exponential moving average of the weights, sharded as they are.

    average <- decay * average + (1 - decay) * weights          after every optimizer step

The average forgets the noise of single steps, so it is often the better model, above all at a
constant learning rate. It starts from the initial weights. Elementwise, so every rank updates its
own shards without communication: one more fp32 copy of the weights, divided by the ranks.

    ema.update(model)                      # after optimizer.step()
    with ema.applied(model):               # evaluate or export; the weights come back bit by bit
        ...

Invariants (tests/training/test_ema.py): equals_dense on any number of ranks; swap_is_exact;
resume_is_exact, through the part "ema" of checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class EMA:
    """The average of the trainable parameters of one sharded model."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Start from the weights of `model`, after sharding. Raises ValueError for a bad decay."""
        if not (0 < decay < 1 and math.isfinite(decay)):
            raise ValueError(f"EMA decay={decay} must be above 0 and below 1, such as 0.999")
        self.decay = decay
        self._applied = False
        self.averages: dict[str, Tensor] = {
            name: parameter.detach().clone() for name, parameter in _trainable(model)
        }

    @property
    def num_bytes(self) -> int:
        """Of this rank's shards."""
        return sum(_local(x).numel() * x.element_size() for x in self.averages.values())

    @torch.no_grad()
    def restart(self, model: nn.Module) -> None:
        """Start again from the weights: of a checkpoint that has no average."""
        for name, parameter in _trainable(model):
            _local(self.averages[name]).copy_(_local(parameter))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights after a step."""
        assert not self._applied, "the average stands in for the weights: leave applied() first"
        pairs = [(_local(self.averages[name]), _local(p)) for name, p in _trainable(model)]
        pairs = [(average, weight) for average, weight in pairs if average.numel()]
        if pairs:  # a rank's shards of a small model may all be empty
            averages, weights = zip(*pairs, strict=True)
            torch._foreach_lerp_(averages, weights, 1.0 - self.decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """`model` has the average for weights. Enter it between steps, on all ranks alike.

        Takes memory for one parameter's shard, not for another copy of the model.
        """
        assert not self._applied, "applied() does not nest"
        self._swap(model)
        self._applied = True
        try:
            yield
        finally:
            self._swap(model)
            self._applied = False

    @torch.no_grad()
    def _swap(self, model: nn.Module) -> None:
        for name, parameter in _trainable(model):
            weight, average = _local(parameter), _local(self.averages[name])
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)


def describe_average(ema: EMA | None) -> str:
    """For the start-up report; "" without an average."""
    if ema is None:
        return ""
    return (
        f"; EMA of the weights, decay {ema.decay:g} (about the last {1 / (1 - ema.decay):,.0f} "
        f"steps), {ema.num_bytes / 2**20:,.1f} MiB on this rank"
    )


def _trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def _local(x: Tensor) -> Tensor:
    return (x.to_local() if isinstance(x, DTensor) else x).detach()
