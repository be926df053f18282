"""Every plan of a small batch, for tests of bounds and of planners."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, product

from hdp.scheduler import StepPlan
from hdp.scheduler.costs.cost_model import GATHER_LEAST_RANKS


def all_plans(
    lengths: list[int], *, hdp_size: int, max_tokens_per_rank: int, ranks_per_node: int | None,
    pp_size: int, may_gather: Sequence[bool], offloadable: float = 0.0,
) -> Iterator[StepPlan]:  # fmt: skip
    """All rings of all sequences, gathered or not where the rule allows both, and all ways in which
    ranks can share and order microbatches: at most one ring in each, within the capacity, with the
    least offload ratio where it takes some. Some deadlock: `finish_s` refuses them.

    may_gather: of each sequence, by the rule of costs/gathering.py."""

    def ratio(order: list[list[int]], shards: list[int]) -> list[float]:
        tokens = [max(sum(shards[seq] for seq in mb), 1) for mb in order]
        return [max(1.0 - max_tokens_per_rank / n, 0.0) / (offloadable or 1.0) for n in tokens]

    node = ranks_per_node or hdp_size
    rings = [
        tuple(ranks)
        for degree in range(1, hdp_size + 1)
        for ranks in combinations(range(hdp_size), degree)
        if _legal(ranks, node)
    ]
    for chosen in product(rings, repeat=len(lengths)):
        shards = [-(-n // len(ring)) for n, ring in zip(lengths, chosen, strict=True)]
        orders = []
        for rank in range(hdp_size):
            here = [seq for seq, ring in enumerate(chosen) if rank in ring]
            kept = [
                [sorted(mb, key=lambda seq: len(chosen[seq]) == 1) for mb in order] or [[]]
                for order in _ordered_partitions(here)
                if all(
                    sum(shards[seq] for seq in mb) * (1 - offloadable) <= max_tokens_per_rank
                    and sum(len(chosen[seq]) > 1 for seq in mb) <= 1
                    for mb in order
                )
            ]
            orders.append(kept)
        modes = [
            (False, True) if may and GATHER_LEAST_RANKS <= len(ring) <= node else (False,)
            for ring, may in zip(chosen, may_gather, strict=True)
        ]
        for microbatches, gathered in product(product(*orders), product(*modes)):
            yield StepPlan.from_lists(
                lengths, chosen, microbatches, max_tokens_per_rank=max_tokens_per_rank,
                pp_size=pp_size, ranks_per_node=ranks_per_node, offloadable=offloadable,
                gathered=gathered,
                offload_ratio=[ratio(order, shards) for order in microbatches],
            )  # fmt: skip


def _legal(ranks: tuple[int, ...], node: int) -> bool:
    """Inside a node, or whole nodes."""
    nodes = len({rank // node for rank in ranks})
    return nodes == 1 or nodes * node == len(ranks)


def _ordered_partitions(items: list[int]) -> Iterator[list[list[int]]]:
    if not items:
        yield []
    for size in range(1, len(items) + 1):
        for first in combinations(items, size):
            rest = [item for item in items if item not in first]
            for others in _ordered_partitions(rest):
                yield [list(first), *others]
