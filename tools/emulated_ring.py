"""Emulate one rank of a ring on one device: the other ranks' blocks are local, no peers needed.

The runtime's own code runs (`ring_attn_varlen_func`), with a communicator that returns what the
other ranks would send: their keys and values, and zeros for the gradients that travel with them.
`out` and `dq` match a real ring; `dk` and `dv` contain only this rank's part.

Two kinds of transfer:
* instantaneous (default): to time only kernels and merges
* on a separate stream (`copies=True`, CUDA): a device copy that starts after previously queued
  work, and for which `wait()` blocks the current stream, as with NCCL
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hdp.attention.comm import Peers, RingComm, Transfer
from hdp.attention.layout import RingLayout
from hdp.scheduler.zigzag import rank_chunks


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequence:
    """A whole causal sequence: q, dout (seqlen, num_heads, head_dim); k, v with num_kv_heads."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    @classmethod
    def random(
        cls, seqlen: int, heads: int, kv_heads: int, head_dim: int, device: torch.device
    ) -> Sequence:
        def draw(num_heads: int) -> Tensor:
            return torch.randn(seqlen, num_heads, head_dim, device=device, dtype=torch.bfloat16)

        return cls(q=draw(heads), k=draw(kv_heads), v=draw(kv_heads), dout=draw(heads))

    def rows(self, ring_size: int, position: int) -> Tensor:
        """Token indices of a ring position, in its row order."""
        chunks = rank_chunks(len(self.q), ring_size, position)
        return torch.cat([torch.arange(*chunk, device=self.q.device) for chunk in chunks])

    def shard(self, ring_size: int, position: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(q, k, v, dout) of a ring position."""
        rows = self.rows(ring_size, position)
        return self.q[rows], self.k[rows], self.v[rows], self.dout[rows]


class EmulatedComm(RingComm):
    """Provides what `layout.ring_rank` would receive from the other positions of its ring."""

    def __init__(self, sequence: Sequence, layout: RingLayout, *, copies: bool = False) -> None:
        device = sequence.q.device
        super().__init__(None, device)
        self._layout = layout
        self._blocks = []
        for position in range(layout.ring_size):
            _, k, v, _ = sequence.shard(layout.ring_size, position)
            self._blocks.append(torch.stack((k, v)))
        self._grads = torch.zeros_like(
            max(self._blocks, key=Tensor.numel), dtype=torch.float32
        )  # incoming gradients: added to, never read
        self._hops = 0
        self._stream = torch.cuda.Stream(device) if copies else None

    def shift(
        self, tensor: Tensor, ring: tuple[int, ...], ring_rank: int, recv_shape: torch.Size | tuple
    ) -> Arrival:
        """The ring's next block: keys and values in bf16, or gradients in fp32."""
        if tensor.dtype == torch.float32:
            source = self._grads[:, : recv_shape[1]]
        else:
            self._hops = self._hops % (len(ring) - 1) + 1
            source = self._blocks[(ring_rank - self._hops) % len(ring)]
        assert source.shape == tuple(recv_shape), f"received {source.shape}, expected {recv_shape}"
        if self._stream is None:
            return Arrival(self, lambda: [source], None)
        return self._copied([(tensor.new_empty(recv_shape), source)])

    def swap(self, sends: Peers, receives: Peers) -> Arrival:
        """Copy the others' keys and values into the receive tensors (gathered rings)."""
        pairs = []
        for i, (tensor, peer) in enumerate(receives):
            if tensor.dtype == torch.float32:
                pairs.append((tensor, self._grads[i % 2, : len(tensor)]))
            else:
                block = self._blocks[self._layout.ring.index(peer)]
                pairs.append((tensor, block[i % 2, : len(tensor)]))
        if self._stream is not None:
            return self._copied(pairs)
        for tensor, source in pairs:
            tensor.copy_(source)
        return Arrival(self, lambda: [tensor for tensor, _ in pairs], None)

    def _copied(self, pairs: list[tuple[Tensor, Tensor]]) -> Arrival:
        assert self._stream is not None
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for tensor, source in pairs:
                tensor.copy_(source)
                tensor.record_stream(self._stream)
            done = self._stream.record_event()
        return Arrival(self, lambda: [tensor for tensor, _ in pairs], done)


class Arrival(Transfer):
    """A transfer of `EmulatedComm`; stands in for `hdp.attention.comm.Transfer`."""

    def __init__(
        self,
        comm: EmulatedComm,
        tensors: Callable[[], list[Tensor]],
        done: torch.cuda.Event | None,
    ) -> None:
        super().__init__(comm, [], [], [])
        self._tensors, self._done = tensors, done

    def wait(self) -> list[Tensor]:
        if self._done is not None:
            torch.cuda.current_stream().wait_event(self._done)
        return self._tensors()


def ring_layout(
    seqlen: int, ring_size: int, position: int, *, gathered: bool = False
) -> RingLayout:
    """One sequence on a ring of ranks 0, 1, ..."""
    return RingLayout(
        ring=tuple(range(ring_size)),
        ring_rank=position,
        ring_seqlens=(seqlen,),
        gathered=gathered,
    )
