"""Sums over whole sequences inside a microbatch, although a ring holds each one in parts.

Losses that are not linear in a sequence's log-probability (DPO, GSPO, sequence-level importance
weights) need the whole sum before backward. All ranks of a ring run the same microbatch at the same
time, so they may talk to each other; what is forbidden inside a microbatch is a collective of all
ranks. Each rank adds the parts in ring order, so all of them get the same bits.

Invariants (tests of the same names in tests/objectives/test_sequences.py):

* sums_equal_dense           of any rows, on any ring, with local sequences and ranks without tokens
* gradient_is_of_own_rows    each rank differentiates its own rows, so a loss that all ranks of a
                             ring compute has the dense gradient, once
* owners_count_once          a value that all ranks of a ring hold is counted by one of them
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hdp.attention.comm import RingComm
    from hdp.data.pack import PackedBatch


def row_seqs(batch: PackedBatch) -> Tensor:
    """(total_tokens,) int64: the place in `batch.seqs` of each row's sequence.

    A padding row gets the place after the last one.
    """
    spans = batch.layout.spans()
    places = torch.tensor([place for place, _, _ in spans], dtype=torch.int64)
    counts = torch.tensor([stop - start for _, start, stop in spans], dtype=torch.int64)
    return places.repeat_interleave(counts).to(batch.input_ids.device)


def sequence_sums(values: Tensor, batch: PackedBatch, comm: RingComm | None) -> Tensor:
    """(len(batch.seqs), ...) sums over all rows of each sequence, those of other ranks, too.

    values: (total_tokens, ...) of this rank's rows. comm: required if the microbatch has a ring;
    all ranks of the ring must call this at the same point. The gradient reaches this rank's rows
    only: the other rows get theirs where they live.

    Raises ValueError if the microbatch has a ring and `comm` is None.
    """
    num_rows = len(batch.layout.ring_seqlens) + len(batch.layout.local_seqlens)
    own = values.new_zeros((num_rows, *values.shape[1:])).index_add(0, row_seqs(batch), values)
    own = own[: len(batch.seqs)]
    if not batch.layout.ring:
        return own
    if comm is None:
        raise ValueError(
            f"sequences {list(batch.seqs)} are on the ring of ranks {batch.layout.ring}: give the "
            "objective comm=context.comm, so that it can add up their parts"
        )
    return _ValueOfAll.apply(own, _ring_sums(own.detach(), batch, comm))


def is_owner(batch: PackedBatch) -> Tensor:
    """(len(batch.seqs),) bool: whether this rank counts what is known of the sequence as a whole.

    One rank of each ring does, and a rank does for its local sequences.
    """
    owned = torch.ones(len(batch.seqs), dtype=torch.bool, device=batch.input_ids.device)
    if batch.layout.ring and batch.layout.ring_rank != 0:
        owned[: len(batch.layout.ring_seqlens)] = False
    return owned


class _ValueOfAll(torch.autograd.Function):
    """The value of `whole`, the gradient of `own`. own + (whole - own) would round differently."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, whole: Tensor) -> Tensor:
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _ring_sums(own: Tensor, batch: PackedBatch, comm: RingComm) -> Tensor:
    """Sums over the ring for the ring's sequences; local ones as they are."""
    layout = batch.layout
    num_ring = len(layout.ring_seqlens)
    mine = own[:num_ring].contiguous()
    parts = [torch.empty_like(mine) for _ in layout.ring]
    parts[layout.ring_rank] = mine
    others = [(place, rank) for place, rank in enumerate(layout.ring) if place != layout.ring_rank]
    sends = [(mine, rank) for _, rank in others]
    comm.swap(sends, [(parts[place], rank) for place, rank in others]).wait()
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return torch.cat([total, own[num_ring:]])
