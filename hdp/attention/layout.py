"""RingLayout: the index arithmetic of one rank's microbatch, computed once and used by every layer.

A rank's tokens are packed in one row: first its shards of the ring's sequences (each shard is an
early and a late zigzag chunk, see scheduler/zigzag.py), then its local sequences.

    ring shard 0           ring shard 1           local 0   local 1
    [chunk k | 2d-1-k]     [chunk k | 2d-1-k]     [.....]   [...]

Causal attention over a ring of d ranks splits into d blocks per rank; with zigzag, all but the
first are rectangles that need no mask:

* first block: the rank's own queries and keys, causal. An early chunk precedes its late chunk, so a
  shard is simply a causal sequence, and local sequences join it in the same varlen call.
* step s = 1 .. d-1: the keys of ring position j = (k - s) mod d have arrived.
  j < k: all queries see the early chunk of j (its late chunk comes after ours);
  j > k: only the late queries see any keys, and they see both chunks of j.

Chunks may be empty (a sequence shorter than 2d). A sequence with no queries or no keys in a block
is left out of it, because kernels crash or return a wrong lse for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from hdp.ops.native import gather_rows, scatter_rows_
from hdp.scheduler.zigzag import rank_chunks

if TYPE_CHECKING:
    from hdp.scheduler import Microbatch


@dataclass(frozen=True)
class Segments:
    """Segments of one varlen kernel call: queries of segment i attend to keys of segment i."""

    seqlens_q: tuple[int, ...]
    seqlens_k: tuple[int, ...]
    causal: bool  # requires seqlens_q == seqlens_k: kernels align unequal lengths differently
    _on_device: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        assert all(self.seqlens_q) and all(self.seqlens_k), f"empty segment in {self}"
        assert not self.causal or self.seqlens_q == self.seqlens_k, self

    @cached_property
    def cu_seqlens_q(self) -> tuple[int, ...]:
        return _cumulative(self.seqlens_q)

    @cached_property
    def cu_seqlens_k(self) -> tuple[int, ...]:
        return _cumulative(self.seqlens_k)

    @cached_property
    def max_seqlen_q(self) -> int:
        return max(self.seqlens_q, default=0)

    @cached_property
    def max_seqlen_k(self) -> int:
        return max(self.seqlens_k, default=0)

    @cached_property
    def uniform(self) -> bool:
        """Whether all segments have the same lengths, so that their rows form a dense batch."""
        return len(set(self.seqlens_q)) == len(set(self.seqlens_k)) == 1

    def cu_tensors(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """cu_seqlens_q and cu_seqlens_k as (num_segments + 1,) int32 on `device`; copied once."""
        if device not in self._on_device:
            both = torch.tensor([self.cu_seqlens_q, self.cu_seqlens_k], dtype=torch.int32)
            if device.type == "cuda":
                both = both.pin_memory().to(device, non_blocking=True)
            self._on_device[device] = both[0], both[1]
        return self._on_device[device]


class Rows:
    """Spans of rows of a tensor: one span is taken as a view, several as a copy."""

    def __init__(self, spans: Iterable[tuple[int, int]]) -> None:
        self.spans: list[tuple[int, int]] = []
        for start, stop in spans:
            if start == stop:
                continue
            if self.spans and self.spans[-1][1] == start:
                start = self.spans.pop()[0]
            self.spans.append((start, stop))
        self.num_rows = sum(stop - start for start, stop in self.spans)

    def take(self, tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """The rows along `dim`: a view if there is only one span, else a copy."""
        if len(self.spans) == 1:
            start, stop = self.spans[0]
            return tensor.narrow(dim, start, stop - start)
        return gather_rows(tensor, self.spans, dim)

    def add_(self, tensor: torch.Tensor, values: torch.Tensor) -> None:
        """tensor[rows] += values, in place, in the dtype of `tensor`."""
        scatter_rows_(tensor, values, self.spans, accumulate=True)


@dataclass(frozen=True)
class RingStep:
    """One block after the first: which of our rows attend to which of the received rows."""

    source: int  # ring position that the keys and values come from
    q_rows: Rows  # among this rank's ring rows
    k_rows: Rows  # among the source's ring rows
    segments: Segments


@dataclass(frozen=True, kw_only=True)
class RingLayout:
    """Which tokens of which sequences one rank holds in a microbatch.

    A rank's rows are its zigzag shards of the ring's sequences (packed zigzag, ByteScale section 7,
    Fig. 14), then its local sequences. Chunks may be uneven or empty; nothing is padded.

    ring           HDP ranks in ring order; () if all sequences are local
    ring_rank      this rank's position in `ring`
    ring_seqlens   tokens of each whole sequence on the ring, in packing order
    gathered       gather all keys of the ring's one sequence (gather.py), not ring steps (ring.py)
    local_seqlens  tokens of each sequence that only this rank holds

    Raises ValueError for a ring of one rank, a ring without sequences, and empty sequences.
    """

    ring: tuple[int, ...] = ()
    ring_rank: int = 0
    ring_seqlens: tuple[int, ...] = ()
    gathered: bool = False
    local_seqlens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if bool(self.ring_seqlens) != bool(self.ring) or len(self.ring) == 1:
            raise ValueError(
                f"ring {self.ring} with ring_seqlens {self.ring_seqlens}: a ring needs two or more "
                "ranks and at least one sequence; pass sequences of one rank as local_seqlens"
            )
        if self.ring and not 0 <= self.ring_rank < len(self.ring):
            raise ValueError(f"ring_rank {self.ring_rank} is not a position in ring {self.ring}")
        if self.gathered and len(self.ring_seqlens) != 1:
            raise ValueError(
                f"gathered ring {self.ring} with ring_seqlens {self.ring_seqlens}: a gathered ring "
                "takes exactly one sequence; pass gathered=False for several"
            )
        if min(self.ring_seqlens + self.local_seqlens, default=1) < 1:
            raise ValueError(f"each sequence needs a length of 1 or more, got {self}")

    @classmethod
    def from_microbatch(cls, microbatch: Microbatch, rank: int) -> RingLayout:
        """The layout of a plan's microbatch on rank `rank`."""
        ring = microbatch.ring
        return cls(
            ring=ring,
            ring_rank=ring.index(rank) if ring else 0,
            ring_seqlens=tuple(p.seqlen for p in microbatch.pieces if p.degree > 1),
            gathered=microbatch.gathered,
            local_seqlens=tuple(p.seqlen for p in microbatch.pieces if p.degree == 1),
        )

    @property
    def ring_size(self) -> int:
        """Number of ranks in the ring; 1 if all sequences are local."""
        return max(1, len(self.ring))

    @cached_property
    def num_ring_tokens(self) -> int:
        """This rank's rows of ring sequences; they come first."""
        return self.ring_tokens_at(self.ring_rank)

    @cached_property
    def total_tokens(self) -> int:
        """All rows of this rank."""
        return self.num_ring_tokens + sum(self.local_seqlens)

    def ring_tokens_at(self, position: int) -> int:
        """Ring rows at ring position `position`: the size of the key block that it sends."""
        return sum(map(sum, self._chunk_sizes(position)))

    @cached_property
    def first(self) -> Segments:
        """The first block: this rank's own rows, causal."""
        shards = (sum(sizes) for sizes in self._chunk_sizes(self.ring_rank))
        lengths = tuple(n for n in shards if n) + self.local_seqlens
        return Segments(lengths, lengths, causal=True)

    @cached_property
    def steps(self) -> tuple[RingStep, ...]:
        """The blocks after the first, in the order in which keys arrive."""
        size = self.ring_size
        return tuple(self._step((self.ring_rank - s) % size) for s in range(1, size))

    def spans(self) -> list[tuple[int, int, int]]:
        """(sequence's index in the microbatch, start, stop) of the tokens to load, in row order."""
        result = []
        for i, seqlen in enumerate(self.ring_seqlens):
            for start, stop in rank_chunks(seqlen, self.ring_size, self.ring_rank):
                result.append((i, start, stop))
        offset = len(self.ring_seqlens)
        return result + [(offset + i, 0, n) for i, n in enumerate(self.local_seqlens)]

    def _chunk_sizes(self, position: int) -> list[tuple[int, int]]:
        """(early, late) chunk sizes of each ring sequence at ring position `position`."""
        chunks = (rank_chunks(n, self.ring_size, position) for n in self.ring_seqlens)
        return [(b - a, d - c) for (a, b), (c, d) in chunks]

    def _step(self, source: int) -> RingStep:
        ours, theirs = self._chunk_sizes(self.ring_rank), self._chunk_sizes(source)
        q_spans, k_spans, lens_q, lens_k = [], [], [], []
        q_at = k_at = 0
        for (q_early, q_late), (k_early, k_late) in zip(ours, theirs, strict=True):
            if source < self.ring_rank:
                q_span = (q_at, q_at + q_early + q_late)
                k_span = (k_at, k_at + k_early)
            else:
                q_span = (q_at + q_early, q_at + q_early + q_late)
                k_span = (k_at, k_at + k_early + k_late)
            if q_span[0] < q_span[1] and k_span[0] < k_span[1]:
                q_spans.append(q_span)
                k_spans.append(k_span)
                lens_q.append(q_span[1] - q_span[0])
                lens_k.append(k_span[1] - k_span[0])
            q_at += q_early + q_late
            k_at += k_early + k_late
        segments = Segments(tuple(lens_q), tuple(lens_k), causal=False)
        return RingStep(source, Rows(q_spans), Rows(k_spans), segments)


def _cumulative(lengths: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(accumulate(lengths, initial=0))
