"""Ring attention for your own packing: cu_seqlens and a process group, no plan.

Every sequence of a packed batch lies on all ranks of a group, each rank holding its zigzag chunks
of each sequence (hdp/scheduler/zigzag.py). Lengths need not divide by anything; nothing is padded.

    rows = hdp.zigzag_rows(cu_seqlens, rank, world_size)          # once per batch
    hidden, position_ids = hidden[rows], position_ids[rows]
    out = hdp.zigzag_ring_attn_varlen_func(q, k, v, cu_seqlens, group=group)      # in every layer
    whole[rows] = out                                             # back in the order of the batch

This is `ring_attn_varlen_func` with a layout made from cu_seqlens. Layouts are remembered, so the
layers of a model build one per batch, and a CUDA tensor of cu_seqlens is read back once.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .comm import RingComm
from .kernels import BlockKernel
from .layout import RingLayout
from .ring import ring_attn_varlen_func

# tensor -> (how often it was written to, its values); reading a CUDA tensor waits for the device
_VALUES = WeakTensorKeyDictionary()


def zigzag_ring_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | Sequence[int],
    *,
    group: dist.ProcessGroup | None = None,
    softmax_scale: float | None = None,
    causal: bool = True,
    kernel: BlockKernel | None = None,
) -> Tensor:
    """Exact causal attention of packed sequences that lie on all ranks of a group, in zigzag order.

    The packed zigzag ring of ByteScale section 7 (Fig. 14), with chunks that may be uneven.

    q           (rows, num_heads, head_dim), this rank's rows: x[zigzag_rows(cu_seqlens, ...)]
    k, v        (rows, num_kv_heads, head_dim), same dtype; num_kv_heads divides num_heads
    cu_seqlens  (num_seqs + 1,) int32 or int64 tensor, or a list: where each WHOLE sequence starts
                and the last one ends, [0, ..., total_tokens]; the same on all ranks
    group       whose ranks hold the sequences, in ring order; None: the default group, or this
                process alone if there is none
    softmax_scale  None: head_dim ** -0.5
    causal      must be True; it is there because flash-attn's default is False
    kernel      block kernel; chosen by device, dtype and head size if None
    Returns (rows, num_heads, head_dim) in the dtype of q. Differentiable in q, k and v.

    All ranks of the group call, forward and backward, also those without rows (short sequences).
    With NCCL the group must have run a collective before (a barrier will do): its first batch of
    sends would hang if one of the ranks had nothing to send.

    Raises ValueError if this rank is not in `group`, if cu_seqlens do not rise from 0, if q, k and
    v do not hold the rows of this rank or do not fit each other, and for causal=False.
    """
    rank, world_size = _place(group)
    bounds = _values(cu_seqlens)
    layout = _layout(bounds, rank, world_size)
    if not q.shape[0] == k.shape[0] == v.shape[0] == layout.total_tokens:
        raise ValueError(
            f"q, k, v have {q.shape[0]}, {k.shape[0]}, {v.shape[0]} rows; rank {rank} of "
            f"{world_size} holds {layout.total_tokens} of the {bounds[-1]} tokens: take "
            f"x[zigzag_rows(cu_seqlens, {rank}, {world_size})], with cu_seqlens of whole sequences"
        )
    return ring_attn_varlen_func(
        q,
        k,
        v,
        layout,
        comm=RingComm(group, q.device) if layout.ring else None,
        softmax_scale=softmax_scale,
        causal=causal,
        kernel=kernel,
    )


def zigzag_rows(cu_seqlens: Tensor | Sequence[int], rank: int, world_size: int) -> Tensor:
    """The rows of a packed batch that a rank holds, in the order in which it holds them.

    Rank r of n holds chunks r and 2n - 1 - r of the 2n chunks of each sequence (ByteScale section
    7, Fig. 14); the first seqlen % 2n chunks are one token longer. The ranks' rows cover the batch
    once; a rank may have none.

    cu_seqlens  (num_seqs + 1,) int32 or int64 tensor, or a list: bounds of the whole sequences
    rank, world_size  in the group of `zigzag_ring_attn_varlen_func`
    Returns (rows,) int64 on the device of cu_seqlens: indices into (total_tokens, ...). x[rows] is
    the rank's shard of inputs, labels or position ids; whole[rows] = out puts results back.
    Raises ValueError for a rank that is not in 0..world_size - 1, and if cu_seqlens do not rise
    from 0.
    """
    bounds = _values(cu_seqlens)
    spans = _layout(bounds, rank, world_size).spans()
    starts = torch.tensor([bounds[seq] + start for seq, start, _ in spans])
    lengths = torch.tensor([stop - start for _, start, stop in spans])
    firsts = lengths.cumsum(0) - lengths  # of each span, among the rank's rows
    rows = torch.arange(int(lengths.sum())) + (starts - firsts).repeat_interleave(lengths)
    return rows.to(cu_seqlens.device) if isinstance(cu_seqlens, Tensor) else rows


@lru_cache(maxsize=64)
def _layout(cu_seqlens: tuple[int, ...], rank: int, world_size: int) -> RingLayout:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not in 0..{world_size - 1} (world_size {world_size})")
    if len(cu_seqlens) < 2 or cu_seqlens[0] != 0:
        raise ValueError(
            f"cu_seqlens {list(cu_seqlens[:4])} must begin with 0 and name the end of at least one "
            "sequence: [0, 100] is one of 100 tokens"
        )
    seqlens = tuple(stop - start for start, stop in pairwise(cu_seqlens))
    for i, seqlen in enumerate(seqlens, 1):
        if seqlen < 1:
            raise ValueError(
                f"cu_seqlens[{i}] is {cu_seqlens[i]} after {cu_seqlens[i - 1]}: they must rise; "
                "leave out empty sequences, and do not repeat the last entry"
            )
    if world_size == 1:
        return RingLayout(local_seqlens=seqlens)
    return RingLayout(ring=tuple(range(world_size)), ring_rank=rank, ring_seqlens=seqlens)


def _place(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """(rank, world size) in the group."""
    if not dist.is_initialized():
        return 0, 1
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(
            f"rank {dist.get_rank()} of the default group is not in `group`: only members call"
        )
    return rank, dist.get_world_size(group)


def _values(cu_seqlens: Tensor | Sequence[int]) -> tuple[int, ...]:
    if not isinstance(cu_seqlens, Tensor):
        try:
            return tuple(map(operator.index, cu_seqlens))
        except TypeError as error:
            raise ValueError(f"cu_seqlens must be integers: {error}") from error
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens is {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}; it must be "
            "(num_seqs + 1,) int32 or int64"
        )
    if cu_seqlens.is_inference():  # torch does not count its writes
        return tuple(cu_seqlens.tolist())
    version, values = _VALUES.get(cu_seqlens, (-1, ()))
    if version != cu_seqlens._version:
        values = tuple(cu_seqlens.tolist())
        _VALUES[cu_seqlens] = cu_seqlens._version, values
    return values
