"""Native ops: one call of csrc/ where hdp/libhdp.so has it for the device, else plain torch.

Each op is here as the function that the runtime calls and, if there is a library, as what torch
must know beyond its kernels: the fake kernel and the gradient. reference.py has the same ops in
plain torch.

    merge_lse_                       joins two partial attention results in place, in one pass
    gather_rows, scatter_rows_       rows by spans: one launch for all spans, no index tensors
    softmax_cross_entropy            logprob of the label and lse, logits read once
    softmax_cross_entropy_backward_  the gradient, written over the logits

Spans are sorted, disjoint (start, stop) row ranges of a tensor; the packed tensor has their rows
one after the other. Which implementation runs is said once, when a run starts, and in `hdp doctor`
(`describe`). docs/native.md: how to build, what is measured and what is not.

Invariants (tests/ops/test_ops.py): op and reference agree for every dtype; the same input gives
the same bits; a tensor that the kernels cannot walk is an error at the op, never a wrong result.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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

_INPUTS = (".h", ".cuh", ".cpp", ".cu", ".py")  # of the library, under csrc/


# ---- attention: joining partial results ----


def merge_lse_(
    out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor, spans: Spans | None = None
) -> None:
    """Join the attention of a new key block into (out, lse), in place.

    out        (rows, num_heads, head_dim) fp32 or fp64
    lse        (num_heads, rows) like out; natural log
    block_out  (packed rows, num_heads, head_dim), for fp32 any of fp32, bf16, fp16
    block_lse  (num_heads, packed rows) like lse
    spans      rows of out that the block's queries are; None: all
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
    """The rows of `spans` along dimension 0 or 1, packed. Differentiable."""
    if _native(x) and _dense(x, dim):
        return torch.ops.hdp.gather_rows(x, _flat(spans), dim)
    return gather_rows_reference(x, spans, dim)


def scatter_rows_(
    x: Tensor, values: Tensor, spans: Spans, dim: int = 0, *, accumulate: bool = False
) -> None:
    """x[rows of spans] = values, or += with `accumulate` (then `values` may be narrower: half
    precision added to fp32)."""
    if _native(x) and _dense(x, dim) and _adds(x, values, accumulate):
        torch.ops.hdp.scatter_rows_(x, values.contiguous(), _flat(spans), dim, accumulate)
    else:
        scatter_rows_reference_(x, values, spans, dim, accumulate)


# ---- cross-entropy over logits ----


def softmax_cross_entropy(
    logits: Tensor, labels: Tensor, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probability of each row's label, and the log-sum-exp of the row. Differentiable.

    logits   (rows, vocab_size) fp64, fp32, bf16 or fp16; with a cap, softcap * tanh(logits /
             softcap) takes their place
    labels   (rows,) int64; IGNORE_INDEX: logprob and lse are 0, and the row gets no gradient
    Returns (logprobs, lse), each (rows,), fp64 for fp64 logits and fp32 otherwise. Infinite or NaN
    logits make them non-finite; so does, on a GPU, a label outside of the vocabulary (on the CPU an
    error): a training step stops on that before it does harm.
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
    """Gradient of the logits, given those of logprobs and lse; the logits are used up.

    logits, labels, softcap  as in the forward; lse is its result
    grad_logprobs, grad_lse  (rows,) in the dtype of lse
    grad_dtype               bf16 or fp16 for fp32 logits; None: the dtype of the logits
    Returns (rows, vocab_size), where there is a kernel in the memory of `logits`: no second tensor
    of that size exists, though the rows of a narrower gradient lie twice its width apart.
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
    """What is in hdp/libhdp.so, or why it is not used."""

    devices: frozenset[str]  # device types that it has kernels for
    text: str


def describe(device: str) -> tuple[str, str]:
    """(what implements the ops on "cpu" or "cuda", why): said when a run starts."""
    if device in LIBRARY.devices:
        return "csrc", LIBRARY.text
    if LIBRARY.devices:
        return "plain torch", f"csrc is built for {LIBRARY.text}: python csrc/build.py --mode cuda"
    return "plain torch", LIBRARY.text


def _load() -> Library:
    path = Path(__file__).parent.with_name("libhdp.so")
    sources = path.parent.parent / "csrc"  # in a checkout; an installed package has none
    if not path.exists():
        return Library(devices=frozenset(), text="csrc is not built")
    if (sources / "library.cpp").exists():
        newest = max(file.stat().st_mtime for file in sources.rglob("*") if file.suffix in _INPUTS)
        if newest > path.stat().st_mtime:
            reason = "hdp/libhdp.so is older than csrc/: python csrc/build.py"
            return Library(devices=frozenset(), text=reason)
    try:
        torch.ops.load_library(str(path))
        build_info = ctypes.CDLL(str(path)).hdp_build_info
        build_info.restype = ctypes.c_char_p
        text = build_info().decode().removeprefix("hdp build: ")
        _register()
    except (OSError, AttributeError, RuntimeError) as error:
        reason = (str(error).splitlines() or ["?"])[0]
        return Library(devices=frozenset(), text=f"hdp/libhdp.so does not load: {reason}")
    devices = {"cpu", "cuda"} if "cuda" in text else {"cpu"}
    return Library(devices=frozenset(devices), text=text)


def _register() -> None:
    """Shapes for tracing (fake kernels), and the gradients of the ops that have one."""
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
    grad = logits.clone()  # the caller's logits stay what they are; logprobs.py owns its own
    torch.ops.hdp.softmax_cross_entropy_backward_(
        grad, labels, lse, grad_logprobs.contiguous(), grad_lse.contiguous(), ctx.softcap, None
    )
    return grad, None, None


# ---- small helpers ----


def _native(x: Tensor) -> bool:
    return x.device.type in LIBRARY.devices


def _dense(x: Tensor, dim: int) -> bool:
    """Dimensions from `dim` on lie densely one in the other."""
    size = 1
    for i in range(x.dim() - 1, dim - 1, -1):
        if x.stride(i) != size and x.shape[i] > 1:
            return False
        size *= x.shape[i]
    return dim == 0 or x.shape[0] <= 1 or x.stride(0) >= size


def _adds(x: Tensor, values: Tensor, accumulate: bool) -> bool:
    """Whether the native op can put or add `values` into `x`."""
    half = values.dtype in (torch.bfloat16, torch.float16)
    return x.dtype == values.dtype or (accumulate and half and x.dtype == torch.float32)


def _all_rows(x: Tensor) -> Spans:
    return ((0, x.shape[0]),)


def _flat(spans: Spans) -> list[int]:
    return [bound for span in spans for bound in span]


LIBRARY = _load()
# Where csrc has no kernel for the GPU: rows vary from call to call, heads and head_dim do not.
COMPILED_JOIN = Compiled(join_, varying=(0, 1, 0, 1))
