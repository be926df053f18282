"""Llama-shaped decoder layers alone: what tools/bench_offload.py trains.

RMSNorm (torch's fused one), rotary positions, causal attention through hdp's kernels, SwiGLU. No
embedding and no head: what a pipeline stage in the middle of a model does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hdp.attention.kernels import BlockKernel
from hdp.attention.layout import RingLayout
from hdp.attention.ring import ring_attn_varlen_func


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a layer, in elements."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def num_weights(self) -> int:
        """Elements of a layer's matrices."""
        heads = 2 * self.num_heads + 2 * self.num_kv_heads
        return self.hidden_size * (heads * self.head_dim + 3 * self.intermediate_size)

    def flops(self, tokens: int) -> float:
        """Forward + backward of one layer over one causal sequence."""
        attention = 3.5 * 4 * tokens * tokens / 2 * self.num_heads * self.head_dim
        return 6 * self.num_weights * tokens + attention


LLAMA_7B = Shape(
    hidden_size=4096, intermediate_size=11008, num_heads=32, num_kv_heads=32, head_dim=128
)
TINY = Shape(hidden_size=64, intermediate_size=176, num_heads=4, num_kv_heads=4, head_dim=16)


class DecoderLayer(nn.Module):
    """One layer; input and output (tokens, hidden_size)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        hidden, heads = shape.hidden_size, shape.num_heads * shape.head_dim
        kv = shape.num_kv_heads * shape.head_dim
        self.norm1, self.norm2 = nn.RMSNorm(hidden, eps=1e-6), nn.RMSNorm(hidden, eps=1e-6)
        self.q, self.k, self.v = (nn.Linear(hidden, n, bias=False) for n in (heads, kv, kv))
        self.out = nn.Linear(heads, hidden, bias=False)
        self.gate = nn.Linear(hidden, shape.intermediate_size, bias=False)
        self.up = nn.Linear(hidden, shape.intermediate_size, bias=False)
        self.down = nn.Linear(shape.intermediate_size, hidden, bias=False)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], layout: RingLayout, kernel: BlockKernel
    ) -> Tensor:
        h = self.norm1(x)
        q, k, v = (
            linear(h).unflatten(-1, (-1, self.shape.head_dim))
            for linear in (self.q, self.k, self.v)
        )
        q, k = _rotate(q, *rotary), _rotate(k, *rotary)
        attended = ring_attn_varlen_func(q, k, v, layout, kernel=kernel)
        x = x + self.out(attended.flatten(1))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class DecoderLayers(nn.Module):
    """Several layers; `recompute`: by torch's activation checkpoints, each of them."""

    def __init__(self, shape: Shape, num_layers: int, kernel: BlockKernel) -> None:
        super().__init__()
        self.shape, self.kernel, self.recompute = shape, kernel, False
        self.layers = nn.ModuleList([DecoderLayer(shape) for _ in range(num_layers)])

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], layout: RingLayout) -> Tensor:
        for layer in self.layers:
            if self.recompute:
                x = checkpoint(layer, x, rotary, layout, self.kernel, use_reentrant=False)
            else:
                x = layer(x, rotary, layout, self.kernel)
        return x


def rotary_angles(
    tokens: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin, (tokens, 1, head_dim)."""
    powers = torch.arange(0, head_dim, 2, device=device) / head_dim
    angles = torch.outer(torch.arange(tokens, device=device), 10000.0**-powers)
    both = torch.cat((angles, angles), dim=-1)[:, None]
    return both.cos().to(dtype), both.sin().to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
