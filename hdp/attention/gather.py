"""Gather mode: small rings fetch all keys at once instead of one block per ring step.

A ring of d ranks normally runs d attention calls and d - 1 merges. With few rows per shard,
launches and half-filled GPUs cost more than the arithmetic. Gather mode runs three calls and two
merges for any d:

  1. send every other rank the keys and values that it needs, in one batch
  2. meanwhile, attend to our own shard and the local sequences: one causal call, as on the ring
  3. late queries attend to all gathered keys: a rectangle
  4. early queries attend to the early chunks of the positions before ours: also a rectangle

Zigzag keeps 3 and 4 simple (hdp/attention/layout.py): at position k, all queries see the early
chunk of each j < k, and the late queries see both chunks of each j > k. Keys are stored by
position, so the keys of 4 are a prefix of those of 3 and nothing is copied. Backward fetches the
keys again and sends each rank the fp32 gradients of its own, summed in ring order: deterministic.

The cost is memory (all keys of the sequence at once) and transfers that only step 2 hides, so this
is for short sequences within a node. The plan decides (`StepPlan.gathered`, by the rule and cost
in scheduler/costs/), so all ranks run the same algorithm. Results match the ring's:
tests/attention/test_gather.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from hdp.ops.native import merge_lse_
from hdp.scheduler.zigzag import rank_chunks

from .comm import RingComm, Transfer
from .kernels import BlockKernel, backward_block, forward_block
from .layout import RingLayout, Segments


@dataclass(frozen=True)
class _Shares:
    """Which rows each rank sends to each other rank, for the one sequence of a ring."""

    layout: RingLayout

    @cached_property
    def chunks(self) -> list[tuple[int, int]]:
        """(early, late) rows of each ring position."""
        (seqlen,), size = self.layout.ring_seqlens, self.layout.ring_size
        spans = (rank_chunks(seqlen, size, position) for position in range(size))
        return [(b - a, d - c) for (a, b), (c, d) in spans]

    @cached_property
    def early(self) -> int:
        """Number of our early rows; the late ones follow them."""
        return self.chunks[self.layout.ring_rank][0]

    @cached_property
    def others(self) -> list[int]:
        """All ring positions except ours."""
        return [p for p in range(self.layout.ring_size) if p != self.layout.ring_rank]

    def needed(self, source: int, position: int) -> int:
        """How many leading rows of `source` the queries of `position` see."""
        early, late = self.chunks[source]
        return early if source < position else early + late

    @cached_property
    def key_spans(self) -> list[tuple[int, int]]:
        """The span of each of `others`' keys among the gathered keys."""
        spans, at = [], 0
        for source in self.others:
            rows = self.needed(source, self.layout.ring_rank)
            spans.append((at, at + rows))
            at += rows
        return spans

    @cached_property
    def num_keys(self) -> int:
        return self.key_spans[-1][1]

    @cached_property
    def blocks(self) -> list[tuple[slice, int, Segments]]:
        """(our rows, how many leading keys they see, their Segments) of each kernel call."""
        rank, rows = self.layout.ring_rank, self.layout.num_ring_tokens
        early_keys = sum(stop - start for start, stop in self.key_spans[:rank])
        calls = [(slice(self.early, rows), self.num_keys), (slice(0, self.early), early_keys)]
        return [
            (span, keys, Segments((span.stop - span.start,), (keys,), causal=False))
            for span, keys in calls
            if span.stop > span.start and keys
        ]


def gather_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: RingLayout,
    comm: RingComm,
    softmax_scale: float,
    kernel: BlockKernel,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of all rows; the numbered steps are those of the module docstring."""
    shares, num_ring = _Shares(layout), layout.num_ring_tokens
    keys, values, transfer = _fetch(k[:num_ring], v[:num_ring], shares, comm)  # 1
    out, lse = forward_block(kernel, q, k, v, layout.first, softmax_scale)  # 2
    transfer.wait()
    ring_out, ring_lse = out[:num_ring].to(lse.dtype), lse[:, :num_ring]
    for rows, num_keys, segments in shares.blocks:  # 3, 4
        block = kernel.forward(q[rows], keys[:num_keys], values[:num_keys], segments, softmax_scale)
        merge_lse_(ring_out, ring_lse, *block, [(rows.start, rows.stop)])
    out[:num_ring] = ring_out
    return out, lse


def gather_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: RingLayout,
    comm: RingComm,
    softmax_scale: float,
    kernel: BlockKernel,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of all rows, given out and lse of all rows."""
    shares, num_ring = _Shares(layout), layout.num_ring_tokens
    keys, values, transfer = _fetch(k[:num_ring], v[:num_ring], shares, comm)
    dq, dk, dv = backward_block(kernel, dout, q, k, v, out, lse, layout.first, softmax_scale)
    transfer.wait()
    ring_dq = dq[:num_ring].to(lse.dtype)
    dkeys, dvalues = (x.new_zeros(x.shape, dtype=lse.dtype) for x in (keys, values))
    for rows, num_keys, segments in shares.blocks:
        part = kernel.backward(
            dout[rows],
            q[rows],
            keys[:num_keys],
            values[:num_keys],
            out[rows],
            lse[:, rows],
            segments,
            softmax_scale,
        )
        for total, grad in zip(
            (ring_dq[rows], dkeys[:num_keys], dvalues[:num_keys]), part, strict=True
        ):
            total.add_(grad)
    dq[:num_ring] = ring_dq
    _return_grads(dkeys, dvalues, dk, dv, shares, comm)
    return dq, dk, dv


def _fetch(
    k: Tensor, v: Tensor, shares: _Shares, comm: RingComm
) -> tuple[Tensor, Tensor, Transfer]:
    """Start gathering: (keys, values) are complete once the transfer is."""
    ring, rank = shares.layout.ring, shares.layout.ring_rank
    k, v = k.contiguous(), v.contiguous()
    keys, values = (x.new_empty((shares.num_keys, *x.shape[1:])) for x in (k, v))
    sends, receives = [], []
    for position, (start, stop) in zip(shares.others, shares.key_spans, strict=True):
        needed = shares.needed(rank, position)
        sends += [(k[:needed], ring[position]), (v[:needed], ring[position])]
        receives += [(keys[start:stop], ring[position]), (values[start:stop], ring[position])]
    return keys, values, comm.swap(sends, receives)


def _return_grads(
    dkeys: Tensor, dvalues: Tensor, dk: Tensor, dv: Tensor, shares: _Shares, comm: RingComm
) -> None:
    """Send each rank the gradients of its keys; add those received for ours to dk and dv."""
    ring, rank = shares.layout.ring, shares.layout.ring_rank
    sends, receives = [], []
    for position, (start, stop) in zip(shares.others, shares.key_spans, strict=True):
        shape = (shares.needed(rank, position), *dkeys.shape[1:])
        peer = ring[position]
        sends += [(dkeys[start:stop], peer), (dvalues[start:stop], peer)]
        receives += [(dkeys.new_empty(shape), peer), (dkeys.new_empty(shape), peer)]
    parts = comm.swap(sends, receives).wait()
    num_ring = shares.layout.num_ring_tokens
    for grad, mine in ((dk, parts[0::2]), (dv, parts[1::2])):
        total = grad[:num_ring].to(dkeys.dtype)
        for part in mine:
            total[: part.shape[0]].add_(part)
        grad[:num_ring] = total
