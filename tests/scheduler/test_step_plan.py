"""StepPlan as data: reading, JSON round trip, identity."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from hdp.scheduler import Microbatch, Piece, StepPlan, plan
from tests.scheduler.batches import COMPUTE_ONLY, batches


def small() -> StepPlan:
    """Sequence 0 on ranks 2 and 0, sequences 1 and 2 local; rank 1 has an empty microbatch."""
    return StepPlan.from_lists(
        [10, 3, 4],
        [[2, 0], [0], [2]],
        [[[0, 1]], [[]], [[0], [2]]],
        max_tokens_per_rank=8,
    )


def test_objects_of_one_rank() -> None:
    made = small().validate()
    piece = Piece(seq=0, seqlen=10, ranks=(2, 0))
    local = Piece(seq=1, seqlen=3, ranks=(0,))
    assert made.microbatches(0) == [Microbatch(pieces=(piece, local))]
    assert made.microbatches(1) == [Microbatch()]
    assert made.microbatches(1)[0].ring == ()
    assert made.microbatches(0)[0].ring == (2, 0)
    assert piece.degree == 2 and piece.num_tokens(2) == 5 and piece.num_tokens(0) == 5
    assert made.microbatches(0)[0].num_tokens(0) == 8
    assert made.num_microbatches.tolist() == [1, 1, 2]
    assert made.degrees.tolist() == [2, 1, 1]
    with pytest.raises(ValueError, match="rank 3 is not in a plan for hdp_size=3"):
        made.microbatches(3)


@given(batches())
def test_columns_agree_with_objects(case) -> None:
    lengths, arguments = case
    made = plan(lengths, **arguments)
    at = 0
    for rank in range(made.hdp_size):
        for microbatch in made.microbatches(rank):
            assert made.microbatch_tokens[at] == microbatch.num_tokens(rank)
            assert made.microbatch_ranks[at] == rank
            at += 1
    assert at == len(made.offload_ratio)


@given(batches())
def test_json_round_trip(case) -> None:
    lengths, arguments = case
    made = plan(lengths, **arguments)
    again = StepPlan.from_json(made.to_json())
    assert again == made and hash(again) == hash(made)
    for field in dataclasses.fields(StepPlan):
        before, after = getattr(made, field.name), getattr(again, field.name)
        assert np.array_equal(before, after), field.name
    assert again.validate().to_json() == made.to_json()


def version_2(plan: StepPlan) -> dict[str, Any]:
    """A plan as earlier versions wrote it: every rank repeats its rings."""
    data = json.loads(plan.to_json())
    for name in ("aligned", "rings", "gathered", "offload_ratio"):
        del data[name]
    data["version"] = 2
    data["ranks"] = [
        [
            {
                "pieces": [[piece.seq, list(piece.ranks)] for piece in microbatch.pieces],
                "gathered": microbatch.gathered,
                "offload_ratio": microbatch.offload_ratio,
            }
            for microbatch in plan.microbatches(rank)
        ]
        for rank in range(plan.hdp_size)
    ]
    return data


def test_json_is_what_the_documentation_says() -> None:
    data = json.loads(small().to_json())
    assert data["version"] == 3 and data["hdp_size"] == 3 and data["seqlens"] == [10, 3, 4]
    assert data["predicted_s"] is None and data["lower_bound_s"] is None
    assert data["rings"] == [[[2, 1], [0, 1]], [[0, 1]], [[2, 1]]] and data["gathered"] == []
    assert data["ranks"] == [[[0, 1]], [[]], [[0], [2]]] and data["offload_ratio"] is None


@given(batches())
def test_json_of_version_2_goes_round(case) -> None:
    lengths, arguments = case
    made = plan(lengths, **arguments)
    again = StepPlan.from_json(json.dumps(version_2(made)))
    again = dataclasses.replace(
        again, aligned=made.aligned
    )  # a promise that version 2 does not know
    assert again == made and again.to_json() == made.to_json()


def test_json_of_version_2_is_what_it_was() -> None:
    data = version_2(small())
    assert data["hdp_size"] == 3 and data["seqlens"] == [10, 3, 4]
    assert data["predicted_s"] is None and data["lower_bound_s"] is None
    assert data["ranks"][2] == [
        {"pieces": [[0, [2, 0]]], "gathered": False, "offload_ratio": 0.0},
        {"pieces": [[2, [2]]], "gathered": False, "offload_ratio": 0.0},
    ]


def test_gathered_rings() -> None:
    """Per sequence in columns, per microbatch in objects and in JSON, on all ranks of the ring."""
    made = dataclasses.replace(small(), gathered=[True, False, False]).validate()
    assert [mb.gathered for rank in range(3) for mb in made.microbatches(rank)] == [
        *(True, False, True, False)
    ]
    again = StepPlan.from_json(made.to_json())
    assert again == made and again.gathered.tolist() == [True, False, False]
    assert made.digest != small().digest


def test_json_of_version_1_goes_round() -> None:
    data = version_2(small())
    data["version"] = 1
    for rank in data["ranks"]:
        for microbatch in rank:
            del microbatch["gathered"]
    assert StepPlan.from_json(json.dumps(data)) == small()


def test_json_whose_ranks_differ_in_the_mode() -> None:
    data = version_2(small())
    data["ranks"][2][0]["gathered"] = True
    with pytest.raises(ValueError, match="plan gathers sequence 0 on only some of its ranks"):
        StepPlan.from_json(json.dumps(data))
    data["ranks"][0][0]["gathered"] = True
    assert StepPlan.from_json(json.dumps(data)).gathered.tolist() == [True, False, False]
    data["ranks"][2][1]["gathered"] = True
    with pytest.raises(ValueError, match="gathered_alone: sequence 2 is gathered, but on one rank"):
        StepPlan.from_json(json.dumps(data)).validate()
    data["ranks"][2][1]["gathered"] = "yes"
    with pytest.raises(ValueError, match="gathered must be"):
        StepPlan.from_json(json.dumps(data))


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", '{"version": 2}', "null", '{"version": 4}', '{"version": "x"}'),
        '{"version": 1, "seqlens": 3, "ranks": []}',
    ],
)
def test_json_that_is_no_plan(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a StepPlan|version 4|version x"):
        StepPlan.from_json(text)


def test_json_with_a_sequence_that_does_not_exist() -> None:
    text = json.dumps(version_2(small())).replace("[1, [0]]", "[7, [0]]")
    with pytest.raises(ValueError, match="not a StepPlan"):
        StepPlan.from_json(text)
    text = small().to_json().replace("[[[0, 1]], [[]]", "[[[0, 7]], [[]]")
    with pytest.raises(ValueError, match="not a StepPlan in JSON: ranks has sequence 7, of 3 seq"):
        StepPlan.from_json(text)


def test_digest_covers_what_ranks_do() -> None:
    made = small()
    assert dataclasses.replace(made, predicted_s=1.0, notes={"a": 1}).digest == made.digest
    assert dataclasses.replace(made, max_tokens_per_rank=9).digest != made.digest
    other = StepPlan.from_lists(
        [10, 3, 4], [[0, 2], [0], [2]], [[[0, 1]], [[]], [[0], [2]]], max_tokens_per_rank=8
    )
    assert other != made  # the order of a ring is part of the step


def test_columns_are_read_only() -> None:
    with pytest.raises(ValueError, match="read-only"):
        small().seqlens[0] = 1


def test_ends_together() -> None:
    def ends(*microbatches: list[list[int]]) -> bool:
        rings = [[0, 1], [0], [1]]
        made = StepPlan.from_lists([4, 1, 1], rings, microbatches, max_tokens_per_rank=8)
        return made.validate().ends_together

    assert ends([[0], [1]], [[0], [2]])
    assert ends([[1], [0]], [[2], [0]])
    assert ends([[0, 1]], [[0, 2]])
    assert not ends([[1], [0]], [[0], [2]])


def test_repr_and_equality_with_others() -> None:
    made = small()
    assert made != "plan"
    one = plan([5], hdp_size=1, max_tokens_per_rank=8, cost=COMPUTE_ONLY)
    assert one.microbatches(0)[0].pieces[0].ranks == (0,)


def test_digest_covers_the_offload_ratio():
    def digest(ratio):
        columns = ([4, 4], [[0], [1]], [[[0]], [[1]]])
        plan = StepPlan.from_lists(
            *columns, offload_ratio=[[ratio], [0.0]], offloadable=0.5, max_tokens_per_rank=4
        )
        return plan.digest

    assert digest(0.25) == digest(0.25)
    assert digest(0.25) != digest(0.5)


@pytest.mark.parametrize(
    ("seqlens", "ring", "message"),
    [
        ([1.5], [0], r"seqlens\[0\] is 1.5, which does not fit in int64"),
        (["5"], [0], "seqlens must be numbers"),
        ([None], [0], "seqlens must be numbers, got object"),
        ([5], [2**32], r"ring_ranks\[0\] is 4294967296, which does not fit in int32"),
        ([2**64], [0], r"seqlens"),
    ],
)
def test_columns_hold_what_they_are_given(seqlens, ring, message: str) -> None:
    """Nothing is rounded, wrapped around or read as a number that it is not."""
    with pytest.raises(ValueError, match=message):
        StepPlan.from_lists(seqlens, [ring], [[[0]]], max_tokens_per_rank=8)


def test_columns_are_copies() -> None:
    lengths = np.array([5])
    made = StepPlan.from_lists(lengths, [[0]], [[[0]]], max_tokens_per_rank=8)
    lengths[0] = 6
    assert made.seqlens.tolist() == [5]
