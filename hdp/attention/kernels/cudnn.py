"""cuDNN's attention as called by torch: fast on Hopper, but one execution graph per shape.

Building a graph takes tens of milliseconds on the host. torch caches the graphs of dense calls by
shape and strides, but rebuilds those of varlen calls every time (at least up to torch 2.13:
pytorch/pytorch pull request 191576 measures 42 ms per call). So only dense calls are used: a run of
equal segments goes out as one batch, and a run of segments shorter than `MIN_SEQLEN`, too short to
amortize a graph, goes to torch-flash in one varlen call.

Every new length builds a graph, and torch never evicts one, so this back end is never selected
automatically: request it by name to train on a few distinct lengths where flash-attn 4 cannot be
installed. lse is natural log, fp32, (batch, num_heads, seqlen_q, 1).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hdp.attention.layout import Segments

from .base import Need, lse_dtype, refuse_unless
from .torch_flash import TorchFlashKernel

MIN_SEQLEN = 1024  # tokens, of queries and of keys


class CudnnKernel:
    """cuDNN through torch: dense calls, a graph per shape; short segments through torch-flash."""

    name = "cudnn"

    @staticmethod
    def refusal(need: Need) -> str | None:
        hopper = need.capability is None or need.capability[0] == 9
        misfit = refuse_unless(
            need,
            majors=(9, 10),
            gpus="Hopper and Blackwell",
            max_head_dim=256 if hopper else 128,
        )
        if misfit is None and not torch.backends.cudnn.is_available():
            misfit = "this torch was built without cuDNN"
        return misfit

    def __init__(self) -> None:
        self._short = TorchFlashKernel()

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        out = q.new_empty(q.shape)
        lse = q.new_empty((q.shape[1], q.shape[0]), dtype=lse_dtype(q.dtype))
        for part, rows, keys in _parts(segments):
            inputs = (q[rows], k[keys], v[keys])
            if _is_short(part):
                out[rows], lse[:, rows] = self._short.forward(*inputs, part, softmax_scale)
                continue
            dense_out, dense_lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
                *(_bhsd(x, part) for x in inputs),
                None,  # attn_bias
                True,  # compute_log_sumexp
                0.0,  # dropout
                part.causal,
                False,
                scale=softmax_scale,
            )
            out[rows] = _thd(dense_out)
            size = len(part.seqlens_q)
            by_segment = dense_lse.reshape(size, q.shape[1], -1)
            lse[:, rows] = by_segment.transpose(0, 1).flatten(1)
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
        grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
        for part, rows, keys in _parts(segments):
            inputs = (dout[rows], q[rows], k[keys], v[keys], out[rows])
            if _is_short(part):
                found = self._short.backward(*inputs, lse[:, rows], part, softmax_scale)
            else:
                found = _dense_backward(*inputs, lse[:, rows], part, softmax_scale)
            for grad, piece, span in zip(grads, found, (rows, keys, keys), strict=True):
                grad[span] = piece
        return grads


def _dense_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    part: Segments,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    size = len(part.seqlens_q)
    no_dropout = torch.empty((), dtype=torch.int64, device=q.device)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *(_bhsd(x, part) for x in (dout, q, k, v, out)),
        lse.unflatten(1, (size, -1)).transpose(0, 1).contiguous().unsqueeze(-1),
        no_dropout,
        no_dropout,
        None,  # attn_bias
        None,  # cum_seq_q
        None,
        part.max_seqlen_q,
        part.max_seqlen_k,
        0.0,
        part.causal,
        scale=softmax_scale,
    )
    return _thd(dq), _thd(dk), _thd(dv)


def _is_short(part: Segments) -> bool:
    """Whether `part`, from `_parts`, is a run of short segments."""
    return _kind((part.seqlens_q[0], part.seqlens_k[0])) is None


def _parts(segments: Segments) -> Iterator[tuple[Segments, slice, slice]]:
    """Runs of adjacent segments that share a call, with their rows of q and k."""
    shapes = list(zip(segments.seqlens_q, segments.seqlens_k, strict=True))
    cu_q, cu_k = segments.cu_seqlens_q, segments.cu_seqlens_k
    start = 0
    for stop in range(1, len(shapes) + 1):
        if stop < len(shapes) and _kind(shapes[stop]) == _kind(shapes[start]):
            continue
        lens_q, lens_k = zip(*shapes[start:stop], strict=True)
        part = Segments(lens_q, lens_k, segments.causal)
        yield part, slice(cu_q[start], cu_q[stop]), slice(cu_k[start], cu_k[stop])
        start = stop


def _kind(shape: tuple[int, int]) -> tuple[int, int] | None:
    """Segments of one kind share a call: None for short ones, the shape for long ones."""
    return None if min(shape) < MIN_SEQLEN else shape


def _bhsd(x: Tensor, part: Segments) -> Tensor:
    """(total, heads, dim) -> (segments, heads, total / segments, dim), a view."""
    return x.unflatten(0, (len(part.seqlens_q), -1)).transpose(1, 2)


def _thd(x: Tensor) -> Tensor:
    """The inverse of `_bhsd`."""
    return x.transpose(1, 2).flatten(0, 1)
