"""The dense fp64 oracle: a single process, one sequence at a time, plain softmax."""

from __future__ import annotations

import torch
from torch import Tensor


def dense_attention(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
    """Causal attention of one sequence in fp64: q (n, heads, dim), k and v (n, kv_heads, dim)."""
    q, k, v = q.double(), k.double(), v.double()
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * softmax_scale
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    probs = scores.masked_fill(mask, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", probs, v)


def dense_attention_grads(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, dq, dk, dv) of `dense_attention`, fp64."""
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out = dense_attention(*leaves, softmax_scale)
    return (out.detach(), *torch.autograd.grad(out, leaves, dout.double()))
