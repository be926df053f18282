"""Ring attention for your own packing: cu_seqlens and a process group, no plan.

Every sequence of a packed batch is split over all ranks of a group: each rank holds its zigzag
chunks of each sequence (hdp/scheduler/zigzag.py). Lengths may be arbitrary; nothing is padded.

    rows = hdp.zigzag_rows(cu_seqlens, rank, world_size)          # once per batch
    hidden, position_ids = hidden[rows], position_ids[rows]
    out = hdp.zigzag_ring_attn_varlen_func(q, k, v, cu_seqlens, group=group)      # in every layer
    whole[rows] = out                                             # back in batch order

This is `ring_attn_varlen_func` with a layout built from cu_seqlens. Layouts are cached, so a model
builds one per batch for all its layers. A CUDA cu_seqlens tensor is copied to the host once, and
again after torch has written to it; other libraries must not write to it.
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

# tensor -> (its version counter, its values): reading a CUDA tensor waits for the device
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
    """Exact causal attention of packed sequences split over all ranks of a group in zigzag order.

    The packed zigzag ring of ByteScale section 7 (Fig. 14), with chunks that may be uneven.

    q           (rows, num_heads, head_dim), this rank's rows: x[zigzag_rows(cu_seqlens, ...)]
    k, v        (rows, num_kv_heads, head_dim), same dtype; num_kv_heads divides num_heads
    cu_seqlens  (num_seqs + 1,) int32 or int64 tensor, or a list: where each WHOLE sequence starts
                and the last one ends, [0, ..., total_tokens]; the same on all ranks
    group       its ranks hold the sequences, in ring order; None: the default group, or this
                process alone if torch.distributed is not initialized
    softmax_scale  None: head_dim ** -0.5
    causal      must be True; it exists because flash-attn's default is False
    kernel      block kernel; None: chosen by device, dtype and head size
    Returns (rows, num_heads, head_dim) in the dtype of q. Differentiable in q, k and v.

    All ranks of the group must call it, forward and backward, even those without rows (short
    sequences). With NCCL, run a collective on the group first (a barrier will do): its first batch
    of sends would hang if one of the ranks had nothing to send.

    Raises ValueError if this rank is not in `group`, if cu_seqlens do not increase from 0, if q, k
    and v do not hold this rank's rows or do not match each other, and for causal=False.
    """
    rank, world_size = _place(group)
    bounds = _values(cu_seqlens)
    layout = _layout(bounds, rank, world_size)
    if not q.shape[0] == k.shape[0] == v.shape[0] == layout.total_tokens:
        raise ValueError(
            f"q, k, v have {q.shape[0]}, {k.shape[0]}, {v.shape[0]} rows; rank {rank} of "
            f"{world_size} holds {layout.total_tokens} of the {bounds[-1]} tokens: pass "
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
    """The rows of a packed batch that a rank holds, in the rank's order.

    Rank r of n holds chunks r and 2n - 1 - r of the 2n chunks of each sequence (ByteScale section
    7, Fig. 14); the first seqlen % 2n chunks are one token longer. Every row of the batch is
    on exactly one rank; a rank may have none.

    cu_seqlens  (num_seqs + 1,) int32 or int64 tensor, or a list: bounds of the whole sequences
    rank, world_size  of this process in the group of `zigzag_ring_attn_varlen_func`
    Returns (rows,) int64 on the device of cu_seqlens: indices into (total_tokens, ...). x[rows] is
    the rank's shard of inputs, labels or position ids; whole[rows] = out puts results back.
    Raises ValueError if rank is not in 0..world_size - 1 or cu_seqlens do not increase from 0.
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
            f"cu_seqlens {list(cu_seqlens[:4])} must start with 0 and hold the end of at least one "
            "sequence: [0, 100] is one sequence of 100 tokens"
        )
    seqlens = tuple(stop - start for start, stop in pairwise(cu_seqlens))
    for i, seqlen in enumerate(seqlens, 1):
        if seqlen < 1:
            raise ValueError(
                f"cu_seqlens[{i}] is {cu_seqlens[i]} after {cu_seqlens[i - 1]}: entries must "
                "increase; drop empty sequences, and do not repeat the last entry"
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
            f"rank {dist.get_rank()} of the default group is not in `group`; only members may call"
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
    if not _is_worth_keeping(cu_seqlens):
        return tuple(cu_seqlens.tolist())
    version, values = _VALUES.get(cu_seqlens, (-1, ()))
    if version != cu_seqlens._version:
        values = tuple(cu_seqlens.tolist())
        _VALUES[cu_seqlens] = cu_seqlens._version, values
    return values


def _is_worth_keeping(cu_seqlens: Tensor) -> bool:
    """Whether to keep the values until torch counts a write to the tensor.

    On the CPU reading is cheap, and NumPy may write unseen. Inference tensors have no count.
    """
    return cu_seqlens.device.type != "cpu" and not cu_seqlens.is_inference()
