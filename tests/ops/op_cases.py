"""Shared by the tests of the ops: inputs, exact fp64 results, tolerances."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hdp.ops import native as ops

NATIVE = pytest.mark.skipif("cpu" not in ops.LIBRARY.devices, reason=ops.LIBRARY.text)
CUDA_BUILT = pytest.mark.skipif("cuda" not in ops.LIBRARY.devices, reason=ops.LIBRARY.text)
LIBRARIES = [
    pytest.param("cpu", marks=NATIVE),
    pytest.param("cuda", marks=[pytest.mark.gpu, CUDA_BUILT]),
]
# For tests that apply to the native ops only; all others run the reference too.
native_only = pytest.mark.parametrize("where", LIBRARIES, indirect=True)

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Relative to the largest value. Half-precision inputs are computed in fp32.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def to_device(where, *tensors):
    device = "cuda" if where == "cuda" else "cpu"
    return tensors[0].to(device) if len(tensors) == 1 else tuple(x.to(device) for x in tensors)


def close(got, want, dtype, label="result"):
    assert got.shape == want.shape
    if not want.numel():
        return
    got, want = got.detach().double().cpu(), want.double()
    error = (got - want).abs().max() / max(1.0, want.abs().max())
    assert error <= TOLERANCE[dtype], f"{label}: off by {error:.2e}, allowed {TOLERANCE[dtype]}"


def partial_results(rows, packed, heads, dim, dtype, block_dtype, seed=0, spread=4.0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    out, lse = normal(rows, heads, dim).to(dtype), normal(heads, rows).mul(spread).to(dtype)
    block_out = normal(packed, heads, dim).to(block_dtype)
    return out, lse, block_out, normal(heads, packed).mul(spread).to(dtype)


def merged(out, lse, block_out, block_lse, spans):
    """merge_lse_ by its definition, in fp64."""
    out, lse = out.double().clone(), lse.double().clone()
    index = torch.cat([torch.arange(0), *(torch.arange(*span) for span in spans)])
    both = torch.stack((lse[:, index], block_lse.double()))
    weights = both.softmax(0)[..., None].transpose(1, 2)  # (2, packed, heads, 1)
    out[index] = weights[0] * out[index] + weights[1] * block_out.double()
    lse[:, index] = both.logsumexp(0)
    return out, lse


def logits_and_labels(rows, vocab, dtype, seed=0, ignored=0.2, scale=4.0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * scale
    labels = torch.randint(vocab, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < ignored] = ops.IGNORE_INDEX
    return logits.to(dtype), labels


def dense(logits, labels, softcap):
    """(logprobs, lse) in fp64, differentiable."""
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    ignored = labels == ops.IGNORE_INDEX
    logprobs = -F.cross_entropy(logits, labels, ignore_index=ops.IGNORE_INDEX, reduction="none")
    return logprobs, logits.logsumexp(1).masked_fill(ignored, 0.0)


def dense_grad(logits, labels, softcap, grad_logprobs, grad_lse):
    exact = logits.double().requires_grad_()
    grads = [grad_logprobs.double()] + ([] if grad_lse is None else [grad_lse.double()])
    results = dense(exact, labels, softcap)[: len(grads)]
    return torch.autograd.grad(results, exact, grads)[0]


def statistics_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32
