"""Which saved tensors are sent, which stay, and which are recomputed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hdp.offloading.tensors import geometry, is_parameter, travelling_range
from hdp.offloading.types import ActivationPolicy
from tests.offloading.offload_engines import (
    ROOMY,
    TIGHT,
    assert_same,
    every_kind,
    forward_of,
    gradients,
    make_input,
    make_model,
    open_engine,
)

# ---- which tensors are sent ----


def test_saved_twice_travels_once():
    with open_engine(buffers=TIGHT) as engine:
        x, w = torch.randn(50, 40, requires_grad=True), torch.randn(50, 40, requires_grad=True)
        with forward_of(engine):
            h = x * 2
            y = (h * w).sum() + (h.view(40, 50) * w.view(40, 50)).sum() + (h.t() * w.t()).sum()
        # h and w, each of which several functions saved in several shapes
        assert engine.counts.sent == 2 * 8000
        y.backward()
        assert torch.equal(w.grad, 6 * x.detach())


def test_parameters_never_travel():
    model, x = make_model(1, dtype=torch.float32), make_input(8, dtype=torch.float32)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sent = []
    with open_engine(buffers=TIGHT) as engine:
        send = engine.link.send
        engine.link.send = lambda data, stream: (
            sent.append(data.untyped_storage().data_ptr()) or send(data, stream)
        )
        want = gradients(model, x)
        got = gradients(model, x, forward_of(engine, min_bytes=1))
        assert_same(got, want)
    assert sent and not parameters & set(sent)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_of_parameters_never_travel(dtype):
    linear, x = nn.Linear(64, 64), torch.randn(2, 64)
    with open_engine(buffers=TIGHT) as engine:
        with forward_of(engine), torch.autocast("cpu", dtype=dtype):
            loss = linear(x).sum()
        assert engine.counts.sent == 0  # x is small, the weight a parameter
        loss.backward()


def test_is_parameter():
    weight = nn.Parameter(torch.randn(4, 4))
    assert is_parameter(weight) and is_parameter(weight.t()) and is_parameter(weight[1:])
    assert is_parameter(weight.to(torch.bfloat16).t())
    assert is_parameter(nn.Parameter(torch.randn(4), requires_grad=False)[1:])
    assert not is_parameter(weight * 1) and not is_parameter((weight * 1).t())
    assert not is_parameter(torch.randn(4, requires_grad=True))  # an input, say a stage's


def test_small_tensors_stay():
    with open_engine(buffers=TIGHT) as engine:
        x = torch.randn(100, requires_grad=True)
        with forward_of(engine, min_bytes=401):
            y = (x.exp() * x).sum()
        assert engine.counts.sent == engine.counts.kept == 0
        y.backward()


STRANGE = {
    "transposed": lambda x: x.t(),
    "permuted": lambda x: x.view(10, 20, 8).permute(2, 0, 1),
    "slice of rows": lambda x: x[3:20],
    "slice of columns": lambda x: x[:, 5:30],
    "every second": lambda x: x[:, ::2],
    "expanded": lambda x: x[:, :1].expand(-1, 500),
    "expanded and odd": lambda x: x[1:2, 3:].expand(70, -1),
    "flipped": lambda x: x.flip(0),
    "overlapping": lambda x: x.flatten().as_strided((50, 30), (20, 1)),
    "one row": lambda x: x.flatten()[7:600],
    "a little of much": lambda x: x.flatten()[::300].contiguous()[::2],
    "scalar": lambda x: x.sum(),
    "empty": lambda x: x[:0],
    "bool": lambda x: x > 0,
}


@every_kind
@pytest.mark.parametrize("shape", STRANGE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_views_keep_their_strides(kind, shape, dtype):
    """A restored tensor has the sizes, strides, alignment and bits of the saved one."""
    seen = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            ctx.want = (x.clone(), geometry(x).size, x.stride(), x.data_ptr() % 64)
            return x.sum().double()

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            want, size, stride, alignment = ctx.want
            assert x.shape == size and x.stride() == stride and torch.equal(x, want)
            seen.append(x.data_ptr() % 64 == alignment)
            return torch.zeros_like(x)

    base = torch.randn(40, 40).to(dtype)
    with open_engine(kind, buffers=TIGHT) as engine:
        source = base.clone().requires_grad_()
        view = STRANGE[shape](source * 2)
        if not view.requires_grad:
            view = view.double().requires_grad_()
        with forward_of(engine, min_bytes=1):
            y = Look.apply(view)
        del view
        y.backward()
        assert seen in ([True], [False] if shape == "empty" else [True])


def test_travelling_range():
    x = torch.randn(64, 64)
    assert travelling_range(x).num_bytes == 64 * 64 * 4
    assert travelling_range(x.t()) == travelling_range(x)
    assert travelling_range(x[:, :32]).num_bytes == x.untyped_storage().nbytes()  # with siblings
    assert travelling_range(x[:32]).num_bytes == 32 * 64 * 4
    assert travelling_range(x[:1].expand(64, 64)).num_bytes == 64 * 4
    assert travelling_range(x[:, :1]) is None  # 64 numbers in 16 KiB: not worth it
    row = x.flatten()[130:140]
    assert travelling_range(row).start == 512 and travelling_range(row).num_bytes == 48


def test_slices_of_one_storage_travel_once():
    """q, k, v of a fused projection: their storage is sent once, not each slice with gaps."""
    with open_engine(buffers=TIGHT) as engine:
        linear, x = nn.Linear(16, 48), torch.randn(100, 16)
        with forward_of(engine, min_bytes=1000):
            q, k, v = linear(x).split(16, dim=1)
            y = (q * k * v).sum()
        # x (100, 16), the projection (100, 48), and q * k
        assert engine.counts.sent == 6400 + 19200 + 6400
        y.backward()


# ---- recomputing ----


def test_recipes_need_less_than_they_save():
    """A decoder layer: bytes kept or sent per token, with and without recipes."""
    layers, kept = 5, {}
    model, x = make_model(layers, size=32), make_input(64)
    for name, policy in (
        ("all", ActivationPolicy()),
        ("pointwise", ActivationPolicy(recompute_pointwise=1.0)),
        ("matmul", ActivationPolicy(recompute_pointwise=1.0, recompute_matmul=1.0)),
    ):
        with open_engine(buffers=TIGHT) as engine:
            for _ in range(2):
                before = engine.counts.sent
                gradients(model, x, forward_of(engine, policy))
                kept[name] = (engine.counts.sent - before) / (layers * 64 * 32)
    assert kept["pointwise"] < 0.6 * kept["all"]
    # products: each layer's input and attention output are left, and the first residual and the
    # output of all: in bf16
    assert kept["matmul"] <= 2 * (2 * layers + 2) / layers


def test_untracked_writes_are_detected():
    """A kernel overwrites a result in place, untracked: the recipe is not used."""

    def unseen(x):
        x.numpy()[:] += 1.0  # shares memory, no version counter
        return x

    weight = nn.Parameter(torch.randn(500))

    def model(x):
        h = torch.sigmoid(x * 3) * 2  # sigmoid saves its result: twice that costs nothing
        unseen(h.detach())
        return (h * weight).sum()

    x = torch.randn(500, requires_grad=True)
    with open_engine(buffers=TIGHT) as engine:
        model(x).backward()
        want, weight.grad = weight.grad, None
        with (
            pytest.warns(UserWarning, match="untracked in-place write"),
            forward_of(engine, ActivationPolicy(recompute_pointwise=1.0)),
        ):
            y = model(x)
        y.backward()
        assert torch.equal(weight.grad, want)
        weight.grad = None
        with forward_of(
            engine, ActivationPolicy(recompute_pointwise=1.0)
        ):  # known by now, and no warning
            y = model(x)
        y.backward()
        assert torch.equal(weight.grad, want)


def test_a_source_may_be_modified_after_its_use():
    """x is not saved by autograd (its fp32 copy is), so writing to it is allowed; the recipe for
    the copy needs the old x, whether or not it has been sent."""
    for buffers, policy in (
        (TIGHT, ActivationPolicy(recompute_pointwise=1.0)),
        (ROOMY, ActivationPolicy(ratio=0.0, recompute_pointwise=1.0)),
    ):
        weight = nn.Parameter(torch.randn(500))
        x = torch.randn(500, dtype=torch.bfloat16)

        def model(x, weight):
            h = (x * 1.0).requires_grad_()
            y = (h.float() * weight).sum()
            with torch.no_grad():
                h.add_(1)
            return y

        model(x, weight).backward()
        want, weight.grad = weight.grad, None
        with open_engine(buffers=buffers) as engine:
            for _ in range(2):
                with forward_of(engine, policy):
                    y = model(x, weight)
                y.backward()
                assert torch.equal(weight.grad, want)
                weight.grad = None
