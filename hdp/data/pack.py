"""pack_rank(): packs a rank's part of a StepPlan, one row of tokens per microbatch.

Only this rank's tokens are read: the samples' arrays may be memory maps over terabytes. Position
ids count from the start of the whole sequence, and labels and columns are shifted before sequences
are cut, so a chunk boundary does not affect them (the label of a chunk's last token is the first
token of the next chunk, which lives on another rank).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch

from hdp.attention.layout import RingLayout
from hdp.scheduler import Microbatch, StepPlan

from .sample import IGNORE_INDEX, Sample

# column name -> (shape of one token's entry, dtype)
_Columns = Mapping[str, tuple[tuple[int, ...], np.dtype]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """One rank's tokens of one microbatch, ring shards first, then local sequences."""

    input_ids: torch.Tensor  # (total_tokens,) int64
    position_ids: torch.Tensor  # (total_tokens,) int64, positions in the whole sequence
    labels: torch.Tensor  # (total_tokens,) int64, shifted; IGNORE_INDEX: no loss
    # Indices into StepPlan.seqlens, in packing order; () for a rank without tokens. Padding is the
    # last span of `layout.spans()` and belongs to no sequence: there is one span more than here.
    seqs: tuple[int, ...]
    layout: RingLayout
    offload_ratio: float = 0.0
    # (total_tokens, ...) each, shifted like labels: entry i is about the token predicted at i
    columns: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def total_tokens(self) -> int:
        """Rows of this rank, including padding."""
        return len(self.input_ids)

    def tensors(self) -> list[torch.Tensor]:
        """All tensors of the batch."""
        return [self.input_ids, self.position_ids, self.labels, *self.columns.values()]

    def to(self, device: torch.device, *, non_blocking: bool = False) -> PackedBatch:
        """A copy on `device`. non_blocking: copy from pinned memory and do not wait."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            if non_blocking:
                tensor = tensor.pin_memory()
            return tensor.to(device, non_blocking=non_blocking)

        return replace(
            self,
            input_ids=move(self.input_ids),
            position_ids=move(self.position_ids),
            labels=move(self.labels),
            columns={name: move(column) for name, column in self.columns.items()},
        )


class Samples(Protocol):
    """A plan's samples by sequence index: a list, or an object that reads them on demand."""

    def __getitem__(self, index: int, /) -> Sample: ...


def pack_rank(
    plan: StepPlan,
    rank: int,
    samples: Samples,
    *,
    pad_to_multiple: int = 1,
    num_microbatches: int | None = None,
) -> tuple[PackedBatch, ...]:
    """Rank `rank`'s microbatches of the plan, in order, on the CPU: at least one.

    samples[s] is sequence s of the plan; only this rank's samples are read, once each. All ranks
    take part in the gradient reduction, which needs a backward pass, so a rank without microbatches
    gets an empty one with the same columns.

    pad_to_multiple: rows of each microbatch are a multiple of this (sequence parallelism cuts them
        into equal parts); padding is a local sequence at the end, without labels
    num_microbatches: as many in all, with empty ones at the end; None: those of the plan

    Raises ValueError if a sample's length differs from the plan's, or its columns from those of the
    other samples, or if the plan has more microbatches than `num_microbatches`.
    """
    if pad_to_multiple < 1:
        raise ValueError(f"pad_to_multiple={pad_to_multiple} must be at least 1")
    microbatches = plan.microbatches(rank) or [Microbatch()]
    if num_microbatches is not None:
        if num_microbatches < len(microbatches):
            raise ValueError(
                f"num_microbatches={num_microbatches}, but the plan has {len(microbatches)} for "
                f"rank {rank}; pass that many or more"
            )
        microbatches += [Microbatch()] * (num_microbatches - len(microbatches))
    seqs = sorted({piece.seq for microbatch in microbatches for piece in microbatch.pieces})
    mine = {seq: samples[seq] for seq in seqs or [0]}
    for seq, sample in mine.items():
        if len(sample.input_ids) != plan.seqlens[seq]:
            raise ValueError(
                f"sequence {seq} has {len(sample.input_ids)} tokens, but the plan was made for "
                f"{plan.seqlens[seq]}; pass the samples of the batch that was planned"
            )
    columns = _columns_of(mine)
    return tuple(
        _pack(microbatch, rank, mine, columns, pad_to_multiple) for microbatch in microbatches
    )


def _columns_of(samples: Mapping[int, Sample]) -> _Columns:
    """The columns of these samples, which must all be the same."""
    (first, sample), *others = samples.items()
    columns = {name: (x.shape[1:], x.dtype) for name, x in sorted(sample.columns.items())}
    for seq, other in others:
        if {name: (x.shape[1:], x.dtype) for name, x in other.columns.items()} != columns:
            raise ValueError(
                f"sequence {first} has columns {_describe_columns(sample)} and sequence {seq} has "
                f"{_describe_columns(other)}; give all samples of a step the same names and dtypes"
            )
    return columns


def _describe_columns(sample: Sample) -> str:
    return ", ".join(f"{name} ({x.dtype})" for name, x in sample.columns.items()) or "none"


def _pack(
    microbatch: Microbatch,
    rank: int,
    samples: Mapping[int, Sample],
    columns: _Columns,
    pad_to_multiple: int,
) -> PackedBatch:
    """One microbatch. Padding lets a rank without tokens take part in its ring in every layer, and
    in the gradient reduction; it contributes exactly zero."""
    layout = RingLayout.from_microbatch(microbatch, rank)
    spans, seqs = layout.spans(), tuple(piece.seq for piece in microbatch.pieces)
    num_padding = max(1, layout.total_tokens)
    num_padding += -num_padding % pad_to_multiple - layout.total_tokens
    if num_padding:
        layout = replace(layout, local_seqlens=(*layout.local_seqlens, num_padding))
    input_ids = np.zeros(layout.total_tokens, dtype=np.int64)
    position_ids = np.zeros_like(input_ids)
    position_ids[len(input_ids) - num_padding :] = np.arange(num_padding)
    labels = np.full_like(input_ids, IGNORE_INDEX)
    packed = {
        name: np.zeros((len(input_ids), *shape), dtype=dtype)
        for name, (shape, dtype) in columns.items()
    }
    row = 0
    for i, start, stop in spans:
        sample, rows = samples[seqs[i]], slice(row, row + stop - start)
        input_ids[rows] = sample.input_ids[start:stop]
        position_ids[rows] = np.arange(start, stop)
        labels[rows] = sample.labels(start, stop)
        for name, column in packed.items():
            column[rows] = sample.shifted(name, start, stop)
        row = rows.stop
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        labels=torch.from_numpy(labels),
        columns={name: torch.from_numpy(column) for name, column in packed.items()},
        seqs=seqs,
        layout=layout,
        offload_ratio=microbatch.offload_ratio,
    )
