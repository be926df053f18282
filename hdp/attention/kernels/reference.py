"""Dense attention in fp64: the oracle for all other kernels, on any device and in any dtype."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hdp.attention.layout import Segments

from .base import Need, lse_dtype


class ReferenceKernel:
    """Dense attention in fp64 for any input dtype; memory grows with total_q * total_k."""

    name = "reference"

    @staticmethod
    def refusal(need: Need) -> str | None:
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(q)
        lse = q.new_empty((q.shape[1], q.shape[0]), dtype=lse_dtype(q.dtype))
        for rows, keys in spans(segments):
            scores = self._scores(q[rows], k[keys], segments.causal, softmax_scale)
            row_lse = scores.logsumexp(-1)
            probs = (scores - row_lse[..., None]).exp()
            out[rows] = torch.einsum("hqk,khd->qhd", probs, _expand(v[keys], q)).to(q.dtype)
            lse[:, rows] = row_lse.to(lse.dtype)
        return out, lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        segments: Segments,
        softmax_scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for rows, keys in spans(segments):
            scores = self._scores(q[rows], k[keys], segments.causal, softmax_scale)
            probs = (scores - lse[:, rows, None].double()).exp()
            do, o = dout[rows].double(), out[rows].double()
            delta = (do * o).sum(-1).T[..., None]  # (num_heads, q, 1)
            dprobs = torch.einsum("qhd,khd->hqk", do, _expand(v[keys], q))
            dscores = probs * (dprobs - delta) * softmax_scale
            dq[rows] = torch.einsum("hqk,khd->qhd", dscores, _expand(k[keys], q)).to(q.dtype)
            dk[keys] = _reduce(torch.einsum("hqk,qhd->khd", dscores, q[rows].double()), k)
            dv[keys] = _reduce(torch.einsum("hqk,qhd->khd", probs, do), v)
        return dq, dk, dv

    @staticmethod
    def _scores(q: Tensor, k: Tensor, causal: bool, softmax_scale: float) -> Tensor:
        scores = torch.einsum("qhd,khd->hqk", q.double(), _expand(k, q)) * softmax_scale
        if causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu_(1)
            scores = scores.masked_fill(mask, float("-inf"))
        return scores


def spans(segments: Segments) -> Iterator[tuple[slice, slice]]:
    """(rows of q, rows of k) slices of each segment."""
    cu_q, cu_k = segments.cu_seqlens_q, segments.cu_seqlens_k
    for i in range(len(segments.seqlens_q)):
        yield slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])


def _expand(x: Tensor, q: Tensor) -> Tensor:
    """KV heads repeated to match the heads of q, in fp64."""
    return x.double().repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _reduce(grad: Tensor, like: Tensor) -> Tensor:
    """Gradients of repeated heads, summed to the KV heads of `like`."""
    tokens, heads, dim = grad.shape
    kv_heads = like.shape[1]
    return grad.view(tokens, kv_heads, heads // kv_heads, dim).sum(2).to(like.dtype)
