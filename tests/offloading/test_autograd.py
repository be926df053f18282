"""Offload with other autograd features: retained graphs, checkpointing, many live forwards."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from hdp.offloading.types import ActivationPolicy
from tests.offloading.offload_engines import (
    POLICIES,
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

# ---- other autograd features ----


@every_kind
@every_policy
def test_retain_graph(kind, policy):
    model, x = make_model(), make_input()
    want = gradients(model, x)
    with open_engine(kind) as engine:
        with forward_of(engine, policy):
            loss = loss_of(model(x))
        for _ in range(3):
            model.zero_grad()
            loss.backward(retain_graph=True)
            assert_same({name: p.grad for name, p in model.named_parameters()}, want)
        del loss
        gc.collect()
        check_idle(engine)


@every_policy
def test_double_backward(policy):
    x = torch.randn(40, 30, dtype=torch.float64, requires_grad=True)
    w = torch.randn(30, 30, dtype=torch.float64, requires_grad=True)

    def model():
        return ((x @ w).sigmoid() * x).square().mean()

    def second(loss):
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (x, w))

    want = second(model())
    with open_engine(buffers=TIGHT) as engine:
        with forward_of(engine, policy):
            loss = model()
        got = second(loss)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        del loss, got


def test_a_second_backward_is_refused_as_without():
    with open_engine(buffers=TIGHT) as engine:
        x = torch.randn(1000, requires_grad=True)
        with forward_of(engine):
            y = x.exp().sum()
        y.backward()
        with pytest.raises(RuntimeError, match="second time"):
            y.backward()


@every_kind
@every_policy
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(kind, policy, reentrant):
    model, x = make_model(), make_input().requires_grad_()
    want = gradients(model, x)

    class Checkpointed(nn.Module):
        def forward(self, x):
            for layer in model:
                x = checkpoint(layer, x, use_reentrant=reentrant)
            return x

    outer = Checkpointed()
    outer.layers = model
    with open_engine(kind, buffers=TIGHT) as engine:
        got = gradients(outer, x, forward_of(engine, policy))
        assert_same({name.removeprefix("layers."): g for name, g in got.items()}, want)
        moved = engine.counts.sent + engine.counts.kept
        assert 0 < moved <= 4 * x.nbytes * 2  # layer inputs and the loss


@every_kind
@every_policy
def test_backward_inside_the_context(kind, policy):
    model, x = make_model(), make_input()
    want = gradients(model, x)
    with open_engine(kind) as engine:
        model.zero_grad()
        with forward_of(engine, policy):
            loss_of(model(x)).backward()
        assert_same({name: p.grad for name, p in model.named_parameters()}, want)


def test_branches_and_frozen_weights():
    """Backward not in forward's exact reverse order, and parts that need no gradient."""
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(32, 32) for _ in range(6)])
    for parameter in layers[2].parameters():
        parameter.requires_grad_(False)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers

        def forward(self, x):
            a = [F.silu(layer(x)) for layer in layers[:4]]
            b = layers[4](a[0] * a[3]) + layers[5](a[1]).tanh() * a[2]
            with torch.no_grad():
                x = x * b
            return b * x

    net, x = Net(), torch.randn(64, 32)
    want = gradients(net, x)
    for kind in ("lazy", "random"):
        for policy in POLICIES:
            with open_engine(kind) as engine:
                assert_same(gradients(net, x, forward_of(engine, policy)), want)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_function_inside(backend):
    model, x = make_model(2), make_input()
    torch._dynamo.reset()
    model[1].forward = torch.compile(model[1].forward, backend=backend)
    want = gradients(model, x)
    for policy in POLICIES:
        with open_engine(buffers=TIGHT) as engine:
            for _ in range(2):
                assert_same(gradients(model, x, forward_of(engine, policy)), want)


@every_policy
def test_selective_checkpointing(policy):
    """Selective checkpoints hold their own tensors and use dispatch modes, as offload does."""
    model, x = make_model(2), make_input().requires_grad_()
    want = gradients(model, x)

    def keep_products(context, operation, *args, **kwargs):
        if operation is torch.ops.aten.addmm.default:
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    class Checkpointed(nn.Module):
        def forward(self, x):
            for layer in model:
                contexts = partial(create_selective_checkpoint_contexts, keep_products)
                x = checkpoint(layer, x, use_reentrant=False, context_fn=contexts)
            return x

    outer = Checkpointed()
    outer.layers = model
    with open_engine(buffers=TIGHT) as engine:
        got = gradients(outer, x, forward_of(engine, policy))
        assert_same({name.removeprefix("layers."): g for name, g in got.items()}, want)


def test_threads_share_an_engine():
    """Four models, each in its own thread: forwards and backwards in any order."""
    models, x = [make_model(2) for _ in range(4)], make_input()
    want = gradients(models[0], x)
    with open_engine() as engine, ThreadPoolExecutor(4) as threads:

        def train(model):
            for _ in range(4):
                assert_same(
                    gradients(
                        model, x, forward_of(engine, ActivationPolicy(recompute_pointwise=1.0))
                    ),
                    want,
                )

        for done in [threads.submit(train, model) for model in models]:
            done.result()


# ---- many forwards ----


@every_kind
@every_policy
def test_several_live_microbatches(kind, policy):
    """1F1B: up to four forwards wait for their backward, which come first in, first out."""
    model = make_model(2)
    inputs = [make_input(n, seed=n) for n in (40, 7, 96, 30, 61, 12)]
    model.zero_grad()
    for x in inputs:
        loss_of(model(x)).backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    with open_engine(kind) as engine:
        for live in (1, 2, 4):
            model.zero_grad()
            waiting = []
            for x in inputs:
                with forward_of(engine, policy):
                    waiting.append(loss_of(model(x)))
                if len(waiting) == live:
                    waiting.pop(0).backward()
            while waiting:
                waiting.pop(0).backward()
            check_idle(engine)
            assert_same({name: p.grad for name, p in model.named_parameters()}, want)


@every_kind
def test_held_memory_after_random_steps(kind):
    """50 steps of random lengths and numbers of microbatches: held <= 1.25 x peak in use."""
    rng = np.random.default_rng(3)
    model = make_model(2, size=64)
    with open_engine(kind, buffers=TIGHT, slab_bytes=64 << 10) as engine:
        for step in range(50):
            live = int(rng.integers(1, 4))
            waiting = []
            for _ in range(rng.integers(1, 5)):
                x = make_input(int(rng.integers(3, 200)), size=64, seed=step)
                with forward_of(engine, ActivationPolicy(ratio=float(rng.random()))):
                    waiting.append(loss_of(model(x)))
                if len(waiting) >= live:
                    waiting.pop(int(rng.integers(len(waiting)))).backward()
            while waiting:
                waiting.pop().backward()
            check_idle(engine)
        stats = engine.stats()
        assert stats.held_bytes <= 1.25 * stats.peak_in_use_bytes, stats


def test_nested_contexts():
    """The inner one has its tensors, the outer one the rest."""
    model, x = make_model(), make_input()
    want = gradients(model, x)
    with open_engine() as engine:
        model.zero_grad()
        with forward_of(engine):
            h = model[0](x)
            with forward_of(engine, ActivationPolicy(recompute_pointwise=1.0)):
                h = model[1](h)
            loss = loss_of(model[2](h))
        loss.backward()
        assert_same({name: p.grad for name, p in model.named_parameters()}, want)
        del loss, h
