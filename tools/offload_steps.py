"""Steps of decoder layers under any context, measured: time, memory, gradients."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from decoder_layers import DecoderLayers, Shape, rotary_angles
from torch import Tensor

from hdp.attention.kernels import BlockKernel
from hdp.attention.layout import RingLayout

Contexts = Callable[[], tuple[AbstractContextManager, AbstractContextManager]]  # forward, step


class Steps:
    """Layers on a device, their input, and steps in any context."""

    def __init__(
        self, shape: Shape, num_layers: int, tokens: int, device: torch.device, kernel: BlockKernel
    ) -> None:
        self.device = device
        torch.manual_seed(0)
        with device:
            self.model = DecoderLayers(shape, num_layers, kernel).to(torch.bfloat16)
            self.x = torch.randn(tokens, shape.hidden_size, dtype=torch.bfloat16)
            self.dout = torch.randn_like(self.x)
        self.x.requires_grad_()
        self.rotary = rotary_angles(tokens, shape.head_dim, torch.bfloat16, device)
        self.layout = RingLayout(local_seqlens=(tokens,))
        self.leaves = [self.x, *self.model.parameters()]
        for leaf in self.leaves:
            leaf.grad = torch.zeros_like(leaf)
        self.baseline = self._allocated()

    def step(self, forward: AbstractContextManager, whole: AbstractContextManager) -> list[float]:
        """Seconds of forward and of backward."""
        for leaf in self.leaves:
            assert leaf.grad is not None
            leaf.grad.zero_()
        marks = [self._mark()]
        with whole:
            with forward:
                out = self.model(self.x, self.rotary, self.layout)
            marks.append(self._mark())
            out.backward(self.dout)
            marks.append(self._mark())
        return self._between(marks)

    def forward(self, context: AbstractContextManager, tokens: int) -> Tensor:
        """The output of the first `tokens` rows."""
        rotary = (self.rotary[0][:tokens], self.rotary[1][:tokens])
        with context:
            return self.model(self.x[:tokens], rotary, RingLayout(local_seqlens=(tokens,)))

    def backward(self, out: Tensor) -> None:
        out.backward(self.dout[: len(out)])

    def gradients(self) -> list[Tensor]:
        """Copies on the host: on the device they would count as memory of later steps."""
        return [leaf.grad.to("cpu", copy=True) for leaf in self.leaves if leaf.grad is not None]

    def peak_bytes(self) -> float | None:
        """Most that steps since `reset_peak` took beyond what was there."""
        if self.device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self.device) - self.baseline

    def reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, marks: list[Any]) -> list[float]:
        pairs = list(pairwise(marks))
        if self.device.type != "cuda":
            return [b - a for a, b in pairs]
        marks[-1].synchronize()
        return [a.elapsed_time(b) * 1e-3 for a, b in pairs]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Medians over steps, in seconds; bytes beyond weights, gradients and input.

    first_s: of the first step beyond the others
    """

    forward_s: float
    seconds: float
    peak_bytes: float | None
    first_s: float
    num_steps: int
    gradients: list[Tensor]


@contextmanager
def deterministic() -> Iterator[None]:
    """Deterministic kernels, without the filling of new memory that torch adds."""
    settings: Any = torch.utils.deterministic
    before = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        settings.fill_uninitialized_memory = before


def measure(steps: Steps, contexts: Contexts, repeats: int) -> Measured:
    """A first step, `repeats` timed ones, and one with deterministic kernels for its gradients."""
    steps.synchronize()
    began = time.perf_counter()
    steps.step(*contexts())
    steps.synchronize()
    first_s = time.perf_counter() - began
    steps.step(*contexts())
    steps.reset_peak()
    times = [steps.step(*contexts()) for _ in range(repeats)]
    peak = steps.peak_bytes()
    with deterministic():
        steps.step(*contexts())
    seconds = median(sum(t) for t in times)
    return Measured(
        forward_s=median(t[0] for t in times),
        seconds=seconds,
        peak_bytes=peak,
        first_s=max(first_s - seconds, 0.0),
        num_steps=repeats + 3,
        gradients=steps.gradients(),
    )


def clean(device: torch.device) -> None:
    """Free what is not used, pinned host memory too."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        if hasattr(torch._C, "_host_emptyCache"):
            torch._C._host_emptyCache()
        if hasattr(torch.cuda, "reset_peak_host_memory_stats"):
            torch.cuda.reset_peak_host_memory_stats()
