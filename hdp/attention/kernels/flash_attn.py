"""flash-attn 2, 3 and 4 (github.com/Dao-AILab/flash-attention): three adapters of two calls each.

    flash-attn-2   pip install flash-attn (2.7 or later; compiles)      Ampere and newer
    flash-attn-3   the repository's hopper/ folder (compiles)           Hopper
    flash-attn-4   pip install flash-attn-4 (nothing to compile)        Hopper, Blackwell

The adapters call the functions under the libraries' autograd classes, because a block's backward
needs the out and lse of whole rows, which those classes do not accept.
tests/attention/test_foreign_kernels.py checks their signatures against snapshots of the releases.
All three return lse in natural log, fp32, as (num_heads, total_q) from a varlen call and
(batch, num_heads, seqlen_q) from a dense one; accept grouped KV heads; and align causal masks
bottom-right.

flash-attn 4 compiles a kernel on its first call (3 s), then one for each combination of dtype, head
size, heads per KV head, causal, dense or varlen, and "fits in one tile"; lengths do not matter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Call, Need, PackedKernel, deterministic, refuse_unless

_NO_WINDOW = -1


class FlashAttn2Kernel(PackedKernel):
    """FlashAttention-2, CUDA for Ampere and newer."""

    name = "flash-attn-2"

    @staticmethod
    def refusal(need: Need) -> str | None:
        misfit = refuse_unless(need, majors=(8, 9, 10, 12), gpus="Ampere and newer")
        return misfit or _import_problem(_flash_attn_2, "pip install 'flash-attn>=2.7'")

    def run_forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        library = _flash_attn_2()
        window: dict[str, Any] = {
            "window_size_left": _NO_WINDOW,
            "window_size_right": _NO_WINDOW,
            "softcap": 0.0,
            "alibi_slopes": None,
            "return_softmax": False,
        }
        options = (0.0, call.softmax_scale, call.causal)  # dropout_p, softmax_scale, causal
        if call.cu_seqlens_q is None:
            out, lse, *_ = library._flash_attn_forward(q, k, v, *options, **window)
        else:
            out, lse, *_ = library._flash_attn_varlen_forward(
                q,
                k,
                v,
                call.cu_seqlens_q,
                call.cu_seqlens_k,
                call.max_seqlen_q,
                call.max_seqlen_k,
                *options,
                **window,
            )
        return out, lse

    def run_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        library = _flash_attn_2()
        grads = _empty_grads(q, k, v)
        options: dict[str, Any] = {
            "dropout_p": 0.0,
            "softmax_scale": call.softmax_scale,
            "causal": call.causal,
            "window_size_left": _NO_WINDOW,
            "window_size_right": _NO_WINDOW,
            "softcap": 0.0,
            "alibi_slopes": None,
            "deterministic": deterministic(),
        }
        if call.cu_seqlens_q is None:
            library._flash_attn_backward(dout, q, k, v, out, lse, *grads, **options)
        else:
            library._flash_attn_varlen_backward(
                dout,
                q,
                k,
                v,
                out,
                lse,
                *grads,
                call.cu_seqlens_q,
                call.cu_seqlens_k,
                call.max_seqlen_q,
                call.max_seqlen_k,
                **options,
            )
        return grads


class FlashAttn3Kernel(PackedKernel):
    """FlashAttention-3, CUDA for Hopper."""

    name = "flash-attn-3"

    @staticmethod
    def refusal(need: Need) -> str | None:
        misfit = refuse_unless(need, majors=(9,), gpus="Hopper")
        remedy = "build the hopper/ folder of github.com/Dao-AILab/flash-attention"
        return misfit or _import_problem(_flash_attn_3, remedy)

    # Releases name the parameters after `causal` differently; up to `causal` the order is stable.

    def run_forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        max_q, max_k = _max_seqlens(call)
        out, lse, *_ = _flash_attn_3()._flash_attn_forward(
            q,
            k,
            v,
            *(None, None, None, None),  # k_new, v_new, qv, out
            *(call.cu_seqlens_q, call.cu_seqlens_k, None),  # cu_seqlens_k_new
            *(None, None),  # seqused_q, seqused_k
            *(max_q, max_k),
            *(None, None, None),  # page_table, kv_batch_idx, leftpad_k
            *(None, None, None),  # rotary_cos, rotary_sin, seqlens_rotary
            *(None, None, None),  # q_descale, k_descale, v_descale
            call.softmax_scale,
            call.causal,
        )
        return out, lse

    def run_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        max_q, max_k = _max_seqlens(call)
        grads = _empty_grads(q, k, v)
        _flash_attn_3()._flash_attn_backward(
            dout,
            q,
            k,
            v,
            out,
            lse,
            *(call.cu_seqlens_q, call.cu_seqlens_k),
            *(None, None),  # seqused_q, seqused_k
            *(max_q, max_k),
            *grads,
            call.softmax_scale,
            call.causal,
            deterministic=deterministic(),
        )
        return grads


class FlashAttn4Kernel(PackedKernel):
    """FlashAttention-4, CuTe kernels for Hopper and Blackwell."""

    name = "flash-attn-4"

    @staticmethod
    def refusal(need: Need) -> str | None:
        misfit = refuse_unless(need, majors=(9, 10, 11), gpus="Hopper and Blackwell")
        if misfit is None and need.capability is not None and need.head_dim is not None:
            major = need.capability[0]
            if major > 9 and need.head_dim > 128 and need.head_dim != 256:
                misfit = f"on sm_{major}x it supports head sizes up to 128, and 256"
        return misfit or _import_problem(_flash_attn_4, "pip install 'flash-attn-4[cu13]'")

    def run_forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        max_q, max_k = _max_seqlens(call)
        out, lse, *_ = _flash_attn_4()._flash_attn_fwd(
            q,
            k,
            v,
            cu_seqlens_q=call.cu_seqlens_q,
            cu_seqlens_k=call.cu_seqlens_k,
            max_seqlen_q=max_q,
            max_seqlen_k=max_k,
            softmax_scale=call.softmax_scale,
            causal=call.causal,
            return_lse=True,
        )
        return out, lse

    def run_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        max_q, max_k = _max_seqlens(call)
        dq, dk, dv, *_ = _flash_attn_4()._flash_attn_bwd(
            q,
            k,
            v,
            out,
            dout,
            lse,
            softmax_scale=call.softmax_scale,
            causal=call.causal,
            cu_seqlens_q=call.cu_seqlens_q,
            cu_seqlens_k=call.cu_seqlens_k,
            max_seqlen_q=max_q,
            max_seqlen_k=max_k,
            deterministic=deterministic(),
        )
        return dq, dk, dv


# ---- the libraries ----


def _flash_attn_2() -> Any:
    import flash_attn.flash_attn_interface as library

    return library


def _flash_attn_3() -> Any:
    import flash_attn_interface as library

    return library


def _flash_attn_4() -> Any:
    import flash_attn.cute.interface as library

    return library


# Functions that a release must have; 2.7 added the wrapped name and split window_size in two.
_FUNCTIONS = {
    "_flash_attn_2": ("_wrapped_flash_attn_varlen_forward", "_flash_attn_varlen_backward"),
    "_flash_attn_3": ("_flash_attn_forward", "_flash_attn_backward"),
    "_flash_attn_4": ("_flash_attn_fwd", "_flash_attn_bwd"),
}


def _import_problem(load: Any, remedy: str) -> str | None:
    """Why the library that `load` imports cannot be used, with the remedy; None if it can."""
    try:
        library = load()
    except ModuleNotFoundError as error:
        return f"it is not installed (no module {error.name}): {remedy}"
    except Exception as error:  # built for another torch, CUDA or Python: any error is possible
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        return f"its import fails ({reason}); reinstall: {remedy}"
    lacking = [name for name in _FUNCTIONS[load.__name__] if not hasattr(library, name)]
    return f"this release has no {', '.join(lacking)}: {remedy}" if lacking else None


def _max_seqlens(call: Call) -> tuple[int | None, int | None]:
    """max_seqlen_q and max_seqlen_k of a varlen call; a dense call has none."""
    return (None, None) if call.cu_seqlens_q is None else (call.max_seqlen_q, call.max_seqlen_k)


def _empty_grads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))  # type: ignore[return-value]
