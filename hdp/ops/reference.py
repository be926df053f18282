"""The native ops in plain torch: they define each op, and run where no library was built.

native.py picks between these functions and csrc/. Spans are sorted, disjoint (start, stop) row
ranges of a tensor; the packed tensor holds just their rows, one span after another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

IGNORE_INDEX = -100
Spans = Sequence[tuple[int, int]]


# ---- attention: joining partial results ----


def merge(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> tuple[Tensor, Tensor]:
    """`merge_lse_` for equal numbers of rows, returning new tensors (out, lse)."""
    block_lse = block_lse.to(lse.dtype)
    # rows without any keys (both lse are -inf) must not become NaN
    difference = torch.where(lse == block_lse, 0.0, block_lse - lse)
    weight = torch.sigmoid(difference).T.unsqueeze(-1)
    return out - weight * (out - block_out), torch.logaddexp(lse, block_lse)


def join_(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """`merge_lse_` for equal numbers of rows."""
    merged_out, merged_lse = merge(out, lse, block_out, block_lse)
    out.copy_(merged_out)
    lse.copy_(merged_lse)


def merge_lse_reference_(
    out: Tensor,
    lse: Tensor,
    block_out: Tensor,
    block_lse: Tensor,
    spans: Spans,
    join: Callable[..., None] = join_,
) -> None:
    """`native.merge_lse_`, one `join` per span."""
    at = 0
    for start, stop in spans:
        packed = slice(at, at + stop - start)
        join(out[start:stop], lse[:, start:stop], block_out[packed], block_lse[:, packed])
        at = packed.stop


# ---- rows by spans ----


def gather_rows_reference(x: Tensor, spans: Spans, dim: int = 0) -> Tensor:
    """`native.gather_rows`."""
    return torch.cat([x.narrow(dim, 0, 0), *_views(x, spans, dim)], dim)


def scatter_rows_reference_(
    x: Tensor, values: Tensor, spans: Spans, dim: int = 0, accumulate: bool = False
) -> None:
    """`native.scatter_rows_`."""
    sizes = [stop - start for start, stop in spans]
    for view, part in zip(_views(x, spans, dim), values.split(sizes, dim), strict=True):
        view.add_(part) if accumulate else view.copy_(part)


def _views(x: Tensor, spans: Spans, dim: int) -> list[Tensor]:
    return [x.narrow(dim, start, stop - start) for start, stop in spans]


# ---- cross-entropy over logits ----


def softmax_cross_entropy_reference(
    logits: Tensor, labels: Tensor, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """`native.softmax_cross_entropy`."""
    logits = logits.to(statistics_dtype(logits))
    if softcap:
        logits = (logits / softcap).tanh() * softcap
    ignored = labels == IGNORE_INDEX
    lse = torch.logsumexp(logits, dim=1)
    picked = logits.gather(1, labels.masked_fill(ignored, 0)[:, None]).squeeze(1)
    return (picked - lse).masked_fill(ignored, 0.0), lse.masked_fill(ignored, 0.0)


def softmax_cross_entropy_backward_reference_(
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    grad_logprobs: Tensor,
    grad_lse: Tensor | None = None,
    softcap: float | None = None,
    grad_dtype: torch.dtype | None = None,
) -> Tensor:
    """`native.softmax_cross_entropy_backward_`."""
    ignored = labels == IGNORE_INDEX
    grad = grad_logprobs.masked_fill(ignored, 0.0)
    scale = -grad if grad_lse is None else grad_lse.masked_fill(ignored, 0.0) - grad
    lse = lse.masked_fill(ignored, math.inf)  # makes the softmax of an ignored row 0
    work, tanh = logits.to(statistics_dtype(logits)), None
    if softcap:
        tanh = work.div_(softcap).tanh_()
        work = tanh * softcap
    work.sub_(lse[:, None]).exp_().mul_(scale[:, None])
    work.scatter_add_(1, labels.masked_fill(ignored, 0)[:, None], grad[:, None])
    if tanh is not None:
        work.mul_(tanh.square_().neg_().add_(1))
    return work.to(grad_dtype or logits.dtype)


def statistics_dtype(logits: Tensor) -> torch.dtype:
    """The dtype of logprobs and lse."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
