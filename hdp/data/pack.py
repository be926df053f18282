"""pack(): one rank's microbatch of a StepPlan becomes one row of tokens.

Only this rank's tokens are read: the samples' arrays may be memory maps over terabytes. Position
ids are positions in the whole sequence and labels are shifted before anything is cut, so a chunk
boundary changes neither (the label of a chunk's last token is the first token of the next chunk,
which lives on another rank).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from hdp.attention.layout import RingLayout
from hdp.scheduler import Microbatch, StepPlan

IGNORE_INDEX = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One sequence. Arrays may be memory maps: nothing is read until it is sliced."""

    input_ids: np.ndarray  # (seqlen,) any integer dtype
    loss_mask: np.ndarray | None = None  # (seqlen,) bool: tokens to learn to predict; None: all

    def labels(self, start: int, stop: int) -> np.ndarray:
        """(stop - start,) int64: what positions start..stop-1 predict; IGNORE_INDEX for nothing.

        Position p predicts token p + 1; the last position predicts nothing.
        """
        labels = np.full(stop - start, IGNORE_INDEX, dtype=np.int64)
        targets = self.input_ids[start + 1 : stop + 1]
        labels[: len(targets)] = targets
        if self.loss_mask is not None:
            masked = ~np.asarray(self.loss_mask[start + 1 : stop + 1], dtype=bool)
            labels[: len(targets)][masked] = IGNORE_INDEX
        return labels


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """One rank's tokens of one microbatch, ring shards first, then local sequences."""

    input_ids: torch.Tensor  # (total_tokens,) int64
    position_ids: torch.Tensor  # (total_tokens,) int64, positions in the whole sequence
    labels: torch.Tensor  # (total_tokens,) int64, shifted; IGNORE_INDEX: no loss
    seqs: tuple[int, ...]  # indices into StepPlan.seqlens, in packing order; () when empty
    layout: RingLayout
    offload_ratio: float = 0.0

    @property
    def total_tokens(self) -> int:
        return len(self.input_ids)

    def to(self, device: torch.device) -> PackedBatch:
        """A copy on `device`; from pinned memory and without waiting where that is possible."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            if device.type == "cuda":
                tensor = tensor.pin_memory()
            return tensor.to(device, non_blocking=True)

        return PackedBatch(
            input_ids=move(self.input_ids),
            position_ids=move(self.position_ids),
            labels=move(self.labels),
            seqs=self.seqs,
            layout=self.layout,
            offload_ratio=self.offload_ratio,
        )


class Samples(Protocol):
    """Sequence s of a plan by index: a list, or something that reads when asked."""

    def __getitem__(self, index: int, /) -> Sample: ...


def pack(plan: StepPlan, rank: int, index: int, samples: Samples) -> PackedBatch:
    """Rank `rank`'s `index`-th microbatch of the plan, on the CPU.

    samples[s] is sequence s of the plan. Raises ValueError if its length is not plan.seqlens[s].
    """
    return pack_microbatch(plan.microbatches(rank)[index], rank, samples)


def pack_rank(plan: StepPlan, rank: int, samples: Samples) -> tuple[PackedBatch, ...]:
    """All of rank `rank`'s microbatches of the plan, in order: at least one.

    A plan may give a rank none, but gradients are reduced by all ranks, after a backward.
    """
    microbatches = plan.microbatches(rank) or (Microbatch(),)
    return tuple(pack_microbatch(microbatch, rank, samples) for microbatch in microbatches)


def pack_microbatch(microbatch: Microbatch, rank: int, samples: Samples) -> PackedBatch:
    """`pack()` for a microbatch already taken from the plan."""
    for piece in microbatch.pieces:
        if len(samples[piece.seq].input_ids) != piece.seqlen:
            raise ValueError(
                f"sequence {piece.seq} has {len(samples[piece.seq].input_ids)} tokens, the plan "
                f"was made for {piece.seqlen}: plan and data are from different batches"
            )
    layout = RingLayout.from_microbatch(microbatch, rank)
    if not layout.total_tokens:
        return _empty(microbatch, layout)
    input_ids = np.empty(layout.total_tokens, dtype=np.int64)
    position_ids = np.empty_like(input_ids)
    labels = np.empty_like(input_ids)
    row = 0
    for i, start, stop in layout.spans():
        sample, rows = samples[microbatch.pieces[i].seq], slice(row, row + stop - start)
        input_ids[rows] = sample.input_ids[start:stop]
        position_ids[rows] = np.arange(start, stop)
        labels[rows] = sample.labels(start, stop)
        row = rows.stop
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        labels=torch.from_numpy(labels),
        seqs=tuple(piece.seq for piece in microbatch.pieces),
        layout=layout,
        offload_ratio=microbatch.offload_ratio,
    )


def _empty(microbatch: Microbatch, layout: RingLayout) -> PackedBatch:
    """A rank without tokens runs one padding token without a label: it takes part in its ring, in
    every layer, and in the gradient reduction, and adds exactly zero."""
    padding = torch.zeros(1, dtype=torch.int64)
    return PackedBatch(
        input_ids=padding,
        position_ids=padding.clone(),
        labels=torch.full((1,), IGNORE_INDEX),
        seqs=tuple(piece.seq for piece in microbatch.pieces),
        layout=RingLayout(
            ring=layout.ring,
            ring_rank=layout.ring_rank,
            ring_seqlens=layout.ring_seqlens,
            local_seqlens=(1,),
        ),
        offload_ratio=microbatch.offload_ratio,
    )
