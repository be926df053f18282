"""Other libraries' public attention functions, the baselines of tools/bench_attention.py.

Each takes q (total_tokens, num_heads, head_dim), k and v (total_tokens, num_kv_heads, head_dim) and
returns a differentiable out with the shape of q. Libraries that are not installed are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hdp.attention.layout import Segments

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def direct_attention(seqlens: tuple[int, ...], device: torch.device) -> dict[str, Attend]:
    """Causal attention over packed sequences, by name, for each applicable installed library."""
    segments = Segments(seqlens, seqlens, causal=True)
    size = len(seqlens)
    found: dict[str, Attend] = {}
    if segments.uniform:
        found |= _torch_attention(device, size)
    for name, library in _libraries(device).items():
        if segments.uniform:

            def dense(q, k, v, library=library):
                batch = [x.unflatten(0, (size, -1)) for x in (q, k, v)]
                return _first(library.flash_attn_func(*batch, causal=True)).flatten(0, 1)

            found[name] = dense
        if size == 1:
            continue

        def varlen(q, k, v, library=library):
            cu_q, cu_k = segments.cu_tensors(device)
            longest = segments.max_seqlen_q
            lengths = {"max_seqlen_q": longest, "max_seqlen_k": longest}
            offsets = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
            out = library.flash_attn_varlen_func(q, k, v, **offsets, **lengths, causal=True)
            return _first(out)

        found[f"{name} varlen"] = varlen
    if size > 1 and device.type == "cuda":
        found["torch flash varlen"] = _torch_varlen(segments, device)
    if not found:  # ragged, and no library supports packing: one call per sequence
        found["torch, a call each"] = _each(seqlens)
    return found


def _torch_attention(device: torch.device, size: int) -> dict[str, Attend]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def with_backend(backend: SDPBackend) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            qs, ks, vs = (x.unflatten(0, (size, -1)).transpose(1, 2) for x in (q, k, v))
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(
                    qs, ks, vs, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
                )
            return out.transpose(1, 2).flatten(0, 1)

        return attend

    backends = {"torch flash": SDPBackend.FLASH_ATTENTION}
    if device.type == "cuda":
        backends["torch cudnn"] = SDPBackend.CUDNN_ATTENTION
    return {name: with_backend(backend) for name, backend in backends.items()}


def _torch_varlen(segments: Segments, device: torch.device) -> Attend:
    from torch.nn.attention.varlen import varlen_attn

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped: dict[str, Any] = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
        offsets = segments.cu_tensors(device)
        longest = (segments.max_seqlen_q, segments.max_seqlen_k)
        out = varlen_attn(q, k, v, *offsets, *longest, window_size=(-1, 0), **grouped)
        assert isinstance(out, Tensor)  # a tuple only on request
        return out

    return attend


def _each(seqlens: tuple[int, ...]) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = []
        for lengths in zip(*(x.split(seqlens) for x in (q, k, v)), strict=True):
            qs, ks, vs = (x[None].transpose(1, 2) for x in lengths)
            out = F.scaled_dot_product_attention(qs, ks, vs, is_causal=True, enable_gqa=True)
            parts.append(out[0].transpose(0, 1))
        return torch.cat(parts)

    return attend


def _libraries(device: torch.device) -> dict:
    """The flash-attn releases that can be imported."""
    found = {}
    if device.type == "cuda":
        for name, module in (
            ("flash-attn-4", "flash_attn.cute"),
            ("flash-attn-3", "flash_attn_interface"),
            ("flash-attn-2", "flash_attn"),
        ):
            try:
                library = __import__(module, fromlist=["flash_attn_func"])
            except Exception:  # not installed, or built for another torch
                continue
            if hasattr(library, "flash_attn_func"):
                found[name] = library
    return found


def _first(result: Tensor | tuple) -> Tensor:
    return result[0] if isinstance(result, tuple) else result
