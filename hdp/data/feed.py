"""StepFeed: plans, packs and uploads step t + 1 while step t runs.

Every rank computes the same plan from the same lengths, so there is no scheduler process and no
broadcast. For each step, one background thread does the following:

  1. take the step's sequence ids from the sampler, a function of the position, not of history
  2. plan from their lengths
  3. read this rank's tokens and pack its microbatches
  4. copy them to the device on a separate stream

The sampler's position travels with the step: a checkpoint stores the position *after* the last
trained step, no matter how far ahead the thread has run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from hdp.scheduler import StepPlan

from .pack import PackedBatch, pack_rank
from .sample import Sample, SampleSource

Position = Any  # what the sampler counts in: JSON-able, and only the sampler reads it

_LONG_WAIT_S = 1.0  # before `on_wait`, which may cost a message


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """One rank's work for one step."""

    plan: StepPlan
    batches: tuple[PackedBatch, ...]  # this rank's microbatches, in order; at least one
    seq_ids: np.ndarray  # (num_seqs,) int64: the plan's sequences, as ids in the source
    num_loss_tokens: int  # over all ranks: the denominator of the loss
    next_position: Position | None = None  # the sampler's position after this step
    wait_s: float = 0.0  # how long the caller waited for this step

    def to(self, device: torch.device) -> StepBatch:
        """The same step with its microbatches on `device`."""
        return replace(self, batches=tuple(batch.to(device) for batch in self.batches))


def make_step(
    source: SampleSource,
    seq_ids: np.ndarray,
    plan: StepPlan,
    rank: int,
    *,
    next_position: Position | None = None,
) -> StepBatch:
    """Rank `rank`'s work for a planned step, on the CPU.

    source: provides the samples. seq_ids: (num_seqs,) ids in `source`, in the order of the lengths
    that were planned. next_position: the sampler's position after this step. Raises ValueError if
    the samples do not match the plan.
    """
    return StepBatch(
        plan=plan,
        batches=pack_rank(plan, rank, _PlanSamples(source, seq_ids)),
        seq_ids=np.asarray(seq_ids),
        num_loss_tokens=int(source.num_loss_tokens[seq_ids].sum()),
        next_position=next_position,
    )


class _PlanSamples:
    """The samples of a plan: sequence s of the plan is sample seq_ids[s] of the source."""

    def __init__(self, source: SampleSource, seq_ids: np.ndarray) -> None:
        self._source, self._seq_ids = source, seq_ids

    def __getitem__(self, index: int, /) -> Sample:
        return self._source[int(self._seq_ids[index])]


class Batches(Protocol):
    """Global batches as a pure function of a position: a `Sampler`, or your own order."""

    def batch_at(self, position: Position, /) -> tuple[np.ndarray, Position]:
        """(sequence ids of the batch at `position`, position of the next batch)."""
        ...


class StepFeed:
    """Iterates over StepBatches on `device` forever. A context manager that owns a thread.

    on_wait: wraps a wait for a step that takes longer than a second, for a watchdog.
    """

    def __init__(
        self,
        source: SampleSource,
        sampler: Batches,
        make_plan: Callable[[np.ndarray], StepPlan],
        *,
        rank: int,
        position: Position,
        device: torch.device = torch.device("cpu"),  # noqa: B008 - a constant
        on_wait: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._source, self._sampler, self._make_plan = source, sampler, make_plan
        self._on_wait = on_wait
        self._rank, self._position = rank, position
        self._upload = _Upload(device)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hdp-feed")

    def make(self, position: Position) -> StepBatch:
        """The step at `position`, computed in the calling thread."""
        seq_ids, next_position = self._sampler.batch_at(position)  # 1
        plan = self._make_plan(self._source.seqlens[seq_ids])  # 2
        step = make_step(self._source, seq_ids, plan, self._rank, next_position=next_position)  # 3
        return self._upload(step)  # 4

    def __iter__(self) -> Iterator[StepBatch]:
        pending: Future[StepBatch] = self._thread.submit(self.make, self._position)
        while True:
            start = time.perf_counter()
            wait([pending], timeout=_LONG_WAIT_S)
            with nullcontext() if pending.done() else self._on_wait():
                step = pending.result()
            wait_s = time.perf_counter() - start
            assert step.next_position is not None
            pending = self._thread.submit(self.make, step.next_position)
            yield replace(step, wait_s=wait_s)

    def __enter__(self) -> StepFeed:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)


class _Upload:
    """Copies a step to a device without blocking the training thread or its stream.

    The feed's thread pins the tensors, copies them on a separate stream, and waits for the copies.
    The tensors are used on the stream that was current when the feed was created: `record_stream`
    keeps their memory from being reused for later copies while that stream still reads them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._consumer = torch.cuda.current_stream(device)

    def __call__(self, step: StepBatch) -> StepBatch:
        if self._stream is None:
            return step.to(self._device)
        with torch.cuda.stream(self._stream):
            batches = tuple(batch.to(self._device, non_blocking=True) for batch in step.batches)
        self._stream.synchronize()
        for batch in batches:
            for tensor in batch.tensors():
                tensor.record_stream(self._consumer)
        return replace(step, batches=batches)
