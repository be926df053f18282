"""Native ops: run csrc/ where hdp/libhdp.so supports the device, and plain torch elsewhere.

This file has the functions that the runtime calls, and what torch must know about the library's
ops besides their kernels: fake kernels and gradients. reference.py has the same ops in plain torch.

    merge_lse_                       joins two partial attention results in place, in one pass
    gather_rows, scatter_rows_       rows by spans: one launch for all spans, no index tensors
    softmax_cross_entropy            the label's logprob and the lse, reading logits once
    softmax_cross_entropy_backward_  the gradient, written over the logits

Spans are sorted, disjoint (start, stop) row ranges of a tensor; the packed tensor holds just their
rows, one span after another. A run prints at startup which implementation it uses, and so does
`hdp doctor` (`describe`). See docs/native.md for building and measurements.

Invariants (tests/ops/test_ops.py): op and reference agree for every dtype; the same input gives
the same bits; a tensor layout that the kernels do not support raises at the op, and never gives a
wrong result.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hdp.csrc.build import fingerprint
from hdp.installation import hdp_command

from .compiled import Compiled
from .reference import (
    IGNORE_INDEX,
    Spans,
    gather_rows_reference,
    join_,
    merge_lse_reference_,
    scatter_rows_reference_,
    softmax_cross_entropy_backward_reference_,
    softmax_cross_entropy_reference,
    statistics_dtype,
)

__all__ = [
    "IGNORE_INDEX",
    "LIBRARY",
    "Library",
    "describe",
    "gather_rows",
    "merge_lse_",
    "scatter_rows_",
    "softmax_cross_entropy",
    "softmax_cross_entropy_backward_",
]


# ---- attention: joining partial results ----


def merge_lse_(
    out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor, spans: Spans | None = None
) -> None:
    """Join the attention over a new key block into (out, lse), in place.

    out        (rows, num_heads, head_dim) fp32 or fp64
    lse        (num_heads, rows), dtype of out; natural log
    block_out  (packed rows, num_heads, head_dim); fp32, bf16 or fp16 if out is fp32
    block_lse  (num_heads, packed rows), dtype of lse
    spans      the rows of out that the block's queries belong to; None: all rows
    """
    spans = _all_rows(out) if spans is None else spans
    if _native(out) and _dense(out, 1) and _dense(lse, 1):
        block_out, block_lse = block_out.contiguous(), block_lse.to(lse.dtype).contiguous()
        torch.ops.hdp.merge_lse_(out, lse, block_out, block_lse, _flat(spans))
    else:
        join = COMPILED_JOIN if out.is_cuda else join_
        merge_lse_reference_(out, lse, block_out, block_lse, spans, join)


# ---- rows by spans ----


def gather_rows(x: Tensor, spans: Spans, dim: int = 0) -> Tensor:
    """The rows in `spans` along dimension 0 or 1, packed. Differentiable."""
    if _native(x) and _dense(x, dim):
        return torch.ops.hdp.gather_rows(x, _flat(spans), dim)
    return gather_rows_reference(x, spans, dim)


def scatter_rows_(
    x: Tensor, values: Tensor, spans: Spans, dim: int = 0, *, accumulate: bool = False
) -> None:
    """Set x[rows in spans] = values, or += with `accumulate`.

    With `accumulate`, half-precision values may be added to fp32.
    """
    if _native(x) and _dense(x, dim) and _adds(x, values, accumulate):
        torch.ops.hdp.scatter_rows_(x, values.contiguous(), _flat(spans), dim, accumulate)
    else:
        scatter_rows_reference_(x, values, spans, dim, accumulate)


# ---- cross-entropy over logits ----


def softmax_cross_entropy(
    logits: Tensor, labels: Tensor, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probability of each row's label, and the row's log-sum-exp. Differentiable.

    logits   (rows, vocab_size) fp64, fp32, bf16 or fp16
    labels   (rows,) int64; for IGNORE_INDEX, logprob and lse are 0 and the row gets no gradient
    softcap  replace the logits with softcap * tanh(logits / softcap); None: no cap

    Returns (logprobs, lse), each (rows,), fp64 for fp64 logits and fp32 otherwise. They are not
    finite where logits are infinite or NaN, nor, on a GPU, where a label is outside the vocabulary
    (an error on the CPU); a training step stops on that before it updates any weight.
    """
    if _native(logits) and _dense(logits, 1):
        return torch.ops.hdp.softmax_cross_entropy(logits, labels, softcap or 0.0)
    return softmax_cross_entropy_reference(logits, labels, softcap)


def softmax_cross_entropy_backward_(
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    grad_logprobs: Tensor,
    *,
    grad_lse: Tensor | None = None,
    softcap: float | None = None,
    grad_dtype: torch.dtype | None = None,
) -> Tensor:
    """The gradient of the logits, given those of logprobs and lse. Overwrites the logits.

    logits, labels, softcap  as in the forward, which returned lse
    grad_logprobs, grad_lse  (rows,) in the dtype of lse
    grad_dtype               bf16 or fp16 for fp32 logits; None: the dtype of the logits

    Returns (rows, vocab_size). A native kernel writes it into the memory of `logits`, so no second
    tensor of that size exists; the rows of a half-precision gradient keep the stride of the fp32
    logits.
    """
    if _native(logits) and _dense(logits, 1):
        torch.ops.hdp.softmax_cross_entropy_backward_(
            logits, labels, lse, grad_logprobs, grad_lse, softcap or 0.0, grad_dtype
        )
        if grad_dtype in (None, logits.dtype):
            return logits
        return logits.view(grad_dtype)[:, : logits.shape[1]]
    return softmax_cross_entropy_backward_reference_(
        logits, labels, lse, grad_logprobs, grad_lse, softcap, grad_dtype
    )


# ---- the library ----


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """The contents of hdp/libhdp.so, or why it is not used."""

    devices: frozenset[str]  # device types with kernels
    text: str


def describe(device: str) -> tuple[str, str]:
    """(what implements the ops on "cpu" or "cuda", why), as printed when a run starts."""
    if device in LIBRARY.devices:
        return "csrc", LIBRARY.text
    if LIBRARY.devices:
        build = hdp_command("doctor --build --mode cuda")
        return "plain torch", f"csrc is built for {LIBRARY.text} only; to build it: {build}"
    return "plain torch", LIBRARY.text


def _load() -> Library:
    path = Path(__file__).parent.with_name("libhdp.so")
    build = hdp_command("doctor --build")
    if not path.exists():
        return Library(devices=frozenset(), text=f"csrc is not built; to build it: {build}")
    if f"; csrc {fingerprint()}\0".encode() not in path.read_bytes():
        reason = f"hdp/libhdp.so is not built from this csrc/; to build it: {build}"
        return Library(devices=frozenset(), text=reason)
    try:
        torch.ops.load_library(str(path))
        build_info = ctypes.CDLL(str(path)).hdp_build_info
        build_info.restype = ctypes.c_char_p
        text = build_info().decode().removeprefix("hdp build: ").partition("; csrc ")[0]
        _register()
    except (OSError, AttributeError, RuntimeError) as error:
        reason = (str(error).splitlines() or ["?"])[0]
        return Library(devices=frozenset(), text=f"hdp/libhdp.so does not load: {reason}")
    devices = {"cpu", "cuda"} if "cuda" in text else {"cpu"}
    return Library(devices=frozenset(devices), text=text)


def _register() -> None:
    """Register fake kernels (shapes for tracing) and gradients with torch."""
    fake, gradient = torch.library.register_fake, torch.library.register_autograd
    for name in ("merge_lse_", "scatter_rows_", "softmax_cross_entropy_backward_"):
        fake(f"hdp::{name}", _fake_in_place)
    fake("hdp::gather_rows", _fake_gather_rows)
    gradient("hdp::gather_rows", _gather_rows_backward, setup_context=_save_gather_rows)
    fake("hdp::softmax_cross_entropy", _fake_softmax_cross_entropy)
    gradient(
        "hdp::softmax_cross_entropy",
        _softmax_cross_entropy_backward,
        setup_context=_save_softmax_cross_entropy,
    )


def _fake_in_place(*args: Any) -> None:
    return None


def _fake_gather_rows(x: Tensor, spans: list[int], dim: int) -> Tensor:
    rows = sum(spans[1::2]) - sum(spans[::2])
    return x.new_empty([*x.shape[:dim], rows, *x.shape[dim + 1 :]])


def _save_gather_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.spans, ctx.dim = inputs
    ctx.shape = x.shape


def _gather_rows_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad.new_zeros(ctx.shape)
    torch.ops.hdp.scatter_rows_(grad_x, grad.contiguous(), ctx.spans, ctx.dim, False)
    return grad_x, None, None


def _fake_softmax_cross_entropy(
    logits: Tensor, labels: Tensor, softcap: float
) -> tuple[Tensor, Tensor]:
    empty = logits.new_empty(labels.shape, dtype=statistics_dtype(logits))
    return empty, torch.empty_like(empty)


def _save_softmax_cross_entropy(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]
) -> None:
    logits, labels, ctx.softcap = inputs
    ctx.save_for_backward(logits, labels, output[1])


def _softmax_cross_entropy_backward(
    ctx: Any, grad_logprobs: Tensor, grad_lse: Tensor
) -> tuple[Tensor | None, ...]:
    logits, labels, lse = ctx.saved_tensors
    grad = logits.clone()  # the logits belong to the caller; logprobs.py overwrites its own
    torch.ops.hdp.softmax_cross_entropy_backward_(
        grad, labels, lse, grad_logprobs.contiguous(), grad_lse.contiguous(), ctx.softcap, None
    )
    return grad, None, None


# ---- small helpers ----


def _native(x: Tensor) -> bool:
    return x.device.type in LIBRARY.devices


def _dense(x: Tensor, dim: int) -> bool:
    """Whether dimensions from `dim` on are contiguous, and rows do not overlap."""
    size = 1
    for i in range(x.dim() - 1, dim - 1, -1):
        if x.stride(i) != size and x.shape[i] > 1:
            return False
        size *= x.shape[i]
    return dim == 0 or x.shape[0] <= 1 or x.stride(0) >= size


def _adds(x: Tensor, values: Tensor, accumulate: bool) -> bool:
    """Whether the native op can write or add `values` to `x`."""
    half = values.dtype in (torch.bfloat16, torch.float16)
    return x.dtype == values.dtype or (accumulate and half and x.dtype == torch.float32)


def _all_rows(x: Tensor) -> Spans:
    return ((0, x.shape[0]),)


def _flat(spans: Spans) -> list[int]:
    return [bound for span in spans for bound in span]


LIBRARY = _load()
# Used where csrc has no GPU kernels. Rows vary from call to call, heads and head_dim do not.
COMPILED_JOIN = Compiled(join_, varying=(0, 1, 0, 1))
