"""Stand-ins for attention libraries that need a GPU: their signatures, our reference arithmetic.

A signature is a snapshot of a release's source, read off the wheel or tag that the table names. A
stand-in binds the adapter's arguments to it (an unknown or missing name is a TypeError, as in the
library), checks what the library checks, and computes in fp64 with the layouts of the library.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from hdp.attention.kernels.reference import ReferenceKernel
from hdp.attention.layout import Segments

# ---- signatures ----

_FA2_TAIL = "softcap, alibi_slopes"
_FA2_OPTIONS = f"dropout_p, softmax_scale, causal, window_size_left, window_size_right, {_FA2_TAIL}"
_FA2_VARLEN = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
_FA2_VARLEN_FORWARD = (
    f"q, k, v, {_FA2_VARLEN}, dropout_p, softmax_scale, causal, window_size_left=-1, "
    "window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False, "
    "block_table=None, leftpad_k=None, seqused_k=None"
)
_FA2_GRADS = "dout, q, k, v, out, softmax_lse, dq, dk, dv"
_FA2 = {
    "_flash_attn_forward": f"q, k, v, {_FA2_OPTIONS}, return_softmax",
    "_flash_attn_backward": f"{_FA2_GRADS}, {_FA2_OPTIONS}, deterministic, rng_state=None",
    "_flash_attn_varlen_forward": f"{_FA2_VARLEN_FORWARD}, zero_tensors=False",
    "_flash_attn_varlen_backward": (
        f"{_FA2_GRADS}, {_FA2_VARLEN}, {_FA2_OPTIONS}, deterministic, rng_state=None, "
        "zero_tensors=False"
    ),
}

_FA3_FORWARD_2_8 = (
    "q, k, v, k_new, v_new, qv, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, "
    "seqused_k, max_seqlen_q, max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos, "
    "rotary_sin, seqlens_rotary, q_descale, k_descale, v_descale, softmax_scale, causal, "
    "window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True, "
    "scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0"
)
_FA3_FORWARD_2026 = (
    "q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None, "
    "cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, "
    "page_table=None, kv_batch_idx=None, leftpad_k=None, rotary_cos=None, rotary_sin=None, "
    "seqlens_rotary=None, q_descale=None, k_descale=None, v_descale=None, softmax_scale=None, "
    "causal=False, window_size_left=-1, window_size_right=-1, attention_chunk=0, softcap=0.0, "
    "rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0"
)
_FA3_BACKWARD_2_8 = (
    "dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, "
    "max_seqlen_q, max_seqlen_k, dq, dk, dv, softmax_scale, causal, window_size=(-1, -1), "
    "softcap=0.0, deterministic=False, sm_margin=0"
)
_FA3_BACKWARD_2026 = (
    "dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, "
    "sequed_k=None, max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, "
    "softmax_scale=None, is_causal=False, window_size_left=-1, window_size_right=-1, softcap=0.0, "
    "deterministic=False, sm_margin=0"
)

_FA4 = {
    "_flash_attn_fwd": (
        "q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, "
        "max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None, page_table=None, "
        "softmax_scale=None, causal=False, softcap=None, window_size_left=None, "
        "window_size_right=None, learnable_sink=None, tile_mn=None, mma_pv_is_rs=None, "
        "intra_wg_overlap=None, num_threads=384, num_splits=1, pack_gqa=None, _arch=None, "
        "score_mod=None, mask_mod=None, block_sparse_tensors=None, return_lse=False, out=None, "
        "lse=None, aux_tensors=None, aux_scalars=None, q_descale=None, k_descale=None, "
        "v_descale=None, gather_kv_indices=None, scheduler_metadata=None, "
        "seqlen_k_per_split=None, disable_scheduler_metadata=False, gather_bwd_recompute_p=False"
    ),
    "_flash_attn_bwd": (
        "q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, "
        "window_size_left=None, window_size_right=None, m_block_size=64, n_block_size=128, "
        "num_threads=256, pack_gqa=False, num_stages_Q=2, num_stages_dO=2, SdP_swapAB=False, "
        "dKV_swapAB=False, dQ_swapAB=False, AtomLayoutMSdP=2, AtomLayoutNdKV=2, AtomLayoutMdQ=2, "
        "V_in_regs=False, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, "
        "max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None, "
        "score_mod=None, score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, "
        "block_sparse_tensors=None, dlse=None, learnable_sink=None"
    ),
}

_TE_LENGTHS = "max_seqlen_q, max_seqlen_kv, cu_seqlens_q, cu_seqlens_kv"
_TE_FORWARD = (
    f"is_training, {_TE_LENGTHS}, q, k, v, fake_dtype, fused_attention_backend, attn_bias=None, "
    "cu_seqlens_q_padded=None, cu_seqlens_kv_padded=None{pages}, s_quantizer=None, "
    "o_quantizer=None, attn_scale=None, dropout=0.0, fast_zero_fill=True, "
    "qkv_layout='sbh3d'{formats}, attn_bias_type='no_bias', attn_mask_type='padding'{softmax}, "
    "window_size=(-1, -1){rest}"
)
_TE_BACKWARD = (
    f"{_TE_LENGTHS}, q, k, v, o, d_o, fake_dtype, {{dtype}}aux_ctx_tensors, "
    "fused_attention_backend, cu_seqlens_q_padded=None, cu_seqlens_kv_padded=None, "
    "s_quantizer=None, dp_quantizer=None, dqkv_quantizer=None, attn_scale=None, dropout=0.0, "
    "fast_zero_fill=True, qkv_layout='sbh3d'{formats}, attn_bias_type='no_bias', "
    "attn_mask_type='padding'{softmax}, window_size=(-1, -1){diagonal}, deterministic=False{rest}"
)
_TE_NEW_REST = "rng_gen=None, softmax_offset=None, return_max_logit=False, cuda_graph=False"
_TE_2_0 = {
    "fused_attn_fwd": _TE_FORWARD.format(pages="", formats="", softmax="", rest=", rng_gen=None"),
    "fused_attn_bwd": _TE_BACKWARD.format(
        dtype="dqkv_dtype, ", formats="", softmax="", diagonal="", rest=""
    ),
}
_TE_2_14 = {
    "fused_attn_fwd": _TE_FORWARD.format(
        pages=", page_table_k=None, page_table_v=None",
        formats="",
        softmax=", softmax_type='vanilla'",
        rest=f", bottom_right_diagonal=None, {_TE_NEW_REST}",
    ),
    "fused_attn_bwd": _TE_BACKWARD.format(
        dtype="dqkv_dtype, ",
        formats="",
        softmax=", softmax_type='vanilla'",
        diagonal=", bottom_right_diagonal=None",
        rest=", cuda_graph=False",
    ),
}
_TE_2_20 = {
    "fused_attn_fwd": _TE_FORWARD.format(
        pages=", page_table_k=None, page_table_v=None",
        formats=", o_format='sbhd', qkv_scale_inv_format=None",
        softmax=", softmax_type='vanilla'",
        rest=f", bottom_right_diagonal=None, {_TE_NEW_REST}",
    ),
    "fused_attn_bwd": _TE_BACKWARD.format(
        dtype="",
        formats=", o_format='sbhd', do_format='sbhd', dqkv_layout='sbh3d', "
        "qkv_scale_inv_format=None, do_scale_inv_format=None",
        softmax=", softmax_type='vanilla'",
        diagonal=", bottom_right_diagonal=None",
        rest=", cuda_graph=False",
    ),
}

# (kernel, release) -> signatures by function
RELEASES: dict[tuple[str, str], dict[str, str]] = {
    ("flash-attn-2", "2.7.0"): _FA2
    | {
        "_flash_attn_varlen_forward": _FA2_VARLEN_FORWARD,
        "_flash_attn_varlen_backward": _FA2["_flash_attn_varlen_backward"].removesuffix(
            ", zero_tensors=False"
        ),
    },
    ("flash-attn-2", "2.8.3"): _FA2,
    ("flash-attn-3", "hopper/ at v2.8.3"): {
        "_flash_attn_forward": _FA3_FORWARD_2_8,
        "_flash_attn_backward": _FA3_BACKWARD_2_8,
    },
    ("flash-attn-3", "hopper/ at 0251105a, 2026-08"): {
        "_flash_attn_forward": _FA3_FORWARD_2026,
        "_flash_attn_backward": _FA3_BACKWARD_2026,
    },
    ("flash-attn-4", "4.0.0b36"): _FA4,
    ("transformer-engine", "2.0"): _TE_2_0,
    ("transformer-engine", "2.14"): _TE_2_14,
    ("transformer-engine", "2.20.2"): _TE_2_20,
}
MODULES = {
    "flash-attn-2": "flash_attn.flash_attn_interface",
    "flash-attn-3": "flash_attn_interface",
    "flash-attn-4": "flash_attn.cute.interface",
    "transformer-engine": "transformer_engine.pytorch.cpp_extensions.fused_attn",
}


class StandIn:
    """A function with the signature `text` whose arguments `body` gets by name."""

    def __init__(self, text: str, body: Callable[[SimpleNamespace], Any]) -> None:
        self.__signature__ = inspect.signature(eval(f"lambda {text}: None"))
        self._body = body
        self.calls: list[SimpleNamespace] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = self.__signature__.bind(*args, **kwargs)
        bound.apply_defaults()
        self.calls.append(SimpleNamespace(**bound.arguments))
        return self._body(self.calls[-1])


def install(monkeypatch: Any, kernel: str, release: str) -> dict[str, StandIn]:
    """Install a release's stand-ins where `kernel` imports its library; return them by name."""
    functions = {
        name: StandIn(text, _BODIES[kernel][name])
        for name, text in RELEASES[kernel, release].items()
    }
    extra: dict[str, Any] = {"_wrapped_flash_attn_varlen_forward": None}
    if kernel == "transformer-engine":
        extra = {"FusedAttnBackend": {"F16_arbitrary_seqlen": "arbitrary"}}
        constants = ModuleType("transformer_engine.pytorch.constants")
        constants.TE_DType = {torch.bfloat16: "te bf16", torch.float32: "te fp32"}  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, constants.__name__, constants)
    parts = MODULES[kernel].split(".")
    parent: ModuleType | None = None
    for depth in range(1, len(parts) + 1):
        module = ModuleType(".".join(parts[:depth]))
        module.__path__ = []  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        if parent is not None:
            setattr(parent, parts[depth - 1], module)
        parent = module
    assert parent is not None
    for name, value in (functions | extra).items():
        setattr(parent, name, value)
    return functions


# ---- arithmetic ----


def forward(a: SimpleNamespace, causal: bool, scale: float) -> tuple[Tensor, Tensor, Segments]:
    """(out, lse, segments) of a call with cu_seqlens (varlen) or without (dense)."""
    segments = segments_of(a, causal)
    flat = [x.flatten(0, 1) if x.dim() == 4 else x for x in (a.q, a.k, a.v)]
    out, lse = ReferenceKernel().forward(*flat, segments, scale)
    if a.q.dim() == 4:
        out = out.unflatten(0, a.q.shape[:2])
        lse = lse.unflatten(1, a.q.shape[:2]).transpose(0, 1)
    return out.contiguous(), lse.float().contiguous(), segments


def backward(
    a: SimpleNamespace, dout: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, ...]:
    segments = segments_of(a, causal)
    heads = a.q.shape[-2]
    if a.q.dim() == 4:
        assert lse.shape == (a.q.shape[0], heads, a.q.shape[1]), f"lse {tuple(lse.shape)}"
    else:
        assert lse.shape == (heads, a.q.shape[0]), f"lse {tuple(lse.shape)}"
    assert lse.is_contiguous(), "lse must be contiguous"
    assert lse.dtype == torch.float32, f"lse is {lse.dtype}"
    assert dout.shape == out.shape == a.q.shape
    assert dout.dtype == out.dtype == a.q.dtype
    lse = lse.transpose(0, 1).flatten(1) if a.q.dim() == 4 else lse
    flat = [x.flatten(0, 1) if x.dim() == 4 else x for x in (dout, a.q, a.k, a.v, out)]
    grads = ReferenceKernel().backward(*flat, lse, segments, scale)
    return tuple(g.view(x.shape) for g, x in zip(grads, (a.q, a.k, a.v), strict=True))


def segments_of(a: SimpleNamespace, causal: bool) -> Segments:
    """The segments that a call describes; checks the maxima that it passes."""
    for x in (a.q, a.k, a.v):
        assert x.stride(-1) == 1, "elements of a head must be contiguous"
    cu_q, cu_k = a.cu_seqlens_q, a.cu_seqlens_k
    if cu_q is None:
        assert cu_k is None, "cu_seqlens_k without cu_seqlens_q"
        assert a.q.dim() == a.k.dim() == 4
        size = a.q.shape[0]
        return Segments((a.q.shape[1],) * size, (a.k.shape[1],) * size, causal)
    assert a.q.dim() == a.k.dim() == 3
    for cu in (cu_q, cu_k):
        assert cu.dtype == torch.int32
        assert cu.is_contiguous()
    segments = Segments(tuple(cu_q.diff().tolist()), tuple(cu_k.diff().tolist()), causal)
    assert int(cu_q[-1]) == a.q.shape[0] and int(cu_k[-1]) == a.k.shape[0]
    return segments


def _check_max(a: SimpleNamespace, segments: Segments) -> None:
    if a.q.dim() == 3:
        assert (a.max_seqlen_q, a.max_seqlen_k) == (segments.max_seqlen_q, segments.max_seqlen_k)


def _plain(a: SimpleNamespace) -> None:
    """Check that only plain attention was requested, whatever this release calls the options."""
    for name, value in vars(a).items():
        if name.startswith("window_size"):
            assert value in (-1, None, (-1, -1)), f"{name}={value}"
    for name, plain in (("softcap", (0.0, None)), ("dropout_p", (0.0,)), ("dropout", (0.0,))):
        assert getattr(a, name, plain[0]) in plain, f"{name}={getattr(a, name)}"
    for name in ("alibi_slopes", "block_table", "page_table", "seqused_q", "seqused_k", "sequed_q"):
        assert getattr(a, name, None) is None, f"{name} is given"


def _fill(a: SimpleNamespace, grads: tuple[Tensor, ...]) -> None:
    for name, grad, like in zip(("dq", "dk", "dv"), grads, (a.q, a.k, a.v), strict=True):
        buffer = getattr(a, name)
        assert buffer.shape == like.shape and buffer.dtype == like.dtype
        assert buffer.is_contiguous(), f"{name} must be contiguous"
        buffer.copy_(grad)


def _fa2_dense(a: SimpleNamespace) -> SimpleNamespace:
    return SimpleNamespace(**({"cu_seqlens_q": None, "cu_seqlens_k": None} | vars(a)))


def _fa2_forward(a: SimpleNamespace) -> tuple[Tensor, ...]:
    _plain(a)
    a = _fa2_dense(a)
    assert a.return_softmax is False
    out, lse, segments = forward(a, a.causal, a.softmax_scale)
    _check_max(a, segments)
    return out, lse, torch.empty(0), torch.empty(2)


def _fa2_backward(a: SimpleNamespace) -> Tensor:
    _plain(a)
    a = _fa2_dense(a)
    _fill(a, backward(a, a.dout, a.out, a.softmax_lse, a.causal, a.softmax_scale))
    return torch.empty(0)


def _fa3_forward(a: SimpleNamespace) -> tuple[Tensor, ...]:
    _plain(a)
    out, lse, segments = forward(a, a.causal, a.softmax_scale)
    _check_max(a, segments)
    return out, lse, torch.empty(0), torch.empty(0)


def _fa3_backward(a: SimpleNamespace) -> Tensor:
    _plain(a)
    causal = a.causal if hasattr(a, "causal") else a.is_causal
    _fill(a, backward(a, a.dout, a.out, a.softmax_lse, causal, a.softmax_scale))
    return torch.empty(0)


def _fa4_forward(a: SimpleNamespace) -> tuple[Tensor | None, ...]:
    _plain(a)
    assert a.return_lse
    out, lse, segments = forward(a, a.causal, a.softmax_scale)
    _check_max(a, segments)
    return out, lse, None, None, None


def _fa4_backward(a: SimpleNamespace) -> tuple[Tensor, ...]:
    _plain(a)
    return backward(a, a.dout, a.out, a.lse, a.causal, a.softmax_scale)


def _te(a: SimpleNamespace) -> tuple[SimpleNamespace, bool]:
    """Common checks; the arguments under the names that `forward` knows, and whether causal."""
    _plain(a)
    assert a.qkv_layout == "thd_thd_thd"
    for name, value in (("o_format", "thd"), ("do_format", "thd"), ("dqkv_layout", "thd_thd_thd")):
        assert getattr(a, name, value) == value, f"{name}={getattr(a, name)}"
    assert a.fused_attention_backend == "arbitrary"
    assert a.cu_seqlens_q_padded is a.cu_seqlens_q
    assert a.cu_seqlens_kv_padded is a.cu_seqlens_kv
    assert a.fake_dtype == a.q.dtype
    assert all(x.is_contiguous() for x in (a.q, a.k, a.v))
    causal = {"padding_causal": True, "padding": False}[a.attn_mask_type]
    renamed = SimpleNamespace(cu_seqlens_k=a.cu_seqlens_kv, **vars(a))
    segments = segments_of(renamed, causal)
    assert a.max_seqlen_q >= segments.max_seqlen_q
    assert a.max_seqlen_kv >= segments.max_seqlen_k
    return renamed, causal


def _te_forward(a: SimpleNamespace) -> tuple[Tensor, list[Tensor]]:
    renamed, causal = _te(a)
    assert a.is_training is True
    out, lse, _ = forward(renamed, causal, a.attn_scale)
    stats = lse.T.contiguous().unsqueeze(-1)  # (total_q, heads, 1)
    return out, [stats, torch.zeros(2, dtype=torch.int64)]


def _te_backward(a: SimpleNamespace) -> tuple[Tensor | None, ...]:
    renamed, causal = _te(a)
    stats, rng_state = a.aux_ctx_tensors
    assert stats.shape == (a.q.shape[0], a.q.shape[1], 1), tuple(stats.shape)
    assert stats.is_contiguous() and stats.dtype == torch.float32
    assert rng_state.shape == (2,) and rng_state.dtype == torch.int64
    assert a.o.is_contiguous() and a.d_o.is_contiguous()
    if hasattr(a, "dqkv_dtype"):
        assert a.dqkv_dtype == {torch.bfloat16: "te bf16", torch.float32: "te fp32"}[a.q.dtype]
    lse = stats[..., 0].T.contiguous()
    return (*backward(renamed, a.d_o, a.o, lse, causal, a.attn_scale), None)


_BODIES: dict[str, dict[str, Callable[[SimpleNamespace], Any]]] = {
    "flash-attn-2": {
        "_flash_attn_forward": _fa2_forward,
        "_flash_attn_backward": _fa2_backward,
        "_flash_attn_varlen_forward": _fa2_forward,
        "_flash_attn_varlen_backward": _fa2_backward,
    },
    "flash-attn-3": {"_flash_attn_forward": _fa3_forward, "_flash_attn_backward": _fa3_backward},
    "flash-attn-4": {"_flash_attn_fwd": _fa4_forward, "_flash_attn_bwd": _fa4_backward},
    "transformer-engine": {"fused_attn_fwd": _te_forward, "fused_attn_bwd": _te_backward},
}
