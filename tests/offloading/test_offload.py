"""The offload engine: gradients bitwise equal to those without it, and device memory freed.

`open_engine` checks after each test that no memory is held and that no access was unordered.
"""

from __future__ import annotations

import gc
import weakref
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import hdp
import hdp.offloading.engine as engines
from hdp.errors import OffloadMemoryError
from hdp.offloading.types import ActivationPolicy, CopyBuffers
from tests.offloading.offload_engines import (
    ROOMY,
    SLAB,
    SMALL,
    TIGHT,
    assert_same,
    check_idle,
    every_kind,
    every_policy,
    forward_of,
    gradients,
    loss_of,
    make_input,
    make_model,
    open_engine,
)
from tests.offloading.twin_streams import CALLER, SIDE

# ---- the main claim ----


@every_kind
@every_policy
@pytest.mark.parametrize("buffers", [TIGHT, SMALL, ROOMY], ids=["tight", "small", "roomy"])
def test_gradients_are_bitwise_equal(kind, policy, buffers):
    model, x = make_model(), make_input()
    want = gradients(model, x)
    with open_engine(kind, buffers=buffers) as engine:
        for _ in range(2):
            assert_same(gradients(model, x, forward_of(engine, policy)), want)
            check_idle(engine)
        moved = engine.counts
        assert moved.sent + moved.kept + moved.recomputed > 0
        assert bool(moved.recomputed) == bool(policy.recompute_pointwise)


@every_kind
@pytest.mark.parametrize("seed", range(4))
def test_no_race(kind, seed):
    """The test double's race detector finds nothing, for more copy timings and buffer sizes."""
    rng = np.random.default_rng(seed)
    model, x = make_model(2), make_input(int(rng.integers(20, 150)))
    want = gradients(model, x)
    buffers = CopyBuffers(
        send_bytes=int(rng.integers(0, 60_000)),
        keep_bytes=int(rng.integers(0, 30_000)),
        prefetch_bytes=int(rng.integers(0, 60_000)),
    )
    policy = ActivationPolicy(
        ratio=rng.random(), recompute_pointwise=rng.random(), recompute_matmul=rng.random()
    )
    with open_engine(kind, buffers=buffers, seed=seed) as engine:
        for _ in range(3):
            assert_same(gradients(model, x, forward_of(engine, policy)), want)


def test_a_model_with_two_streams():
    """Backward asks for each tensor on the stream that saved it. What one stream fetched is not
    ready for the other."""
    buffers = CopyBuffers(send_bytes=0, keep_bytes=0, prefetch_bytes=1 << 20)
    with open_engine("lazy", buffers=buffers) as engine:
        streams = engine.link._streams
        rng, forward, saved = np.random.default_rng(0), forward_of(engine), []
        with forward:
            for i in range(40):
                streams.caller = str(rng.choice([CALLER, SIDE]))
                saved.append((streams.caller, forward.pack(torch.full((1000,), 1.0 * i))))
        values = []
        for i, (caller, packed) in reversed(list(enumerate(saved))):
            streams.caller = caller
            values.append(packed.unpack())
            streams.read(values[-1])
            assert torch.equal(values[-1], torch.full((1000,), 1.0 * i))
        assert not streams.races
        streams.caller = CALLER
        streams.record(SIDE), streams.wait(CALLER, streams.record(SIDE))
        values.clear()
        saved.clear()
        del packed


def test_a_ratio_is_met_evenly():
    """After every tensor the bytes sent are within half a tensor of the share."""
    with open_engine(buffers=TIGHT) as engine:
        for ratio in (0.0, 0.3, 0.5, 0.77, 1.0):
            before = engine.counts.sent
            forward = forward_of(engine, ActivationPolicy(ratio=ratio))
            weight = nn.Parameter(torch.ones(4000))
            with forward:
                outputs = [torch.randn(1000) * weight[:1000] for _ in range(40)]
            share = (engine.counts.sent - before) / (40 * 4000)
            assert abs(share - ratio) <= 0.5 / 40 + 1e-9, (ratio, share)
            torch.stack(outputs).sum().backward()
            del outputs


def test_the_last_tensors_stay():
    """The last keep_bytes saved are never sent: backward needs them first."""
    buffers = CopyBuffers(send_bytes=0, keep_bytes=10_000, prefetch_bytes=0)
    with open_engine(buffers=buffers) as engine:
        weight = nn.Parameter(torch.ones(1000))
        with forward_of(engine):
            total = sum((torch.randn(1000) * weight).sum() for _ in range(10))
        assert engine.counts.sent == 4000 * 7
        total.backward()


class LiveBytes(TorchDispatchMode):
    """Bytes of live storages created by operations, without the host's slabs."""

    def __init__(self, model):
        super().__init__()
        self.now = self.most = 0
        self._refs = {}
        self._not_counted = {id(p.untyped_storage()) for p in model.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage):
        key, size = id(storage), storage.nbytes()
        if key in self._refs or key in self._not_counted or size == SLAB:
            return

        def died(_):
            self.now -= size
            del self._refs[key]

        self._refs[key] = weakref.ref(storage, died)
        self.now += size
        self.most = max(self.most, self.now)


@contextmanager
def no_garbage_collector():
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def test_memory_leaves_the_device_in_forward():
    """Without buffers, live bytes do not grow with the number of layers. Nothing waits for the
    garbage collector."""

    def most_in_forward(layers, policy):
        model, x = make_model(layers), make_input(256)
        with open_engine(buffers=TIGHT) as engine:
            gradients(model, x, forward_of(engine, policy))  # recipes are verified, slabs created
            with LiveBytes(model) as live, no_garbage_collector():
                if policy is None:
                    loss = loss_of(model(x))
                else:
                    with forward_of(engine, policy):
                        loss = loss_of(model(x))
            loss.backward()
            del loss
        return live.most

    for policy in (ActivationPolicy(), ActivationPolicy(recompute_pointwise=1.0)):
        few, many = most_in_forward(3, policy), most_in_forward(9, policy)
        layer = (most_in_forward(9, None) - most_in_forward(3, None)) / 6
        assert many - few < 0.01 * 6 * layer, (few, many, layer)


def test_memory_in_backward_is_bounded_by_prefetch():
    """Backward holds one layer's tensors and the prefetched ones, not the whole forward's."""

    def most_in_backward(prefetch_bytes, layers=9):
        buffers = CopyBuffers(send_bytes=0, keep_bytes=0, prefetch_bytes=prefetch_bytes)
        model, x = make_model(layers), make_input(256)
        with open_engine(buffers=buffers) as engine:
            for _ in range(2):
                with forward_of(engine, ActivationPolicy(recompute_pointwise=1.0)):
                    loss = loss_of(model(x))
                with LiveBytes(model) as live, no_garbage_collector():
                    loss.backward()
                del loss
        return live.most

    few = most_in_backward(0, layers=3)
    gradients_of_six_layers = 2 * sum(p.numel() for p in make_model(6).parameters())
    assert most_in_backward(0) < few + gradients_of_six_layers + 5_000
    assert most_in_backward(100_000) < few + gradients_of_six_layers + 130_000


# ---- the public function ----


def test_offload_without_a_device_does_nothing():
    model, x = make_model(), make_input()
    want = gradients(model, x)
    with hdp.offload(ratio=0.5):
        loss = loss_of(model(x))
    model.zero_grad()
    loss.backward()
    assert_same({name: p.grad for name, p in model.named_parameters()}, want)
    with pytest.raises(ValueError, match="ratio=2"):
        hdp.offload(ratio=2)


def test_offload_on_an_engine():
    model, x = make_model(), make_input()
    want = gradients(model, x)
    with open_engine() as engine:
        model.zero_grad()
        with hdp.offload(ratio=0.8, recompute_pointwise=1.0, min_bytes=1000, engine=engine):
            loss = loss_of(model(x))
        loss.backward()
        assert_same({name: p.grad for name, p in model.named_parameters()}, want)
        assert engine.counts.sent
        with hdp.offload(ratio=0.0, engine=engine):  # nothing to do
            model(x)


def test_open_engine_checks_the_machine(monkeypatch):
    monkeypatch.setattr(engines, "available_host_bytes", lambda: 10 << 30)
    with pytest.raises(
        OffloadMemoryError, match=r"40.00 GiB was requested.* 10.00 GiB .* 0.25 times"
    ):
        engines.open_engine(torch.device("cpu"), max_bytes=40 << 30)
    with pytest.warns(UserWarning, match="taking 9.00 GiB"):
        engine = engines.open_engine(torch.device("cpu"), max_bytes=40 << 30, on_full="keep")
    assert engine.stats().max_bytes == 9 << 30 and engine.stats().held_bytes == 0
    engine.close()
    with pytest.raises(ValueError, match="64 KiB"):
        engines.open_engine(torch.device("cpu"), max_bytes=1000)
    engine = engines.open_engine(torch.device("cpu"), max_bytes=8 << 20, prefill=True)
    engine.link.send(torch.zeros(1, dtype=torch.uint8), engine.link.stream())
    assert engine.link.stats().held_bytes == 8 << 20
    engine.close()
