"""Bad input and faults: a clear error, nothing leaked, no stale copy, no wrong gradient."""

from __future__ import annotations

import gc
import re
import sys

import pytest
import torch

from hdp.errors import OffloadFreedError, OffloadMemoryError, OffloadModifiedError
from hdp.offloading.engine import OffloadEngine
from hdp.offloading.types import ActivationPolicy, CopyBuffers
from tests.offloading.offload_engines import (
    ROOMY,
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
    open_link,
)


@every_kind
@pytest.mark.parametrize("buffers", [TIGHT, ROOMY], ids=["sent", "kept"])
@pytest.mark.parametrize(
    "policy", [ActivationPolicy(), ActivationPolicy(recompute_pointwise=1.0)], ids=["r", "p"]
)
def test_modified_in_place_is_named(kind, buffers, policy):
    with open_engine(kind, buffers=buffers) as engine:
        x = torch.randn(1000, requires_grad=True)
        with forward_of(engine, policy):
            h = x * 2
            y = h.exp()
            z = (y * 3).sum()
        with torch.no_grad():
            y.add_(1)
        with pytest.raises(
            OffloadModifiedError, match=r"output of ExpBackward0\), float32 \(1000,\)"
        ):
            z.backward()
        del h, y, z
        y = (x * 2).exp()  # as without offload
        with torch.no_grad():
            y.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_small_tensors_modified_in_place():
    with open_engine() as engine:
        x = torch.randn(3, requires_grad=True)
        with forward_of(engine):
            y = (x * 2).exp()
        with torch.no_grad():
            y.add_(1)
        with pytest.raises(OffloadModifiedError, match="stays on the device"):
            y.sum().backward()


@every_kind
@every_policy
def test_nothing_leaks_after_an_exception_in_forward(kind, policy):
    model, x = make_model(), make_input()
    want = gradients(model, x)

    def stop(module, inputs):
        raise OSError("stop here")

    with open_engine(kind) as engine:
        for layer in (2, 1):
            hook = model[layer].register_forward_pre_hook(stop)
            with pytest.raises(OSError, match="stop here"):
                gradients(model, x, forward_of(engine, policy))
            hook.remove()
            gc.collect()
            check_idle(engine)
        assert_same(gradients(model, x, forward_of(engine, policy)), want)


@every_kind
def test_nothing_leaks_when_backward_never_runs(kind):
    model, x = make_model(), make_input()
    with open_engine(kind) as engine:
        with forward_of(engine):
            loss = loss_of(model(x))
        assert engine.stats().in_use_bytes > 0
        del loss
        gc.collect()
        check_idle(engine)


@every_kind
def test_an_exception_in_backward(kind):
    model, x = make_model(), make_input()
    want = gradients(model, x)

    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise OSError("stop here")

    with open_engine(kind) as engine:
        with forward_of(engine):
            loss = loss_of(model[2](Stop.apply(model[1](model[0](x)))))
        with pytest.raises(OSError, match="stop here"):
            loss.backward()
        del loss
        gc.collect()
        check_idle(engine)
        assert_same(gradients(model, x, forward_of(engine)), want)


def test_no_grad_passes():
    model, x = make_model(), make_input()
    with (
        open_engine() as engine,
        torch.no_grad(),
        forward_of(engine, ActivationPolicy(recompute_pointwise=1.0)),
    ):
        assert torch.equal(model(x), model(x))
        assert engine.stats().sent_bytes == 0


def test_inference_mode_inside():
    """Inference tensors have no version counter, so nothing is recomputed from them."""
    model, x = make_model(), make_input()
    want = gradients(model, x)
    with open_engine() as engine:
        forward = forward_of(engine, ActivationPolicy(recompute_pointwise=1.0))
        model.zero_grad()
        with forward:
            with torch.inference_mode():
                factor = torch.ones_like(x) * 1
                model(x)
            loss = loss_of(model(x) + 0 * factor)
        loss.backward()
        assert_same({name: p.grad for name, p in model.named_parameters()}, want)
        del loss


@pytest.mark.parametrize("order", ["lazy", "random", "eager"])
@pytest.mark.parametrize("send_bytes", [0, 20_000, 1 << 20])
@pytest.mark.parametrize("keep_bytes", [0, 10_000, 1 << 20])
def test_memory_that_the_model_frees(order, send_bytes, keep_bytes):
    """An output is freed after its use and recomputed before backward, by resize_ and copy_ on
    its storage, as Megatron does: a copy in flight at that moment may hold anything."""
    buffers = CopyBuffers(send_bytes=send_bytes, keep_bytes=keep_bytes, prefetch_bytes=0)
    x = torch.randn(5000, requires_grad=True)
    with open_engine(order, buffers=buffers) as engine:
        with forward_of(engine):
            y = (x * 2).exp()
            z = (y * 3).square()
            copy, storage = y.detach().clone(), y.untyped_storage()
            storage.resize_(0)
            total = (z * z).sum()
        storage.resize_(copy.nbytes)
        storage.copy_(copy.untyped_storage())
        total.backward()
        assert torch.equal(x.grad, gradient_of(x.detach()))
        del y, z, total, storage


def gradient_of(x):
    x = x.clone().requires_grad_()
    z = ((x * 2).exp() * 3).square()
    (z * z).sum().backward()
    return x.grad


def test_no_device_memory_to_prefetch(monkeypatch):
    """A prefetch may fail; the tensor is then fetched on request."""
    model, x = make_model(), make_input()
    want = gradients(model, x)
    with open_engine(
        buffers=CopyBuffers(send_bytes=0, keep_bytes=0, prefetch_bytes=50_000)
    ) as engine:
        fetch, asked = engine.store.fetch, []

        def fail_sometimes(saved):
            ahead = sys._getframe(1).f_code.co_name == "_prefetch"
            asked.append(ahead)
            if ahead and len(asked) % 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
            fetch(saved)

        monkeypatch.setattr(engine.store, "fetch", fail_sometimes)
        assert_same(gradients(model, x, forward_of(engine)), want)
        assert asked.count(True) > 10 and asked.count(False) > 3, asked


def test_a_full_pool_says_what_fits():
    model, x = make_model(4), make_input(3000)  # tensors of several granules
    want = gradients(model, x)
    with open_engine(buffers=TIGHT, max_bytes=8 << 20) as engine:
        with pytest.raises(OffloadMemoryError) as error:
            gradients(model, x, forward_of(engine))
        text = str(error.value)
        del error
        gc.collect()
        check_idle(engine)
        ratio = float(re.search(r"ratio (\d\.\d+) fits", text)[1])
        assert 0.1 < ratio < 1
        assert_same(gradients(model, x, forward_of(engine, ActivationPolicy(ratio=ratio))), want)
        pool = float(re.search(r"a pool of (\S+) MiB;", text)[1])
        assert pool == pytest.approx(8 / ratio, rel=0.2)


def test_a_full_pool_may_keep_the_rest():
    model, x = make_model(8), make_input(200)
    want = gradients(model, x)
    with open_engine(buffers=TIGHT, max_bytes=1 << 20, on_full="keep") as engine:
        with pytest.warns(UserWarning, match="stays on the device"):
            got = gradients(model, x, forward_of(engine))
        assert_same(got, want)
        assert engine.counts.sent > 0 and engine.counts.kept > 0


def test_pinning_that_fails_is_a_full_pool():
    model, x = make_model(), make_input()

    def fail(count):
        raise MemoryError("cudaHostRegister failed")

    with open_engine(buffers=TIGHT, on_full="keep") as engine:
        engine.link._pool._grow = fail
        with pytest.warns(UserWarning, match="cudaHostRegister failed"):
            gradients(model, x, forward_of(engine))


@every_kind
def test_closed_too_early(kind):
    model, x = make_model(), make_input()
    engine = OffloadEngine(open_link(kind)[0], buffers=TIGHT)
    with forward_of(engine):
        loss = loss_of(model(x))
    engine.close()
    with pytest.raises(OffloadFreedError, match="closed"):
        loss.backward()
    with pytest.raises(OffloadFreedError, match="closed"):
        engine.forward()
    del loss
    gc.collect()
    engine.close()


def test_use_after_free_of_a_handle():
    with open_engine(buffers=TIGHT) as engine:
        forward = forward_of(engine)
        packed = forward.pack(torch.randn(1000) * 1)
        assert packed.unpack().shape == (1000,)
        saved = packed.saved
        engine.store.dropped.append(saved)
        engine.store.collect()
        with pytest.raises(OffloadFreedError, match="after it was freed"):
            packed.unpack()
        packed._dropped = type(engine.store.dropped)()  # it has been dropped already


def test_bad_arguments():
    with open_engine() as engine:
        for bad in (
            {"ratio": 1.5},
            {"recompute_pointwise": -0.1},
            {"recompute_matmul": float("nan")},
        ):
            with pytest.raises(ValueError, match="share"):
                ActivationPolicy(**bad)
        with pytest.raises(ValueError, match="min_bytes=0"):
            engine.forward(min_bytes=0)
        with pytest.raises(ValueError, match="send_bytes=-1"):
            CopyBuffers(send_bytes=-1, keep_bytes=0, prefetch_bytes=0)
