"""torch's flash attention for CPU.

Use one thread per process: two OpenMP threads on a busy core turn a 0.02 ms call into 16 ms. An
empty segment would kill the process (SIGFPE); `Segments` rejects them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hdp.attention.layout import Segments

from .base import Need, lse_dtype
from .reference import spans


class CPUFlashKernel:
    """torch's blocked attention for CPU, one call per segment (it has no varlen form)."""

    name = "cpu-flash"

    @staticmethod
    def refusal(need: Need) -> str | None:
        if need.device_type != "cpu":
            return f"it runs on cpu, not {need.device_type}"
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(q)
        lse = q.new_empty((q.shape[1], q.shape[0]), dtype=lse_dtype(q.dtype))
        for rows, keys in spans(segments):
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
        for rows, keys in spans(segments):
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


def _bhsd(x: Tensor) -> Tensor:
    """(tokens, heads, dim) -> (1, heads, tokens, dim), a view."""
    return x.transpose(0, 1)[None]
