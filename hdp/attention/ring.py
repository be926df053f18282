"""Ring attention over packed, unevenly sharded sequences.

`ring_attn_varlen_func` is the attention of every layer on the HDP path. A microbatch on one rank is
a ring of length one: the loop below runs zero times, and nothing is a special case for the caller.

Forward (numbers are those in the code):
  1. send our keys and values to the next rank of the ring
  2. meanwhile attend to what is here: local sequences and our own shard, one causal varlen call
  3. for each block that arrives: send it on, attend to it, merge (out, lse)
Backward walks the same blocks with the global (out, lse). The gradient of a key block travels with
it, one step behind, gathers every rank's part and comes home after a full round. A ring that the
plan has as gathered (`layout.gathered`) fetches all keys at once instead (hdp/attention/gather.py).

Merging two partial softmax results (peers.md: all rings do this, in fp32):
  out = out - sigmoid(block_lse - lse) * (out - block_out);  lse = log(exp(lse) + exp(block_lse))
one fused kernel of csrc/ where it is built (hdp/ops/native.py).
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

    The ring attention of ByteScale section 7 (Fig. 14): keys and values go from rank to rank while
    the block in hand is computed. Whoever has cu_seqlens and no plan takes
    `zigzag_ring_attn_varlen_func`.

    q       (total_tokens, num_heads, head_dim), this rank's rows in the order of `layout`
    k, v    (total_tokens, num_kv_heads, head_dim), same dtype; num_kv_heads divides num_heads
    layout  which rows belong to which sequence, and the ranks that hold the rest of them
    comm    needed when layout.ring is not empty; all ranks of the ring call in the same order
    softmax_scale  None: head_dim ** -0.5
    kernel  block kernel; chosen by device, dtype and head size if None
    Returns (total_tokens, num_heads, head_dim) in the dtype of q. Differentiable in q, k and v.
    Raises ValueError for inputs that do not fit the layout, and for causal=False.
    """
    if not causal:
        raise ValueError("ring attention is causal; causal=False has no zigzag balance to keep")
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
    @once_differentiable  # out and lse are constants here: a second gradient would be wrong
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
    # the gradient of the block in hand: first our own, which leaves with the block itself
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
    """A (2, rows, heads, dim) block per ring position, travelling round the ring.

    The next block is under way while the caller works on the one in hand (double buffering).
    `round_trip`: the blocks make the last hop home too (gradients), else they stop before it.
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
        """Start the next hop, if there is one, with `block`, the one that arrived last."""
        if self._hop == self._num_hops:
            return
        self._hop += 1
        layout = self._layout
        source = (layout.ring_rank - self._hop) % layout.ring_size
        shape = (2, layout.ring_tokens_at(source), *block.shape[2:])
        self._pending = self._comm.shift(block, layout.ring, layout.ring_rank, shape)

    def next(self, forward: bool = True) -> Tensor:
        """The block that arrives now; `forward` sends it on at once, unchanged."""
        assert self._pending is not None, "more blocks asked for than there are hops"
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
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: each is (total_tokens, "
            "num_heads, head_dim), packed without a batch dimension"
        )
    if k.shape != v.shape or q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: head sizes must be equal "
            "and the heads of q a multiple of those of k"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; use one")
    if layout.ring and comm is None:
        raise ValueError(f"a layout on ring {layout.ring} needs comm=RingComm(group)")
