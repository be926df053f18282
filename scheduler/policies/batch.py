"""Batch: the checked arguments of plan(), as columns over jobs.

A job is what must be placed together: one sequence, or one unit (sequences that share a microbatch
on the same ranks, such as a DPO pair). Jobs are ordered by their first sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hdp.scheduler.costs.cost_model import CostModel
from hdp.scheduler.costs.gathering import may_gather
from hdp.scheduler.plain import flag, whole, whole_column
from hdp.scheduler.validate import MOST_RANKS, MOST_STAGES, MOST_TOKENS

# Most pieces of a plan, (sequence, rank) pairs: seconds of planning and about 2 GB.
MOST_PIECES = 2**25


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The input of every policy. Job j is `job_seqs[job_offsets[j]:job_offsets[j + 1]]`."""

    seqlens: np.ndarray  # (num_seqs,) int64, tokens
    job_offsets: np.ndarray  # (num_jobs + 1,) int64
    job_seqs: np.ndarray  # (num_seqs,) int64
    hdp_size: int
    max_tokens_per_rank: int
    cost: CostModel
    pp_size: int = 1
    ranks_per_node: int | None = None
    offload: bool = False
    equal_counts: bool = False
    multiple: int = 1
    ends_together: bool = False

    @property
    def num_jobs(self) -> int:
        return len(self.job_offsets) - 1

    @property
    def num_seqs(self) -> int:
        return len(self.seqlens)

    @property
    def same_index(self) -> bool:
        """Whether a shared microbatch needs one local index on all ranks of its ring."""
        return self.pp_size > 1 or self.equal_counts

    @property
    def has_units(self) -> bool:
        return self.num_jobs < self.num_seqs

    @property
    def job_tokens(self) -> np.ndarray:
        """(num_jobs,) int64: tokens of each job."""
        return self.job_sum(self.seqlens)

    @property
    def job_squares(self) -> np.ndarray:
        """(num_jobs,) float64: sum of the squared lengths of each job."""
        return self.job_sum(self.seqlens.astype(np.float64) ** 2)

    def job_sum(self, per_seq: np.ndarray) -> np.ndarray:
        """(num_jobs,): sum of a column over the sequences of each job."""
        if not self.has_units:
            return per_seq
        return np.add.reduceat(per_seq[self.job_seqs], self.job_offsets[:-1])

    def tokens_per_rank(self, degree: np.ndarray) -> np.ndarray:
        """(num_jobs,) int64: tokens on the fullest rank with each job on `degree` ranks."""
        if not self.has_units:
            return -(-self.seqlens // degree)
        return self.job_sum(-(-self.seqlens // self.by_seq(degree)))

    @property
    def may_gather(self) -> np.ndarray:
        """(num_jobs,) bool: whether the ring of each job may be gathered, inside a node."""
        alone = np.diff(self.job_offsets) == 1
        return alone & may_gather(self.cost, self.job_tokens)

    def seconds(self, degree: np.ndarray) -> np.ndarray:
        """(num_jobs,) float64: seconds of each job on each of its ranks, without fixed_s."""
        across = degree > (self.ranks_per_node or self.hdp_size)
        return self.cost.unit_s(self.job_squares, self.job_tokens, degree, across, self.may_gather)

    def by_seq(self, per_job: np.ndarray) -> np.ndarray:
        """(num_seqs,): a column over jobs, expanded to their sequences."""
        result = np.empty(self.num_seqs, dtype=per_job.dtype)
        result[self.job_seqs] = np.repeat(per_job, np.diff(self.job_offsets))
        return result

    @classmethod
    def check(
        cls,
        seqlens: Sequence[int] | np.ndarray,
        *,
        hdp_size: int,
        max_tokens_per_rank: int,
        cost: CostModel,
        units: Sequence[int] | np.ndarray | None = None,
        pp_size: int = 1,
        ranks_per_node: int | None = None,
        offload: bool = False,
        equal_counts: bool = False,
        multiple: int = 1,
        ends_together: bool = False,
    ) -> Batch:
        """Check the arguments of plan(). Raises ValueError with the values and the remedy."""
        hdp_size = whole("hdp_size", hdp_size, most=MOST_RANKS)
        max_tokens_per_rank = whole("max_tokens_per_rank", max_tokens_per_rank, most=MOST_TOKENS)
        pp_size = whole("pp_size", pp_size, most=MOST_STAGES)
        if hdp_size * pp_size > MOST_RANKS:
            raise ValueError(
                f"hdp_size={hdp_size} ranks of pp_size={pp_size} stages are more than {MOST_RANKS} "
                "devices; did you pass another quantity?"
            )
        if not isinstance(cost, CostModel):
            raise ValueError(f"cost must be a CostModel, not {type(cost).__name__}")
        lengths = _lengths(seqlens)
        if ranks_per_node is not None:
            ranks_per_node = whole("ranks_per_node", ranks_per_node, most=MOST_RANKS)
            if hdp_size % ranks_per_node and hdp_size > ranks_per_node:
                raise ValueError(
                    f"hdp_size={hdp_size} is not a multiple of ranks_per_node={ranks_per_node}; "
                    "use whole nodes, or omit ranks_per_node"
                )
            ranks_per_node = min(ranks_per_node, hdp_size)
        offsets, seqs = np.arange(len(lengths) + 1), np.arange(len(lengths))
        if units is not None:
            offsets, seqs = _group(whole_column("units", units), len(lengths))
        return cls(
            seqlens=lengths,
            job_offsets=offsets,
            job_seqs=seqs,
            hdp_size=hdp_size,
            max_tokens_per_rank=max_tokens_per_rank,
            cost=cost,
            pp_size=pp_size,
            ranks_per_node=ranks_per_node,
            offload=flag("offload", offload),
            equal_counts=flag("equal_counts", equal_counts),
            multiple=whole("multiple", multiple, most=MOST_STAGES),
            ends_together=flag("ends_together", ends_together),
        )


def check_size(batch: Batch, degree: np.ndarray) -> None:
    """Raise ValueError if a plan with these degrees, (num_seqs,), has over MOST_PIECES pieces."""
    pieces = float(degree.sum(dtype=np.float64))
    if pieces > MOST_PIECES:
        raise ValueError(
            f"a plan of {batch.num_seqs} sequences on {pieces / batch.num_seqs:.0f} ranks each has "
            f"{pieces:.3g} pieces, more than {MOST_PIECES}; raise max_tokens_per_rank="
            f"{batch.max_tokens_per_rank}, or plan fewer sequences at once"
        )


def _lengths(seqlens: Sequence[int] | np.ndarray) -> np.ndarray:
    """(num_seqs,) int64: the lengths, each at least 1 and no more in all than float64 counts."""
    lengths = whole_column("seqlens", seqlens)
    if not len(lengths):
        raise ValueError("empty batch: give at least one sequence")
    bad = np.flatnonzero(lengths < 1)
    if len(bad):
        raise ValueError(
            f"seqlens[{bad[0]}] is {lengths[bad[0]]}; drop empty sequences before planning"
        )
    if float(lengths.sum(dtype=np.float64)) > MOST_TOKENS:
        raise ValueError(
            f"{len(lengths)} sequences of {lengths.sum(dtype=np.float64):.3g} tokens, the "
            f"longest of {lengths.max()}: the sum must be at most 2**53; check the units"
        )
    return lengths


def _group(units: np.ndarray, num_seqs: int) -> tuple[np.ndarray, np.ndarray]:
    """(offsets, sequences): CSR of sequences by unit, units ordered by their first sequence."""
    if len(units) != num_seqs:
        raise ValueError(f"{len(units)} units for {num_seqs} sequences; give one unit per sequence")
    _, first, inverse = np.unique(units, return_index=True, return_inverse=True)
    rank_of_unit = np.empty(len(first), dtype=np.int64)
    rank_of_unit[np.argsort(first)] = np.arange(len(first))
    job = rank_of_unit[inverse]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(job))])
    return offsets, np.argsort(job, kind="stable")
