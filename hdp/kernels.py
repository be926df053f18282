"""Block attention: a varlen call that returns (out, lse); its backward takes global (out, lse).

A ring's attention is a sum over key blocks, joined by their log-sum-exp (lse). Every kernel here
does one block; `hdp/attention.py` walks the blocks. The backward of a block takes `out` and `lse`
of the *whole* row, not of the block: then exp(score - lse) is the true probability, the gradients
of all blocks add up to the exact gradient, and nothing is rescaled (flash-attention, arXiv
2205.14135, Algorithm 4).

    reference    dense, in fp64 inside: any device, any dtype; the oracle
    cpu-flash    torch's flash kernel for CPU: fp64, fp32, bf16, fp16
    torch-flash  torch's varlen flash kernel (FlashAttention-2) on CUDA: bf16, fp16

`select_kernel(device, dtype, name)` picks one. Shapes below: q (total_q, num_heads, head_dim),
k and v (total_k, num_kv_heads, head_dim), out like q, lse (num_heads, total_q) natural log, in fp32
(fp64 for fp64 inputs). num_heads is a multiple of num_kv_heads (GQA); gradients of k and v come per
KV head.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .layout import Segments


class BlockKernel(Protocol):
    """One block of attention. Rows of q and k that no segment covers do not exist."""

    name: str

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        """(out, lse) of this block alone."""
        ...

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
        """This block's part of (dq, dk, dv), given out and lse of the whole rows."""
        ...


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """Softmax statistics and merges: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class ReferenceKernel:
    """Dense attention in fp64 whatever the inputs are; memory grows with total_q * total_k."""

    name = "reference"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(q)
        lse = q.new_empty((q.shape[1], q.shape[0]), dtype=lse_dtype(q.dtype))
        for rows, keys in _spans(segments):
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
        for rows, keys in _spans(segments):
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


class CPUFlashKernel:
    """torch's blocked attention for CPU, one call per segment (it has no varlen form)."""

    name = "cpu-flash"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(q)
        lse = q.new_empty((q.shape[1], q.shape[0]), dtype=lse_dtype(q.dtype))
        for rows, keys in _spans(segments):
            block_out, block_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                _bhsd(q[rows]),
                _bhsd(k[keys]),
                _bhsd(v[keys]),
                0.0,
                segments.causal,
                scale=softmax_scale,
            )
            out[rows] = block_out[0].transpose(0, 1)
            lse[:, rows] = block_lse[0]
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
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for rows, keys in _spans(segments):
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                _bhsd(dout[rows]),
                _bhsd(q[rows]),
                _bhsd(k[keys]),
                _bhsd(v[keys]),
                _bhsd(out[rows]),
                lse[None, :, rows].contiguous(),
                0.0,
                segments.causal,
                scale=softmax_scale,
            )
            for grad, part, span in zip(grads, parts, (rows, keys, keys), strict=True):
                grad[span] = part[0].transpose(0, 1)
        return grads


class TorchFlashKernel:
    """FlashAttention-2 as built into torch, varlen form (`aten._flash_attention_forward`)."""

    name = "torch-flash"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        cu_q, cu_k = segments.cu_tensors(q.device)
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q,
            k,
            v,
            cu_q,
            cu_k,
            segments.max_seqlen_q,
            segments.max_seqlen_k,
            0.0,
            segments.causal,
            False,
            scale=softmax_scale,
        )
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
        cu_q, cu_k = segments.cu_tensors(q.device)
        no_dropout = torch.empty(2, dtype=torch.int64, device=q.device)
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            dout.contiguous(),
            q,
            k,
            v,
            out,
            lse.contiguous(),
            cu_q,
            cu_k,
            segments.max_seqlen_q,
            segments.max_seqlen_k,
            0.0,
            segments.causal,
            no_dropout,
            no_dropout,
            scale=softmax_scale,
        )
        return dq, dk, dv


KERNELS: dict[str, type[BlockKernel]] = {
    kernel.name: kernel for kernel in (ReferenceKernel, CPUFlashKernel, TorchFlashKernel)
}


def select_kernel(device: torch.device, dtype: torch.dtype, name: str | None = None) -> BlockKernel:
    """The kernel called `name`, or the best one for this device and dtype.

    Raises ValueError for an unknown name, or one that cannot run on `device` with `dtype`.
    """
    if name is None:
        if device.type == "cpu":
            name = "cpu-flash"
        elif device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
            name = "torch-flash"
        else:
            name = "reference"
    if name not in KERNELS:
        raise ValueError(f"attention back end {name!r} is unknown; choose one of {sorted(KERNELS)}")
    if name == "cpu-flash" and device.type != "cpu":
        raise ValueError(f"attention back end 'cpu-flash' runs on cpu, not on {device.type}")
    if name == "torch-flash" and (
        device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16)
    ):
        raise ValueError(
            f"attention back end 'torch-flash' needs bf16 or fp16 on cuda, got {dtype} on "
            f"{device.type}; leave the back end to be chosen, or train in bf16"
        )
    return KERNELS[name]()


def _spans(segments: Segments):
    """(rows of q, rows of k) slices of each segment."""
    cu_q, cu_k = segments.cu_seqlens_q, segments.cu_seqlens_k
    for i in range(len(segments.seqlens_q)):
        yield slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])


def _bhsd(x: Tensor) -> Tensor:
    """(tokens, heads, dim) -> (1, heads, tokens, dim), a view."""
    return x.transpose(0, 1)[None]


def _expand(x: Tensor, q: Tensor) -> Tensor:
    """KV heads repeated to the heads of q, in fp64."""
    return x.double().repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _reduce(grad: Tensor, like: Tensor) -> Tensor:
    """Sum gradients of repeated heads back to the KV heads of `like`."""
    tokens, heads, dim = grad.shape
    kv_heads = like.shape[1]
    return grad.view(tokens, kv_heads, heads // kv_heads, dim).sum(2).to(like.dtype)
