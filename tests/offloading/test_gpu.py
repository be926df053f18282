"""Offload on a GPU: gradients, memory and two streams, which the test double cannot show."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hdp.offloading.engine import OffloadEngine, open_engine
from hdp.offloading.types import ActivationPolicy, CopyBuffers
from tests.offloading.offload_engines import (
    assert_same,
    check_idle,
    every_policy,
    forward_of,
    gradients,
    loss_of,
    make_input,
    make_model,
)

pytestmark = pytest.mark.gpu
TIGHT = CopyBuffers(send_bytes=0, keep_bytes=0, prefetch_bytes=1 << 20)
SIZE, TOKENS = 256, 2048


@contextmanager
def gpu_engine(buffers: CopyBuffers = TIGHT) -> Iterator[OffloadEngine]:
    device = torch.device("cuda", torch.cuda.current_device())
    engine = open_engine(device, max_bytes=1 << 30, buffers=buffers)
    yield engine
    gc.collect()
    check_idle(engine)
    engine.close()


def on_gpu(num_layers=4):
    return make_model(num_layers, SIZE).cuda(), make_input(TOKENS, SIZE).cuda()


@every_policy
def test_gradients_are_bitwise_equal(policy):
    model, x = on_gpu()
    with sdpa_kernel(SDPBackend.MATH):  # deterministic
        want = gradients(model, x)
        with gpu_engine() as engine:
            for _ in range(5):
                assert_same(gradients(model, x, forward_of(engine, policy)), want)


@pytest.mark.parametrize("pointwise", [0.0, 1.0])
def test_memory_leaves_the_device(pointwise):
    """A forward of many layers leaves far less on the device than without offload."""
    model, x = on_gpu(12)

    def left(forward=None):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        if forward is None:
            loss = loss_of(model(x))
        else:
            with forward:
                loss = loss_of(model(x))
        after = torch.cuda.memory_allocated()
        loss.backward()
        model.zero_grad(set_to_none=True)
        return after - before

    everything = left()
    with gpu_engine() as engine:
        for _ in range(2):
            some = left(forward_of(engine, ActivationPolicy(recompute_pointwise=pointwise)))
    assert some < 0.15 * everything, (some, everything)


def test_a_model_with_two_streams():
    """Branches on separate streams; their saved tensors return on the right stream."""
    side = torch.cuda.Stream()
    torch.manual_seed(0)
    left, right = (nn.Linear(1024, 1024, device="cuda") for _ in range(2))

    def model(x):
        for _ in range(8):
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                a = torch.tanh(left(x))
            b = torch.sigmoid(right(x))
            torch.cuda.current_stream().wait_stream(side)
            a.record_stream(torch.cuda.current_stream())
            x = a * b
        return x.square().sum()

    x = torch.randn(2048, 1024, device="cuda")

    def run(engine=None):
        left.zero_grad(), right.zero_grad()
        if engine is None:
            loss = model(x)
        else:
            with forward_of(engine, ActivationPolicy(recompute_pointwise=0.5)):
                loss = model(x)
        loss.backward()
        return {"left": left.weight.grad.clone(), "right": right.weight.grad.clone()}

    want = run()
    with gpu_engine() as engine:
        for _ in range(5):
            assert_same(run(engine), want)
