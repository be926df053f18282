"""FlashAttention-2 as built into torch: on every GPU since Ampere, with nothing to install.

Half the speed of flash-attn 4 on Hopper (docs/gpu.md: 347 versus 650 TFLOP/s forward at 32K). It
calls the aten operators under `torch.nn.attention.varlen`, whose public form has no backward from a
global lse. Causal masks are aligned bottom-right.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Call, Need, PackedKernel, refuse_unless


class TorchFlashKernel(PackedKernel):
    """FlashAttention-2 as built into torch."""

    name = "torch-flash"

    @staticmethod
    def refusal(need: Need) -> str | None:
        return refuse_unless(need, majors=(8, 9, 10, 11, 12), gpus="Ampere and newer")

    def run_forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q,
            k,
            v,
            call.cu_seqlens_q,
            call.cu_seqlens_k,
            call.max_seqlen_q,
            call.max_seqlen_k,
            0.0,  # dropout
            call.causal,
            False,  # no debug mask
            scale=call.softmax_scale,
        )
        return out, lse

    def run_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        no_dropout = torch.empty(2, dtype=torch.int64, device=q.device)
        return torch.ops.aten._flash_attention_backward(
            dout.contiguous(),
            q,
            k,
            v,
            out,
            lse,
            call.cu_seqlens_q,
            call.cu_seqlens_k,
            call.max_seqlen_q,
            call.max_seqlen_k,
            0.0,
            call.causal,
            no_dropout,
            no_dropout,
            scale=call.softmax_scale,
        )
