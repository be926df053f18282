"""Ring attention over packed, unevenly sharded sequences.

Every layer on the HDP path calls `ring_attn_varlen_func`. A microbatch on one rank is a ring of
size one: the loop below runs zero times, and callers need no special case.

Forward (the numbered steps are marked in the code):
  1. send our keys and values to the next rank of the ring
  2. meanwhile attend to our own rows: local sequences and our shard, one causal varlen call
  3. for each block that arrives: send it on, attend to it, merge (out, lse)
Backward visits the same blocks with the global (out, lse). The gradient of a key block travels one
step behind it, accumulates every rank's part, and returns to its owner after a full round. If the
plan gathers a ring (`layout.gathered`), all keys are fetched at once (hdp/attention/gather.py).

Two partial softmax results are merged in fp32:
  out = out - sigmoid(block_lse - lse) * (out - block_out);  lse = log(exp(lse) + exp(block_lse))
in one fused kernel from csrc/ if it is built (hdp/ops/native.py).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hdp.ops.native import merge_lse_

from .comm import RingComm, Transfer
from .gather import gather_backward, gather_forward
from .kernels import BlockKernel, backward_block, forward_block, select_kernel
from .layout import RingLayout


def ring_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: RingLayout,
    *,
    comm: RingComm | None = None,
    softmax_scale: float | None = None,
    causal: bool = True,
    kernel: BlockKernel | None = None,
) -> Tensor:
    """Exact causal attention of the packed sequences that `layout` describes.

    Ring attention as in ByteScale section 7 (Fig. 14): keys and values move from rank to rank
    while the current block is computed. With cu_seqlens and no plan, use
    `zigzag_ring_attn_varlen_func`.

    q       (total_tokens, num_heads, head_dim), this rank's rows in the order of `layout`
    k, v    (total_tokens, num_kv_heads, head_dim), same dtype; num_kv_heads divides num_heads
    layout  which rows belong to which sequence, and which ranks hold the rest
    comm    required if layout.ring is not empty; all ranks of the ring call in the same order
    softmax_scale  None: head_dim ** -0.5
    kernel  block kernel; None: chosen by device, dtype and head size
    Returns (total_tokens, num_heads, head_dim) in the dtype of q. Differentiable in q, k and v.
    Raises ValueError for inputs that do not fit the layout, and for causal=False.
    """
    if not causal:
        raise ValueError(
            "ring attention is causal only: causal=False is not supported; pass causal=True"
        )
    _check_inputs(q, k, v, layout, comm)
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5
    if kernel is None:
        kernel = select_kernel(q.device, q.dtype, head_dim=q.shape[-1])
    return _RingAttention.apply(q, k, v, layout, comm, softmax_scale, kernel)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, layout, comm, softmax_scale, kernel):
        out, lse = _forward(q, k, v, layout, comm, softmax_scale, kernel)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = (layout, comm, softmax_scale, kernel)
        return out

    @staticmethod
    @once_differentiable  # backward treats out and lse as constants: double backward would be wrong
    def backward(ctx, dout):
        dq, dk, dv = _backward(dout, *ctx.saved_tensors, *ctx.rest)
        return dq, dk, dv, None, None, None, None


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: RingLayout,
    comm: RingComm | None,
    softmax_scale: float,
    kernel: BlockKernel,
) -> tuple[Tensor, Tensor]:
    if not layout.ring:
        return forward_block(kernel, q, k, v, layout.first, softmax_scale)
    assert comm is not None  # _check_inputs
    if layout.gathered:
        return gather_forward(q, k, v, layout, comm, softmax_scale, kernel)
    num_ring = layout.num_ring_tokens
    blocks = _Rotation(_stacked(k[:num_ring], v[:num_ring], k.dtype), layout, comm)  # 1
    out, lse = forward_block(kernel, q, k, v, layout.first, softmax_scale)  # 2
    ring_out, ring_lse = out[:num_ring].to(lse.dtype), lse[:, :num_ring]
    for step in layout.steps:  # 3
        kv = blocks.next()
        if not step.q_rows.num_rows:
            continue
        keys, values = step.k_rows.take(kv, dim=1)
        block_out, block_lse = kernel.forward(
            step.q_rows.take(q), keys, values, step.segments, softmax_scale
        )
        merge_lse_(ring_out, ring_lse, block_out, block_lse, step.q_rows.spans)
    out[:num_ring] = ring_out
    return out, lse


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: RingLayout,
    comm: RingComm | None,
    softmax_scale: float,
    kernel: BlockKernel,
) -> tuple[Tensor, Tensor, Tensor]:
    if not layout.ring:
        return backward_block(kernel, dout, q, k, v, out, lse, layout.first, softmax_scale)
    assert comm is not None
    if layout.gathered:
        return gather_backward(dout, q, k, v, out, lse, layout, comm, softmax_scale, kernel)
    num_ring = layout.num_ring_tokens
    blocks = _Rotation(_stacked(k[:num_ring], v[:num_ring], k.dtype), layout, comm)
    dq, dk, dv = backward_block(kernel, dout, q, k, v, out, lse, layout.first, softmax_scale)
    ring_dq = dq[:num_ring].to(lse.dtype)
    # Key gradients start with our own part and follow the key blocks around the ring.
    own_grads = _stacked(dk[:num_ring], dv[:num_ring], lse.dtype)
    grads = _Rotation(own_grads, layout, comm, round_trip=True)
    for step in layout.steps:
        kv = blocks.next()
        part = None
        if step.q_rows.num_rows:
            keys, values = step.k_rows.take(kv, dim=1)
            rows = step.q_rows
            part = kernel.backward(
                rows.take(dout),
                rows.take(q),
                keys,
                values,
                rows.take(out),
                rows.take(lse, dim=1),
                step.segments,
                softmax_scale,
            )
            rows.add_(ring_dq, part[0])
        dkv = grads.next(forward=False)
        if part is not None:
            step.k_rows.add_(dkv[0], part[1])
            step.k_rows.add_(dkv[1], part[2])
        grads.send(dkv)
    ring_dkv = grads.next(forward=False)
    dq[:num_ring] = ring_dq
    dk[:num_ring], dv[:num_ring] = ring_dkv
    return dq, dk, dv


class _Rotation:
    """Rotates one (2, rows, heads, dim) block per ring position around the ring.

    The next block is in flight while the caller works on the current one (double buffering).
    `round_trip`: blocks also take the last hop, back to their owner (gradients); else they stop
    one short of it.
    """

    def __init__(
        self, block: Tensor, layout: RingLayout, comm: RingComm, round_trip: bool = False
    ) -> None:
        self._layout, self._comm = layout, comm
        self._num_hops = len(layout.steps) + round_trip
        self._hop = 0
        self._pending: Transfer | None = None
        self.send(block)

    def send(self, block: Tensor) -> None:
        """Start the next hop, if any, with `block`, the last one received."""
        if self._hop == self._num_hops:
            return
        self._hop += 1
        layout = self._layout
        source = (layout.ring_rank - self._hop) % layout.ring_size
        shape = (2, layout.ring_tokens_at(source), *block.shape[2:])
        self._pending = self._comm.shift(block, layout.ring, layout.ring_rank, shape)

    def next(self, forward: bool = True) -> Tensor:
        """Wait for the next block; `forward` sends it on at once, unchanged."""
        assert self._pending is not None, f"next() called after the last of {self._num_hops} hops"
        (block,) = self._pending.wait()
        if forward:
            self.send(block)
        return block


def _stacked(first: Tensor, second: Tensor, dtype: torch.dtype) -> Tensor:
    """(2, rows, heads, dim) in `dtype`, each element read and written once."""
    block = first.new_empty((2, *first.shape), dtype=dtype)
    block[0], block[1] = first, second
    return block


def _check_inputs(
    q: Tensor, k: Tensor, v: Tensor, layout: RingLayout, comm: RingComm | None
) -> None:
    total = layout.total_tokens
    if not q.shape[0] == k.shape[0] == v.shape[0] == total:
        raise ValueError(
            f"q, k, v have {q.shape[0]}, {k.shape[0]}, {v.shape[0]} tokens; the layout has {total}"
        )
    if not q.dim() == k.dim() == v.dim() == 3:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: each must be "
            "(total_tokens, num_heads, head_dim), packed, without a batch dimension"
        )
    if k.shape != v.shape or q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: head sizes must be equal "
            "and num_heads of q a multiple of that of k"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; use one dtype")
    if layout.ring and comm is None:
        raise ValueError(f"a layout on ring {layout.ring} needs comm=RingComm(group)")
