"""Offload engines on simulated devices, a model to run on them, and checks after each test."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hdp.offloading.engine import OffloadEngine
from hdp.offloading.link import Link
from hdp.offloading.streams import CpuStreams
from hdp.offloading.types import ActivationPolicy, CopyBuffers
from tests.offloading.twin_streams import TwinStreams

GRANULE = 64 << 10

# The test double under three schedules, and CpuStreams.
KINDS = ["lazy", "random", "eager", "cpu"]
TIGHT = CopyBuffers(send_bytes=0, keep_bytes=0, prefetch_bytes=0)
SMALL = CopyBuffers(send_bytes=20_000, keep_bytes=10_000, prefetch_bytes=20_000)
ROOMY = CopyBuffers(send_bytes=1 << 20, keep_bytes=60_000, prefetch_bytes=1 << 20)

every_kind = pytest.mark.parametrize("kind", KINDS)
POLICIES = [
    ActivationPolicy(),
    ActivationPolicy(ratio=0.4),
    ActivationPolicy(ratio=0.0, recompute_pointwise=1.0),
    ActivationPolicy(recompute_pointwise=1.0),
    ActivationPolicy(ratio=0.7, recompute_pointwise=0.5, recompute_matmul=0.5),
    ActivationPolicy(recompute_pointwise=1.0, recompute_matmul=1.0),
]
every_policy = pytest.mark.parametrize(
    "policy", POLICIES, ids=lambda t: f"{t.ratio}-{t.recompute_pointwise}-{t.recompute_matmul}"
)
MIN_BYTES = 1000
SLAB = 4 * GRANULE  # of open_engine


def open_link(kind: str, *, seed: int = 0, max_bytes: int = 64 << 20, slab_bytes=SLAB):
    """(link, its TwinStreams or None)."""
    sizes = {"max_bytes": max_bytes, "slab_bytes": slab_bytes, "num_threads": 2}
    if kind == "cpu":
        return Link(CpuStreams(), **sizes), None
    streams = TwinStreams(order=kind, seed=seed)  # type: ignore[arg-type]
    return Link(streams, **sizes), streams


@contextmanager
def _young_garbage_only() -> Iterator[None]:
    """The garbage collector leaves alone what is there already: libraries and pytest, for which it
    needs 0.4 s a time, four fifths of what these tests took."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def open_engine(
    kind: str = "lazy", *, buffers: CopyBuffers = SMALL, on_full="error", idle=True, **sizes
) -> Iterator[OffloadEngine]:
    """An engine; on exit, checks that nothing is held (if idle) and no access was unordered."""
    link, streams = open_link(kind, **sizes)
    engine = OffloadEngine(link, buffers=buffers, on_full=on_full)
    with _young_garbage_only():
        yield engine
        if idle:
            gc.collect()
            check_idle(engine)
    if streams is not None:
        streams.synchronize()
        assert not streams.races, streams.races[:3]
    engine.close()


def check_idle(engine: OffloadEngine) -> None:
    """Check that no host memory is in use, no device memory is held, and all counters agree."""
    assert engine.stats().in_use_bytes == 0
    store = engine.store
    assert store.leaving_bytes == store.ahead_bytes == 0
    assert not store.dropped
    assert all(saved.value is None for saved in store._leaving)


class Norm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size))

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class Block(nn.Module):
    """A small decoder layer: norms in fp32, fused QKV, attention, gated MLP."""

    def __init__(self, size, heads=2):
        super().__init__()
        self.norm1, self.norm2, self.heads = Norm(size), Norm(size), heads
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.gate, self.up = nn.Linear(size, 2 * size), nn.Linear(size, 2 * size)
        self.down = nn.Linear(2 * size, size)

    def forward(self, x):
        tokens, size = x.shape
        qkv = self.qkv(self.norm1(x)).view(tokens, 3, self.heads, -1)
        q, k, v = (qkv[:, i].transpose(0, 1) for i in range(3))
        attended = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)
        x = x + self.out(attended[0].transpose(0, 1).reshape(tokens, size))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def make_model(layers=3, size=32, dtype=torch.bfloat16, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(*[Block(size) for _ in range(layers)]).to(dtype)


def make_input(tokens=96, size=32, dtype=torch.bfloat16, seed=1):
    torch.manual_seed(seed)
    return torch.randn(tokens, size).to(dtype)


def loss_of(output):
    return output.float().square().mean()


def gradients(model, x, forward=None):
    """{name: gradient} of one forward, offloaded by the Forward given."""
    model.zero_grad(set_to_none=True)
    if forward is None:
        loss = loss_of(model(x))
    else:
        with forward:
            loss = loss_of(model(x))
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        assert torch.equal(got[name], gradient), f"{name} differs"


def forward_of(engine, policy=None, **options):
    return engine.forward(policy, min_bytes=options.pop("min_bytes", MIN_BYTES), **options)
