"""Random programs of tensor operations: the same gradients, or the same refusal, with offload.

Views of every kind, casts, in-place writes (some of which autograd forbids), branches, dropout,
checkpoints, custom functions. HYPOTHESIS_PROFILE=explore runs many more.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from hdp.offloading.types import ActivationPolicy, CopyBuffers
from tests.offloading.offload_engines import KINDS, open_engine

SIZE = 24
NUM_SEEDS = 1000 if os.environ.get("HYPOTHESIS_PROFILE") == "explore" else 40


class Scaled(torch.autograd.Function):
    """Saves an input, an output and something that is neither."""

    @staticmethod
    def forward(ctx, x):
        inner = x.sigmoid()
        out = inner * x
        ctx.save_for_backward(x, inner, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, inner, out = ctx.saved_tensors
        return grad * (inner + out * (1 - inner)) + 0 * x


UNARY = [
    F.silu,
    F.gelu,
    F.relu,
    Scaled.apply,
    torch.sigmoid,
    torch.tanh,
    lambda x: x.clamp(-2, 2).exp(),
    lambda x: torch.rsqrt(x.abs() + 1),
    lambda x: x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6).to(x.dtype),
    lambda x: F.layer_norm(x, x.shape[-1:]),
    lambda x: F.dropout(x, 0.3),
    lambda x: x.softmax(-1),
    lambda x: x.float(),
    lambda x: x.to(torch.bfloat16),
    lambda x: x.detach() * x,
    lambda x: checkpoint(lambda y: F.silu(y) * y, x, use_reentrant=False),
]
VIEWS = [
    lambda x: x.t(),
    lambda x: x.view(-1).view(SIZE, SIZE) if x.is_contiguous() else x,
    lambda x: torch.cat((x[: SIZE // 2], x[SIZE // 2 :])),
    lambda x: torch.cat(x.chunk(3, dim=1), dim=1),
    lambda x: x[:, : SIZE // 2].repeat(1, 2),
    lambda x: x[:1].expand(SIZE, SIZE),
    lambda x: x[::2].repeat_interleave(2, 0),
    lambda x: x.flip(1),
    lambda x: x.unfold(0, SIZE, 1)[0].t(),
]
BINARY = [torch.mul, torch.add, torch.sub, lambda a, b: torch.where(a > b, a, b), torch.maximum]
IN_PLACE = [
    lambda x: x.add_(0.5),
    lambda x: x.mul_(0.9),
    lambda x: x.relu_(),
    lambda x: x[1:3].zero_(),
    lambda x: x.t().mul_(1.1),
    lambda x: x.copy_(x.detach().flip(0)),
]


def program(seed, weights, num_steps=25):
    """The loss of program number `seed`. Its choices do not depend on values."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    live = [weights[0] * 1, weights[1].exp()]
    for _ in range(num_steps):
        x = live[rng.integers(len(live))]
        action = rng.random()
        if action < 0.35:
            result = UNARY[rng.integers(len(UNARY))](x)
        elif action < 0.55:
            result = VIEWS[rng.integers(len(VIEWS))](x)
        elif action < 0.7:
            y = live[rng.integers(len(live))].to(x.dtype)
            result = BINARY[rng.integers(len(BINARY))](x, y)
        elif action < 0.8:
            result = x @ weights[rng.integers(len(weights))].to(x.dtype)
        elif action < 0.86 and x.is_contiguous() and not x._is_view():
            IN_PLACE[rng.integers(len(IN_PLACE))](x)
            continue
        else:
            if len(live) > 3:
                del live[rng.integers(len(live))]
            continue
        live.append(result * 0.7 if rng.random() < 0.2 else result)
        if len(live) > 6:
            del live[0]
    return sum(x.float().square().mean() for x in live)


def run(seed, context=None):
    """[gradients], or the exception that backward ended with."""
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(SIZE, SIZE) * 0.3) for _ in range(3)]
    if context is None:
        loss = program(seed, weights)
    else:
        with context:
            loss = program(seed, weights)
    try:
        loss.backward()
    except RuntimeError as error:
        return str(error), None
    return None, [w.grad for w in weights]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", range(4))
def test_random_programs(kind, batch):
    refused = 0
    for seed in range(batch * NUM_SEEDS, (batch + 1) * NUM_SEEDS):
        rng = np.random.default_rng(seed + 10**6)
        error, want = run(seed)
        refused += error is not None
        buffers = CopyBuffers(
            send_bytes=pick_bytes(rng), keep_bytes=pick_bytes(rng), prefetch_bytes=pick_bytes(rng)
        )
        policy = ActivationPolicy(
            ratio=pick_share(rng),
            recompute_pointwise=pick_share(rng),
            recompute_matmul=pick_share(rng),
        )
        # torch 2.13 itself never frees some graphs whose backward was refused
        with open_engine(kind, buffers=buffers, seed=seed, idle=error is None) as engine:
            for _ in range(2):
                context = engine.forward(policy, min_bytes=int(rng.choice([1, 600, 2000])))
                got_error, got = run(seed, context)
                del context
                assert (error is None) == (got_error is None), (seed, error, got_error)
                for a, b in zip(got or (), want or (), strict=True):
                    same = a is b if a is None or b is None else torch.equal(a, b)
                    assert same, f"program {seed}: gradients differ"
    assert refused < NUM_SEEDS / 2  # most programs are legal, and a few are not


def pick_bytes(rng):
    return int(rng.choice([0, 3_000, 20_000, 1 << 20]))


def pick_share(rng):
    return float(rng.choice([0.0, 0.5, 1.0]))
