"""Every invariant of step_plan.py has a test of its name; plans that break it are refused by it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from hdp.scheduler import StepPlan, plan, validate_plan
from tests.scheduler.batches import COMPUTE_ONLY, lognormal


def make(
    lengths: list[int], rings: list[list[int]], microbatches: list[list[list[int]]], **fields: Any
) -> StepPlan:
    fields.setdefault("max_tokens_per_rank", 100)
    return StepPlan.from_lists(lengths, rings, microbatches, **fields)


def refused(made: StepPlan, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate_plan(made)


def test_every_token_once() -> None:
    make([4, 2], [[0, 1], [1]], [[[0]], [[0, 1]]]).validate()
    refused(make([4], [[0, 1]], [[[0]], [[]]]), "every_token_once: sequence 0 on rank 1 .* no mic")
    refused(make([4], [[0]], [[[0], [0]]]), "every_token_once: sequence 0 on rank 0 .* more than")
    refused(make([4], [[0]], [[[0]], [[0]]]), "every_token_once: sequence 0 on rank 1 .* not in")
    refused(make([4], [[0, 0]], [[[0]]]), "every_token_once: sequence 0 on rank 0 is twice")
    refused(make([4, 1], [[0], []], [[[0]]]), "every_token_once: sequence 1 has no rank")
    refused(make([4, 1], [[0], [1]], [[[0]], [[]]]), "sequence 1 on rank 1 is in its ring but")


def test_capacity_kept() -> None:
    # 9 tokens on 2 ranks are 5 and 4: the real uneven chunks count.
    make([9], [[0, 1]], [[[0]], [[0]]], max_tokens_per_rank=5).validate()
    message = "capacity_kept: rank 0 microbatch 0 holds 5 tokens .* max_tokens_per_rank=4"
    refused(make([9], [[0, 1]], [[[0]], [[0]]], max_tokens_per_rank=4), message)
    # With half of the tokens offloaded, of which 80 % can leave, 5 tokens take the room of 3.
    ratio = [[0.5], [0.5]]
    make([9], [[0, 1]], [[[0]], [[0]]], offload_ratio=ratio, max_tokens_per_rank=3,
         offloadable=0.8).validate()  # fmt: skip
    refused(
        make([9], [[0, 1]], [[[0]], [[0]]], offload_ratio=ratio, max_tokens_per_rank=3),
        "capacity_kept: rank 0 microbatch 0 holds 5 tokens with offload ratio 0.500",
    )


def test_one_ring_each() -> None:
    make([4, 4], [[0, 1], [0, 1]], [[[0, 1]], [[0, 1]]]).validate()  # packed zigzag
    refused(
        make([4, 4], [[0, 1], [1, 0]], [[[0, 1]], [[0, 1]]]),
        r"one_ring_each: sequences \(0, 1\) share a microbatch but not a ring",
    )
    refused(
        make([4, 4], [[0, 1], [0, 1]], [[[0, 1]], [[1, 0]]]),
        "one_ring_each: rank .* microbatch 0 holds",
    )
    refused(
        make([4, 4], [[0, 1], [0, 1]], [[[0, 1]], [[0], [1]]]),
        "one_ring_each: rank .* microbatch 0 holds",
    )
    refused(
        make([4, 1], [[0, 1], [1]], [[[0]], [[1, 0]]]),
        "one_ring_each: rank 1 microbatch 0 has a local piece before",
    )


def test_gathered_alone() -> None:
    both = [[0, 1], [0, 1]]
    make([4, 3], [[0, 1], [1]], [[[0]], [[0, 1]]], gathered=[True, False]).validate()
    make([4, 4], both, [[[0], [1]], [[0], [1]]], gathered=[True, False]).validate()
    refused(
        make([4, 3], [[0, 1], [1]], [[[0]], [[0, 1]]], gathered=[True, True]),
        "gathered_alone: sequence 1 is gathered, but on one rank",
    )
    for gathered in ([True, False], [False, True], [True, True]):
        refused(
            make([4, 4], both, [[[0, 1]], [[0, 1]]], gathered=gathered),
            "gathered_alone: sequences 0 and 1 share a ring, and one of them is gathered",
        )


def test_acyclic_order() -> None:
    rings = [[0, 1], [1, 2], [2, 0]]
    make([4, 4, 4], rings, [[[0], [2]], [[0], [1]], [[1], [2]]]).validate()
    refused(
        make([4, 4, 4], rings, [[[0], [2]], [[1], [0]], [[2], [1]]]),
        "acyclic_order: deadlock: rank 0 waits in sequence 0; rank 1 waits in sequence 1",
    )
    refused(
        make([4, 4], [[0, 1], [0, 1]], [[[0], [1]], [[1], [0]]]), "acyclic_order: deadlock: rank 0"
    )


def test_same_index_under_pp() -> None:
    lists = [[[0], [1]], [[1]]]
    make([4, 4], [[0], [0, 1]], lists).validate()
    refused(
        make([4, 4], [[0], [0, 1]], lists, pp_size=2),
        "same_index_under_pp: sequence 1 is in microbatch 0 of one rank and 1 of another",
    )
    make([4, 4], [[0], [0, 1]], [[[0], [1]], [[], [1]]], pp_size=2).validate()


def test_no_rank_without_work() -> None:
    make([4], [[0]], [[[0]], [[]]]).validate()
    refused(make([4], [[0]], [[[0]], []]), "no_rank_without_work: rank 1 has no microbatch")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens_per_rank": 0}, "hdp_size, max_tokens_per_rank, pp_size"),
        ({"pp_size": 1.5}, "hdp_size, max_tokens_per_rank, pp_size"),
        ({"offloadable": 1.0}, "offloadable=1.0"),
        ({"seqlens": [4, 0]}, r"seqlens\[1\] is 0"),
        ({"ring_ranks": [0, 1, 2]}, r"ring_ranks\[2\] is 2"),
        ({"piece_seqs": [0, 0, 5]}, r"piece_seqs\[2\] is 5"),
        ({"piece_seqs": [0, 0, 2]}, r"piece_seqs\[2\] is 2"),
        ({"offload_ratio": [0.0, 1.5]}, r"offload_ratio\[1\] is 1.5"),
        ({"offload_ratio": [0.0, float("nan")]}, r"offload_ratio\[1\] is nan"),
        ({"offload_ratio": [0.0]}, "1 offload ratios for 2"),
        ({"gathered": [True]}, "1 values of gathered for 2 sequences"),
        ({"ring_offsets": [0, 3, 2]}, "ring_offsets must rise"),
        ({"microbatch_offsets": [0, 2]}, "microbatch_offsets must rise"),
        ({"piece_offsets": [1, 1, 3]}, "piece_offsets must rise"),
        ({"ranks_per_node": 0}, "ranks_per_node=0 must be an integer >= 1"),
        ({"ranks_per_node": "8"}, "ranks_per_node='8' must be an integer"),
        ({"offloadable": "x"}, "offloadable='x' must be a number"),
        ({"predicted_s": None}, "predicted_s=None must be a number"),
        ({"hdp_size": True}, "hdp_size, max_tokens_per_rank, pp_size = .True"),
    ],
)
def test_columns_are_sound(change: dict[str, Any], message: str) -> None:
    good = make([4, 2], [[0, 1], [1]], [[[0]], [[0, 1]]])
    refused(dataclasses.replace(good, **change), f"columns_are_sound: .*{message}")


def test_random_damage_is_found() -> None:
    """Move, drop or double random entries of a good plan: never silently accepted as different."""
    rng = np.random.default_rng(0)
    good = plan(lognormal(60), hdp_size=20, max_tokens_per_rank=16384, cost=COMPUTE_ONLY).validate()
    found = 0
    for _ in range(200):
        column = rng.choice(["ring_ranks", "piece_seqs", "piece_offsets", "microbatch_offsets"])
        values = getattr(good, column).copy()
        values[rng.integers(len(values))] += rng.choice([-1, 1])
        try:
            dataclasses.replace(good, **{column: values}).validate()
        except ValueError:
            found += 1
    # Moving a border between two microbatches of local pieces can be another good plan.
    assert found > 150


def test_large_plans_validate_fast() -> None:
    made = plan(lognormal(4000), hdp_size=512, max_tokens_per_rank=16384, cost=COMPUTE_ONLY)
    assert made.validate() is made


def test_aligned_as_promised() -> None:
    rings, straight, crossed = (
        [[0, 1], [0], [1]],
        [[[0], [1]], [[0], [2]]],
        [[[0], [1]], [[2], [0]]],
    )
    make([4, 1, 1], rings, straight, aligned=True).validate()
    make([4, 1, 1], rings, crossed).validate()
    refused(
        make([4, 1, 1], rings, crossed, aligned=True),
        "aligned_as_promised: sequence 0 is in microbatch 0 of one rank and 1 of another",
    )
    refused(
        make([4, 1], [[0, 1], [0]], [[[0], [1]], [[0]]], aligned=True),
        "aligned_as_promised: rank 1 has 1 microbatches and rank 0 has 2; add empty ones",
    )
    refused(make([1], [[0]], [[[0]]], aligned="yes"), "aligned='yes' must be True or False")
