"""Offload around an unmodified Llama from transformers: gradients, and bytes of each class."""

from __future__ import annotations

import itertools

import pytest
import torch

from hdp.offloading.types import ActivationPolicy
from hdp.scheduler import CostModel
from hdp.scheduler.costs.activation_plan import decoder_classes
from tests.offloading.offload_engines import (
    SMALL,
    TIGHT,
    assert_same,
    every_kind,
    forward_of,
    open_engine,
)

TOKENS = 128
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 128,
}


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def build(transformers, num_layers):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=64, num_hidden_layers=num_layers, **SIZES)
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16)


def gradients_of(model, forward=None, tokens=TOKENS):
    ids = torch.arange(tokens)[None] * 7 % 64
    model.zero_grad(set_to_none=True)
    if forward is None:
        loss = model(input_ids=ids, labels=ids).loss
    else:
        with forward:
            loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@every_kind
def test_gradients_are_bitwise_equal(kind, transformers):
    model = build(transformers, 2)
    want = gradients_of(model)
    for ratio, pointwise, matmul in itertools.product((0.3, 1.0), (0.0, 1.0), (0.0, 1.0)):
        policy = ActivationPolicy(
            ratio=ratio, recompute_pointwise=pointwise, recompute_matmul=matmul
        )
        with open_engine(kind, buffers=SMALL) as engine:
            for _ in range(2):
                assert_same(gradients_of(model, forward_of(engine, policy)), want)


def test_bytes_match_the_plans(transformers):
    """Per token and layer: all, without element-wise results, and without products too."""
    cost = CostModel.from_transformer(
        num_layers=1, vocab_size=64, flops_per_s=1e12, **shape_of_classes()
    )
    classes = decoder_classes(cost, head_dim=128, **shape_of_classes())
    planned = [
        sum(c.bytes_per_token for c in classes if c.kind in kinds)
        for kinds in (("other", "matmul", "pointwise"), ("other", "matmul"), ("other",))
    ]
    # Where the norms' fp32 copies are kept, what they are copies of is not: the layer's input and
    # the residual. The plan counts both, for they are what the copies are made from.
    planned[0] -= 2 * SIZES["hidden_size"] * 2
    policies = (
        ActivationPolicy(),
        ActivationPolicy(recompute_pointwise=1.0),
        ActivationPolicy(recompute_pointwise=1.0, recompute_matmul=1.0),
    )
    for policy, want in zip(policies, planned, strict=True):
        sent = []
        for num_layers in (2, 4):
            with open_engine(buffers=TIGHT) as engine:
                gradients_of(build(transformers, num_layers), forward_of(engine, policy))
                sent.append(engine.counts.sent)
        per_token = (sent[1] - sent[0]) / 2 / TOKENS
        assert per_token == pytest.approx(want, rel=0.02), policy


def shape_of_classes():
    return {
        "hidden_size": SIZES["hidden_size"],
        "intermediate_size": SIZES["intermediate_size"],
        "num_heads": SIZES["num_attention_heads"],
        "num_kv_heads": SIZES["num_key_value_heads"],
    }
