"""Block kernels: the interface, its requirements, and the code that adapters share.

Libraries differ in names and layouts, not in what they compute. `BlockKernel` is the only interface
that hdp/attention/ring.py uses; `PackedKernel` holds the code common to all flash-attention
libraries, so that an adapter is just two calls:

* Segments of equal length (one long sequence, or 128 documents of 1K) run as a dense batch, a view
  of the same rows: dense kernels look up no offsets, and some are persistent only when dense. All
  other segments run as one varlen call.
* Every library returns lse in natural log as (num_heads, total_q) or (batch, num_heads, seqlen_q);
  both become (num_heads, total_q).
* A causal segment has as many queries as keys, so top-left and bottom-right alignment agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hdp.attention.layout import Segments

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What a kernel must support.

    capability: compute capability of the GPU, (9, 0) for Hopper; None on a CPU.
    head_dim: elements per head; None: not known yet, any value is fine.
    """

    device_type: str
    dtype: torch.dtype
    capability: tuple[int, int] | None = None
    head_dim: int | None = None


class BlockKernel(Protocol):
    """One block of attention. Segments cover all rows of q and k.

    Shapes: q (total_q, num_heads, head_dim), k and v (total_k, num_kv_heads, head_dim), out like q,
    lse (num_heads, total_q) natural log in `lse_dtype`. num_heads is a multiple of num_kv_heads;
    gradients of k and v come per KV head. Rows may be strided; elements of a row are contiguous.
    """

    name: str

    @staticmethod
    def refusal(need: Need) -> str | None:
        """Why this kernel cannot run here, with the remedy; None if it can."""
        ...

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
    """The dtype of softmax statistics and merges: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def forward_block(
    kernel: BlockKernel, q: Tensor, k: Tensor, v: Tensor, segments: Segments, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """`kernel.forward`, skipped if there are no segments (a rank without rows)."""
    if segments.seqlens_q:
        return kernel.forward(q, k, v, segments, softmax_scale)
    return torch.empty_like(q), q.new_empty((q.shape[1], 0), dtype=lse_dtype(q.dtype))


def backward_block(
    kernel: BlockKernel,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    segments: Segments,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`kernel.backward`, skipped if there are no segments."""
    if segments.seqlens_q:
        return kernel.backward(dout, q, k, v, out, lse, segments, softmax_scale)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def refuse_unless(
    need: Need, *, majors: tuple[int, ...], gpus: str, max_head_dim: int = 256
) -> str | None:
    """Why a half-precision CUDA kernel cannot run; None if device, dtype and head size fit.

    majors: major compute capabilities that it supports; gpus: the same in words.
    """
    if need.device_type != "cuda" or need.dtype not in HALF:
        dtype = str(need.dtype).removeprefix("torch.")
        return f"it needs bf16 or fp16 on cuda, got {dtype} on {need.device_type}; train in bf16"
    if need.capability is not None and need.capability[0] not in majors:
        return f"it runs on {gpus} GPUs, this one is sm_{need.capability[0]}{need.capability[1]}"
    if need.head_dim is not None and (need.head_dim % 8 or need.head_dim > max_head_dim):
        return f"head_dim {need.head_dim} is not a multiple of 8 in 8..{max_head_dim}"
    return None


def deterministic() -> bool:
    """Whether gradients must be bitwise reproducible: torch's own setting."""
    return torch.are_deterministic_algorithms_enabled()


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """Arguments of one call: varlen with cu_seqlens (num_segments + 1,) int32, dense without."""

    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    causal: bool
    softmax_scale: float


class PackedKernel:
    """Base of adapters for libraries with dense (b, s, h, d) and varlen (t, h, d) forms.

    An adapter implements `run_forward` and `run_backward`. dense: use the dense form if all
    segments have equal lengths; False: always varlen (for benchmarks).
    """

    has_dense = True

    def __init__(self, dense: bool = True) -> None:
        self._dense = dense and self.has_dense

    def run_forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """(out like q, lse): lse is (h, t) from a varlen call, (b, h, s) from a dense one."""
        raise NotImplementedError

    def run_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv); lse is contiguous, in the shape that `run_forward` returns."""
        raise NotImplementedError

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        call = self._call(segments, q.device, softmax_scale)
        if call.cu_seqlens_q is not None:
            return self.run_forward(q, k, v, call)
        dense_q, dense_k, dense_v = _batched((q, k, v), len(segments.seqlens_q))
        out, lse = self.run_forward(dense_q, dense_k, dense_v, call)
        return out.flatten(0, 1), lse.transpose(0, 1).reshape(q.shape[1], -1)

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
        call = self._call(segments, q.device, softmax_scale)
        if call.cu_seqlens_q is not None:
            return self.run_backward(dout, q, k, v, out, lse.contiguous(), call)
        size = len(segments.seqlens_q)
        lse = lse.unflatten(1, (size, -1)).transpose(0, 1).contiguous()
        dout, q, k, v, out = _batched((dout, q, k, v, out), size)
        dq, dk, dv = self.run_backward(dout, q, k, v, out, lse, call)
        return dq.flatten(0, 1), dk.flatten(0, 1), dv.flatten(0, 1)

    def _call(self, segments: Segments, device: torch.device, softmax_scale: float) -> Call:
        cu_q, cu_k = None, None
        if not (self._dense and segments.uniform):
            cu_q, cu_k = segments.cu_tensors(device)
        return Call(
            cu_seqlens_q=cu_q,
            cu_seqlens_k=cu_k,
            max_seqlen_q=segments.max_seqlen_q,
            max_seqlen_k=segments.max_seqlen_k,
            causal=segments.causal,
            softmax_scale=softmax_scale,
        )


def _batched(tensors: tuple[Tensor, ...], size: int) -> list[Tensor]:
    """(total, heads, dim) -> (size, total / size, heads, dim), views."""
    return [x.unflatten(0, (size, -1)) for x in tensors]
