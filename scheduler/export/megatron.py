"""Adapters: our planner for frameworks that have their own runtime.

Megatron's development branch, and verl through it, call a class's

    get_groups_and_subsamples([(id, length), ...]) -> [microbatch][rank][ids]

where all ranks run every microbatch, a context-parallel group is contiguous ranks that hold the
same ids, its size is a power of two (or all ranks) that divides its first rank, and no rank is ever
idle. Three lines replace their planner with ours, in either framework:

    from megatron.core.datasets.data_schedule import DefaultDynamicCPScheduler
    from hdp.scheduler.export.megatron import get_groups_and_subsamples
    DefaultDynamicCPScheduler.get_groups_and_subsamples = get_groups_and_subsamples

`GroupScheduler` is the same as a standalone class. With `powers_of_two=False` it returns `plan()`'s
own plan, with equal microbatch counts and any degree: for runtimes that accept a ring per sequence
(all ranks that list its id in a microbatch) next to local sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

from hdp.scheduler.costs.cost_model import CostModel
from hdp.scheduler.step_plan import StepPlan

from .power_of_two import DEFAULT_COST, Groups, ids_and_lengths, power_of_two_groups


def get_groups_and_subsamples(self: object, sample_id_seqlens: Sequence[tuple[int, int]]) -> Groups:
    """[microbatch][rank][ids] as a method to assign to one of Megatron's scheduler classes.

    Reads from `self`: max_seqlen_per_dp_cp_rank, cp_size, dp_size; and, if present, min_cp_size,
    microbatch_group_size_per_vp_stage (the number of microbatches becomes a multiple of it) and
    hdp_cost, a CostModel. Raises ValueError for lengths that do not fit.
    """
    return power_of_two_groups(
        sample_id_seqlens,
        num_ranks=self.cp_size * self.dp_size,  # type: ignore[attr-defined]
        max_tokens_per_rank=self.max_seqlen_per_dp_cp_rank,  # type: ignore[attr-defined]
        cost=getattr(self, "hdp_cost", None) or DEFAULT_COST,
        min_degree=getattr(self, "min_cp_size", 1) or 1,
        multiple=getattr(self, "microbatch_group_size_per_vp_stage", None) or 1,
    )


class GroupScheduler:
    """Our planner with the constructor and method that Megatron and verl call."""

    def __init__(
        self,
        max_seqlen_per_dp_cp_rank: int,
        cp_size: int,
        dp_size: int,
        microbatch_group_size_per_vp_stage: int | None = None,
        pipeline_model_parallel_size: int = 1,
        *,
        min_cp_size: int = 1,
        cost: CostModel | None = None,
        powers_of_two: bool = True,
    ) -> None:
        self.max_seqlen_per_dp_cp_rank = max_seqlen_per_dp_cp_rank
        self.cp_size = cp_size
        self.dp_size = dp_size
        self.microbatch_group_size_per_vp_stage = microbatch_group_size_per_vp_stage
        self.pipeline_model_parallel_size = pipeline_model_parallel_size
        self.min_cp_size = min_cp_size
        self.hdp_cost = cost or DEFAULT_COST
        self.powers_of_two = powers_of_two

    def get_groups_and_subsamples(self, sample_id_seqlens: Sequence[tuple[int, int]]) -> Groups:
        """[microbatch][rank][ids]; every rank has the same number of microbatches.

        With powers_of_two=False a rank may hold a shared id and local ids in one microbatch, and
        the last microbatches of a rank may be empty.
        """
        if self.powers_of_two:
            return get_groups_and_subsamples(self, sample_id_seqlens)
        from hdp.scheduler.planner import plan

        ids, lengths = ids_and_lengths(sample_id_seqlens)
        step_plan = plan(
            lengths,
            hdp_size=self.cp_size * self.dp_size,
            max_tokens_per_rank=self.max_seqlen_per_dp_cp_rank,
            cost=self.hdp_cost,
            pp_size=max(
                self.pipeline_model_parallel_size, 2
            ),  # aligns indices of shared microbatches
            equal_counts=True,
        )
        return plan_to_groups(step_plan, ids)


def plan_to_groups(plan: StepPlan, ids: Sequence[int] | None = None) -> Groups:
    """[microbatch][rank][ids] of any plan whose shared microbatches have equal local indices.

    Ranks with fewer microbatches are padded with empty ones. Raises ValueError if indices differ.
    """
    names = range(plan.num_seqs) if ids is None else ids
    lists = [
        [[piece.seq for piece in microbatch.pieces] for microbatch in plan.microbatches(rank)]
        for rank in range(plan.hdp_size)
    ]
    index_of: dict[int, int] = {}
    for rank_lists in lists:
        for index, seqs in enumerate(rank_lists):
            for seq in seqs:
                if index_of.setdefault(seq, index) != index:
                    raise ValueError(
                        f"sequence {seq} is in microbatches {index_of[seq]} and {index} of its "
                        "ranks; plan with pp_size=2 to align them"
                    )
    count = max(map(len, lists))
    return [
        [[names[s] for s in rank[m]] if m < len(rank) else [] for rank in lists]
        for m in range(count)
    ]
