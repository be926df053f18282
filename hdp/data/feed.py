"""StepFeed: plans and packs step t + 1 while step t runs.

Every rank computes the same plan from the same lengths (design.md, decision 1), so there is no
scheduler process and nothing is broadcast. One background thread does, per step:

  1. take the step's sequence ids from the sampler, a function of the position and not of the past
  2. plan from their lengths
  3. read this rank's tokens and pack its microbatches

The sampler's position travels with the step: a checkpoint stores the position *after* the step that
was trained, however far the thread has run ahead.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from hdp.scheduler import StepPlan

from .dataset import TokenDataset
from .pack import PackedBatch, Sample, pack_rank
from .sampler import Position


class Batches(Protocol):
    """Global batches as a pure function of a position: a `Sampler`, or another order."""

    def batch_at(self, position: Position, /) -> tuple[np.ndarray, Position]:
        """(sequence ids of the batch at `position`, position of the next batch)."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """One rank's work of one step."""

    plan: StepPlan
    batches: tuple[PackedBatch, ...]  # this rank's microbatches, in order; at least one
    seq_ids: np.ndarray  # (num_seqs,) int64: dataset ids of the plan's sequences
    num_loss_tokens: int  # over all ranks: what the loss is divided by
    next_position: Position  # of the sampler, after this step
    wait_s: float = 0.0  # time that the caller waited for this step


class StepFeed:
    """Iterates over StepBatches for ever. Use as a context manager: it owns a thread."""

    def __init__(
        self,
        dataset: TokenDataset,
        sampler: Batches,
        make_plan: Callable[[np.ndarray], StepPlan],
        *,
        rank: int,
        position: Position,
    ) -> None:
        self._dataset, self._sampler, self._make_plan = dataset, sampler, make_plan
        self._rank, self._position = rank, position
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hdp-feed")

    def make(self, position: Position) -> StepBatch:
        """The step at `position`, made in the calling thread."""
        seq_ids, next_position = self._sampler.batch_at(position)  # 1
        plan = self._make_plan(self._dataset.seqlens[seq_ids])  # 2
        samples = _LazySamples(self._dataset, seq_ids)
        batches = pack_rank(plan, self._rank, samples)  # 3
        return StepBatch(
            plan=plan,
            batches=batches,
            seq_ids=seq_ids,
            num_loss_tokens=int(self._dataset.num_loss_tokens[seq_ids].sum()),
            next_position=next_position,
        )

    def __iter__(self) -> Iterator[StepBatch]:
        pending: Future[StepBatch] = self._thread.submit(self.make, self._position)
        while True:
            start = time.perf_counter()
            batch = pending.result()
            wait_s = time.perf_counter() - start
            pending = self._thread.submit(self.make, batch.next_position)
            yield replace(batch, wait_s=wait_s)

    def __enter__(self) -> StepFeed:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)


class _LazySamples:
    """samples[s] of a plan: only sequences that this rank holds are touched."""

    def __init__(self, dataset: TokenDataset, seq_ids: np.ndarray) -> None:
        self._dataset, self._seq_ids = dataset, seq_ids

    def __getitem__(self, index: int) -> Sample:
        return self._dataset[int(self._seq_ids[index])]
