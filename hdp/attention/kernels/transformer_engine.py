"""Transformer Engine's fused attention: cuDNN's kernels, with graphs cached by size class.

Its layout for packed sequences is "thd". cuDNN needs one execution graph per shape, so Transformer
Engine rounds up the batch and the number of tokens, and this adapter rounds up `max_seqlen`: runs
with ever-changing lengths build a bounded number of graphs (torch's own cuDNN path builds one per
shape: see cudnn.py).

It calls lse "softmax stats": natural log, fp32, (total_q, num_heads, 1) with cuDNN 9.6 or later
(older versions pad it per sequence and are refused here). Backward takes it in the same layout,
with a random generator state that only dropout reads.

Its multi-tensor Adam, used by hdp/training/optim.py, is also here, so that only this file imports
the library.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .base import Call, Need, PackedKernel, deterministic, refuse_unless

_REMEDY = "pip install 'transformer-engine[pytorch]>=2.0'"
_LAYOUT = "thd_thd_thd"
_MIN_CUDNN = 90600


class TransformerEngineKernel(PackedKernel):
    """Transformer Engine's fused attention (cuDNN), Ampere and newer."""

    name = "transformer-engine"
    has_dense = False  # its batched layout changes the stats layout, and packed is as fast

    @staticmethod
    def refusal(need: Need) -> str | None:
        misfit = refuse_unless(need, majors=(8, 9, 10), gpus="Ampere, Hopper and Blackwell")
        return misfit or _problem()

    def run_forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        library = _library()
        options = _options(library.fused_attn_fwd, call)
        out, aux, *_ = library.fused_attn_fwd(
            True,  # is_training: return the stats
            _size_class(call.max_seqlen_q),
            _size_class(call.max_seqlen_k),
            call.cu_seqlens_q,
            call.cu_seqlens_k,
            *(_packed(x) for x in (q, k, v)),
            q.dtype,
            library.FusedAttnBackend["F16_arbitrary_seqlen"],
            **options,
        )
        stats = aux[0]
        assert stats.shape == (q.shape[0], q.shape[1], 1), (
            f"softmax stats {tuple(stats.shape)} for q {tuple(q.shape)}: cuDNN older than 9.6?"
        )
        return out, stats[..., 0].T.contiguous()

    def run_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        library = _library()
        options = _options(library.fused_attn_bwd, call)
        if "dqkv_dtype" in inspect.signature(library.fused_attn_bwd).parameters:  # older releases
            options["dqkv_dtype"] = _te_dtype(q.dtype)
        no_dropout = torch.zeros(2, dtype=torch.int64, device=q.device)
        dq, dk, dv, *_ = library.fused_attn_bwd(
            _size_class(call.max_seqlen_q),
            _size_class(call.max_seqlen_k),
            call.cu_seqlens_q,
            call.cu_seqlens_k,
            *(_packed(x) for x in (q, k, v, out, dout)),
            q.dtype,
            aux_ctx_tensors=[lse.T.contiguous().unsqueeze(-1), no_dropout],
            fused_attention_backend=library.FusedAttnBackend["F16_arbitrary_seqlen"],
            deterministic=deterministic(),
            **options,
        )
        return dq, dk, dv


def _options(function: Any, call: Call) -> dict[str, Any]:
    """Keywords common to forward and backward; output layouts if this release accepts them."""
    options: dict[str, Any] = {
        "cu_seqlens_q_padded": call.cu_seqlens_q,  # there is no padding between sequences
        "cu_seqlens_kv_padded": call.cu_seqlens_k,
        "attn_scale": call.softmax_scale,
        "dropout": 0.0,
        "qkv_layout": _LAYOUT,
        "attn_mask_type": "padding_causal" if call.causal else "padding",
    }
    layouts = {"o_format": "thd", "do_format": "thd", "dqkv_layout": _LAYOUT}
    known = inspect.signature(function).parameters
    return options | {name: value for name, value in layouts.items() if name in known}


def _packed(x: Tensor) -> Tensor:
    """A contiguous copy if needed: the library derives strides from the layout and shape."""
    return x.contiguous()


def _size_class(seqlen: int) -> int:
    """`seqlen` rounded up to one of four sizes per power of two, at least 128."""
    step = max(128, 1 << max(0, seqlen.bit_length() - 3))
    return -(-seqlen // step) * step


# ---- the library ----


def _library() -> Any:
    import transformer_engine.pytorch  # noqa: F401 - loads the shared libraries
    import transformer_engine.pytorch.cpp_extensions.fused_attn as library

    return library


def load_adam() -> Callable[..., None]:
    """FusedAdam's kernel, called as kernel(overflow, tensor lists, numbers ...).

    Raises ValueError if it cannot be imported.
    """
    try:
        from transformer_engine.pytorch.optimizers import multi_tensor_adam, multi_tensor_applier
    except Exception as error:  # built for another torch or CUDA: any error is possible
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            "optimizer 'transformer_engine' needs Transformer Engine, which cannot be "
            f"imported ({reason}): {_REMEDY}, or use 'adamw'"
        ) from error
    return partial(multi_tensor_applier, multi_tensor_adam)


def _te_dtype(dtype: torch.dtype) -> Any:
    from transformer_engine.pytorch.constants import TE_DType

    return TE_DType[dtype]


def _problem() -> str | None:
    try:
        library = _library()
        lacking = [x for x in ("fused_attn_fwd", "fused_attn_bwd") if not hasattr(library, x)]
    except ModuleNotFoundError as error:
        return f"it is not installed (no module {error.name}): {_REMEDY}"
    except Exception as error:  # built for another torch or CUDA: any error is possible
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        return f"its import fails ({reason}); reinstall: {_REMEDY}"
    if lacking:
        return f"this release has no {', '.join(lacking)}: {_REMEDY}"
    cudnn = torch.backends.cudnn.version() or 0
    if cudnn < _MIN_CUDNN:
        return f"it needs cuDNN 9.6 or later, found {cudnn}: pip install -U nvidia-cudnn-cu13"
    return None
