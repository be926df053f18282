"""Keep, offload or recompute: feasible, optimal against a grid, and right at the ends."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hdp.scheduler import CostModel
from hdp.scheduler.costs.activation_plan import (
    LINK_SHARE,
    SavedClass,
    decoder_classes,
    plan_activations,
    plan_microbatch,
)

SHAPE = {"hidden_size": 4096, "intermediate_size": 11008, "num_heads": 32, "num_kv_heads": 32}
LAYERS = 32


def cost_model(num_layers=LAYERS, **options):
    options = {"host_bytes_per_s": 53e9, **options}
    return CostModel.from_transformer(
        num_layers=num_layers,
        vocab_size=32000,
        flops_per_s=700e12,
        attention_flops_per_s=560e12,
        **SHAPE,
        **options,
    )


def seconds_of(sent, recompute_s, device, problem):
    """(extra seconds, device bytes) of any split, from first principles. Broadcasts.

    sent: bytes that travel; device: bytes that stay, copies under way not counted.
    """
    bytes_per_s = problem["host_bytes_per_s"] * LINK_SHARE
    copy_s = np.divide(sent, bytes_per_s) if bytes_per_s else np.where(sent > 0, math.inf, 0.0)
    late_out = np.maximum(0.0, copy_s - problem["forward_s"])
    late_back = np.maximum(0.0, copy_s - problem["backward_s"] - recompute_s)
    buffers = problem["buffer_share"] * sent / problem["num_layers"]
    return recompute_s + late_out + late_back, device + buffers


def price_of(saved):
    return 0.0 if math.isinf(saved.recompute_s_per_byte) else saved.recompute_s_per_byte


def best_of_grid(classes, problem, steps=8):
    """Fewest extra seconds of all splits in steps of 1/8 that fit; inf if none does."""
    shares = [(a / steps, b / steps) for a in range(steps + 1) for b in range(steps + 1 - a)]
    sent = recompute_s = device = np.zeros(1)
    for c in classes:
        offload, recompute = np.array([s for s in shares if s[1] == 0 or c.kind != "other"]).T
        size = c.bytes_per_token * problem["num_tokens"]
        sent = np.add.outer(sent, offload * size).ravel()
        recompute_s = np.add.outer(recompute_s, recompute * size * price_of(c)).ravel()
        device = np.add.outer(device, (1 - offload - recompute) * size).ravel()
    extra_s, device = seconds_of(sent, recompute_s, device, problem)
    fits = (sent <= problem["host_bytes"]) & (device <= problem["device_bytes"] + 1e-9)
    return float(np.min(extra_s, where=fits, initial=math.inf))


@st.composite
def problems(draw):
    number = draw(st.integers(1, 3))
    classes = []
    for i in range(number):
        kind = draw(st.sampled_from(["pointwise", "matmul", "other"]))
        price = math.inf if kind == "other" else draw(st.sampled_from([0.0, 0.1, 0.3, 1.0, 4.0]))
        size = draw(st.sampled_from([0.5, 1.0, 2.0, 5.0]))
        classes.append(
            SavedClass(name=str(i), kind=kind, bytes_per_token=size, recompute_s_per_byte=price)
        )
    total = 10 * sum(c.bytes_per_token for c in classes)
    problem = {
        "num_tokens": 10,
        "num_layers": draw(st.sampled_from([1, 2, 4, 30])),
        "forward_s": draw(st.sampled_from([0.0, 1.0, 5.0, 20.0])),
        "backward_s": draw(st.sampled_from([0.0, 2.0, 10.0])),
        "device_bytes": total * draw(st.sampled_from([0.0, 0.1, 0.4, 0.8, 1.0, 2.0])),
        "host_bytes_per_s": draw(st.sampled_from([0.0, 0.5, 2.0, 10.0])),
        "host_bytes": draw(st.sampled_from([math.inf, 0.5 * total, 0.1 * total])),
        "buffer_share": draw(st.sampled_from([0.0, 0.75, 1.9, 2.0])),
    }
    return classes, problem


@settings(max_examples=400, deadline=None)
@given(problems())
def test_no_split_of_a_grid_is_faster(drawn):
    classes, problem = drawn
    best = best_of_grid(classes, problem)
    try:
        plan = plan_activations(classes, **problem)
    except ValueError:
        assert best == math.inf  # it says that nothing fits
        return
    size = np.array([c.bytes_per_token for c in classes]) * problem["num_tokens"]
    offload = np.array([t.offload for t in plan.shares])
    recompute = np.array([t.recompute for t in plan.shares])
    keep = np.array([t.keep for t in plan.shares])
    assert np.allclose(offload + recompute + keep, 1.0)
    assert min(offload.min(), recompute.min(), keep.min()) >= -1e-9
    assert all(t.recompute == 0 for t in plan.shares if t.saved.kind == "other")
    sent = (offload * size).sum()
    recompute_s = sum(recompute * size * [price_of(c) for c in classes])
    extra_s, device = seconds_of(sent, recompute_s, (keep * size).sum(), problem)
    scale = 1 + size.sum()
    if problem["host_bytes_per_s"]:
        assert extra_s == pytest.approx(plan.extra_s, abs=1e-6 * scale)
    assert device <= problem["device_bytes"] + 1e-6 * scale
    assert plan.device_bytes == pytest.approx(device, abs=1e-6 * scale)
    assert sent <= problem["host_bytes"] + 1e-6 * scale
    assert plan.extra_s <= best + 1e-6 * scale


def test_room_for_everything():
    classes = decoder_classes(cost_model(), **SHAPE)
    plan = plan_microbatch(cost_model(), classes, num_tokens=8192, compute_s=1.0, offload_ratio=0.0)
    assert plan.extra_s == plan.host_bytes == 0
    assert all(t.keep == 1 for t in plan.shares)
    assert plan.offload_ratio == plan.recomputed_share("matmul") == 0


def test_what_fits_the_link_depends_on_the_length():
    """Short sequences recompute, long ones travel: the same share of memory at falling cost."""
    cost = cost_model()
    classes = decoder_classes(cost, **SHAPE)
    extra, recomputed, sent = [], [], []
    for tokens in (16384, 32768, 65536, 131072, 262144):
        compute_s = float(cost.compute_s(tokens, 1))
        plan = plan_microbatch(
            cost, classes, num_tokens=tokens, compute_s=compute_s, offload_ratio=1.0
        )
        extra.append(plan.extra_s / compute_s)
        recomputed.append(plan.recomputed_share("pointwise"))
        sent.append(plan.offload_ratio)
    assert extra == sorted(extra, reverse=True) and recomputed == sorted(recomputed, reverse=True)
    assert sent == sorted(sent)
    assert extra[0] < 0.2 and extra[3] < 0.02 and extra[4] == 0
    assert recomputed[0] == 1.0 and recomputed[4] == 0.0


def test_a_decoder_layer_has_the_known_bytes():
    """Counted on a Llama of transformers: 191 KB per token and layer, 93 of them not element-wise
    (tests/offloading/test_hf.py); with fused norms 150."""
    classes = decoder_classes(cost_model(), **SHAPE)
    size = {c.name: c.bytes_per_token / LAYERS / 1024 for c in classes}
    assert sum(size.values()) == pytest.approx(191, rel=0.05)
    rest = [c.bytes_per_token for c in classes if c.kind != "pointwise"]
    assert sum(rest) / LAYERS / 1024 == pytest.approx(93, rel=0.05)
    fused = decoder_classes(cost_model(), eager_norms=False, **SHAPE)
    assert sum(c.bytes_per_token for c in fused) / LAYERS / 1024 == pytest.approx(150, rel=0.02)
    assert size["gate and up"] == size["MLP products"] == 43.0


def test_recomputing_all_products_costs_the_forward_of_the_linear_part():
    cost = cost_model()
    classes = [c for c in decoder_classes(cost, **SHAPE) if c.kind == "matmul"]
    seconds = sum(c.bytes_per_token * c.recompute_s_per_byte for c in classes)
    weights = 4 * 4096**2 + 3 * 4096 * 11008
    made = weights - 4096 * 11008  # all but the one that makes the next layer's input
    assert seconds == pytest.approx(cost.linear_s / 3 * made / weights)


def test_what_does_not_fit_says_what_would():
    classes = decoder_classes(cost_model(), **SHAPE)
    total = 65536 * sum(c.bytes_per_token for c in classes)
    options = {
        "num_tokens": 65536,
        "num_layers": LAYERS,
        "forward_s": 3.0,
        "backward_s": 6.0,
        "host_bytes_per_s": 50e9,
    }
    with pytest.raises(
        ValueError, match=r"do not fit in 1\.00 GiB.*provide \d+\.\d\d GiB"
    ) as error:
        plan_activations(classes, device_bytes=1 << 30, host_bytes=10 << 30, **options)
    enough = float(str(error.value).split("; provide ")[1].split(" GiB")[0]) * (1 << 30)
    plan = plan_activations(
        classes, device_bytes=enough + (1 << 23), host_bytes=10 << 30, **options
    )
    assert plan.host_bytes == pytest.approx(10 << 30, rel=0.01)
    assert plan.recomputed_share("pointwise") == pytest.approx(1.0)
    assert 0.9 * total > plan.device_bytes
    with pytest.raises(ValueError, match=r"0\.00 GiB offloaded"):
        plan_activations(classes, device_bytes=1 << 30, **{**options, "host_bytes_per_s": 0.0})


def test_a_table_for_people():
    cost = cost_model()
    classes = decoder_classes(cost, **SHAPE)
    plan = plan_microbatch(cost, classes, num_tokens=65536, compute_s=30.0, offload_ratio=0.7)
    lines = plan.table().splitlines()
    assert len(lines) == len(classes) + 2
    assert lines[0].split() == ["class", "KB/token", "keep", "offload", "recompute"]
    assert "offloaded" in lines[-1]
    slow = replace(plan, recompute_s=0.25, late_s=0.002)
    assert "250.0 ms to recompute, 2.0 ms late" in slow.table()


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "strange"},
        {"bytes_per_token": -1.0},
        {"bytes_per_token": math.nan},
        {"recompute_s_per_byte": -1.0},
        {"kind": "other", "recompute_s_per_byte": 1.0},
        {"kind": "matmul", "recompute_s_per_byte": math.inf},
    ],
)
def test_bad_classes(fields):
    good = {"name": "x", "kind": "matmul", "bytes_per_token": 1.0, "recompute_s_per_byte": 1.0}
    with pytest.raises(ValueError, match="x: "):
        SavedClass(**{**good, **fields})
