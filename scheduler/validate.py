"""Checks of a StepPlan: one function for each invariant of step_plan.py, of the same name.

A plan may come from a buggy planner, another process or a JSON file, so nothing is taken for
granted: columns first (shapes, offsets, index ranges), then the invariants in order. Every function
raises a ValueError that starts with the invariant's name and says where it fails. Nothing here
simulates time; deadlock freedom is checked by walking all ranks at once.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from .plain import shown
from .rendezvous import meetings, stuck, walk

if TYPE_CHECKING:
    from .step_plan import StepPlan

# Limits: what the columns and float64 hold exactly, and sizes that no real cluster exceeds.
MOST_RANKS, MOST_STAGES, MOST_TOKENS = 2**24, 1024, 2**53
# Tokens times (1 - offload_ratio * offloadable) is not an integer: allow for rounding only.
_SLACK_TOKENS = 1e-6


def validate_plan(plan: StepPlan) -> None:
    """Raise ValueError naming the first invariant of `plan` that fails, and where.

    The invariants are those of step_plan.py: every token once, capacity kept, at most one ring per
    microbatch (the same on all of its ranks), no deadlock, with and without pipeline stages.
    """
    columns_are_sound(plan)
    every_token_once(plan)
    capacity_kept(plan)
    one_ring_each(plan)
    meeting = meetings(plan)
    gathered_alone(plan, meeting)
    acyclic_order(plan, meeting)
    same_index_under_pp(plan, meeting)
    aligned_as_promised(plan, meeting)
    no_rank_without_work(plan)


def columns_are_sound(plan: StepPlan) -> None:
    """Shapes, offsets and index ranges, on which all later checks rely."""
    _scalars_are_sound(plan)
    num_microbatches = len(plan.piece_offsets) - 1
    for column, groups, items in (
        ("ring_offsets", plan.num_seqs, len(plan.ring_ranks)),
        ("microbatch_offsets", plan.hdp_size, num_microbatches),
        ("piece_offsets", num_microbatches, len(plan.piece_seqs)),
    ):
        offsets = getattr(plan, column)
        sound = len(offsets) == groups + 1 and offsets[0] == 0 and offsets[-1] == items
        if not (sound and bool((np.diff(offsets) >= 0).all())):
            raise ValueError(
                f"columns_are_sound: {column} must rise from 0 to {items} in {groups} steps"
            )
    if len(plan.offload_ratio) != num_microbatches:
        raise ValueError(
            f"columns_are_sound: {len(plan.offload_ratio)} offload ratios "
            f"for {num_microbatches} microbatches"
        )
    if len(plan.gathered) != plan.num_seqs:
        raise ValueError(
            f"columns_are_sound: {len(plan.gathered)} values of gathered "
            f"for {plan.num_seqs} sequences"
        )
    for column, low, high in (
        ("seqlens", 1, MOST_TOKENS),
        ("ring_ranks", 0, plan.hdp_size - 1),
        ("piece_seqs", 0, plan.num_seqs - 1),
        ("offload_ratio", 0.0, 1.0),
    ):
        values = getattr(plan, column)
        bad = np.flatnonzero(~((values >= low) & (values <= high)))
        if len(bad):
            raise ValueError(
                f"columns_are_sound: {column}[{bad[0]}] is {values[bad[0]]}, not in [{low}, {high}]"
            )


def _scalars_are_sound(plan: StepPlan) -> None:
    scalars = (plan.hdp_size, plan.max_tokens_per_rank, plan.pp_size)
    if not all(_is_positive(x) for x in scalars):
        raise ValueError(
            f"columns_are_sound: hdp_size, max_tokens_per_rank, pp_size = {scalars}; "
            "each must be an integer >= 1"
        )
    for name, most in (
        ("hdp_size", MOST_RANKS),
        ("max_tokens_per_rank", MOST_TOKENS),
        ("pp_size", MOST_STAGES),
    ):
        if getattr(plan, name) > most:
            raise ValueError(
                f"columns_are_sound: {name}={shown(getattr(plan, name))} must be at most {most}"
            )
    if plan.ranks_per_node is not None and not _is_positive(plan.ranks_per_node):
        raise ValueError(
            f"columns_are_sound: ranks_per_node={plan.ranks_per_node!r} must be an integer >= 1"
        )
    if plan.ranks_per_node is not None and plan.ranks_per_node > MOST_RANKS:
        node = shown(plan.ranks_per_node)
        raise ValueError(f"columns_are_sound: ranks_per_node={node} must be at most {MOST_RANKS}")
    for name in ("offloadable", "predicted_s", "lower_bound_s"):
        if not isinstance(getattr(plan, name), (int, float, np.integer, np.floating)):
            raise ValueError(f"columns_are_sound: {name}={getattr(plan, name)!r} must be a number")
    for name in ("predicted_s", "lower_bound_s"):
        if math.isinf(getattr(plan, name)):
            raise ValueError(
                f"columns_are_sound: {name}={getattr(plan, name)} must be finite; NaN: unknown"
            )
    if not isinstance(plan.aligned, bool):
        raise ValueError(f"columns_are_sound: aligned={shown(plan.aligned)} must be True or False")
    if not isinstance(plan.policy, str) or not isinstance(plan.notes, dict):
        raise ValueError(
            f"columns_are_sound: policy={shown(plan.policy)} must be text and "
            f"notes={shown(plan.notes)} a dict"
        )
    if not 0 <= plan.offloadable < 1:
        raise ValueError(f"columns_are_sound: offloadable={plan.offloadable} is not in [0, 1)")


def _is_positive(value: object) -> bool:
    is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    return is_integer and int(value) >= 1  # type: ignore[call-overload]


def every_token_once(plan: StepPlan) -> None:
    """Each sequence sits once on each rank of its ring and nowhere else."""

    def refuse(keys: np.ndarray, problem: str) -> None:
        if len(keys):
            seq, rank = divmod(int(keys[0]), plan.hdp_size)
            raise ValueError(f"every_token_once: sequence {seq} on rank {rank} is {problem}")

    alone = np.flatnonzero(plan.degrees == 0)
    if len(alone):
        raise ValueError(f"every_token_once: sequence {alone[0]} has no rank")
    owner = np.repeat(np.arange(plan.num_seqs), plan.degrees)
    ring_keys = np.sort(owner * plan.hdp_size + plan.ring_ranks)
    refuse(ring_keys[1:][ring_keys[1:] == ring_keys[:-1]], "twice in its ring")
    piece_ranks = np.repeat(plan.microbatch_ranks, np.diff(plan.piece_offsets))
    piece_keys = np.sort(plan.piece_seqs.astype(np.int64) * plan.hdp_size + piece_ranks)
    if len(piece_keys) == len(ring_keys) and bool((piece_keys == ring_keys).all()):
        return
    refuse(piece_keys[1:][piece_keys[1:] == piece_keys[:-1]], "in more than one place")
    refuse(np.setdiff1d(piece_keys, ring_keys), "in a microbatch but not in its ring")
    refuse(np.setdiff1d(ring_keys, piece_keys), "in its ring but in no microbatch")


def capacity_kept(plan: StepPlan) -> None:
    """Tokens of a (rank, microbatch), minus the offloaded ones, are <= max_tokens_per_rank."""
    resident = plan.microbatch_tokens * (1.0 - plan.offload_ratio * plan.offloadable)
    over = np.flatnonzero(resident > plan.max_tokens_per_rank + _SLACK_TOKENS)
    if len(over):
        m = int(over[0])
        raise ValueError(
            f"capacity_kept: {_name(plan, m)} holds {plan.microbatch_tokens[m]} tokens "
            f"with offload ratio {plan.offload_ratio[m]:.3f}, "
            f"max_tokens_per_rank={plan.max_tokens_per_rank}"
        )


def one_ring_each(plan: StepPlan) -> None:
    """Multi-rank pieces come first, share one ring, and are the same on all ranks of the ring."""
    wide = plan.degrees[plan.piece_seqs] > 1
    owner = np.repeat(np.arange(len(plan.offload_ratio)), np.diff(plan.piece_offsets))
    late = np.flatnonzero(wide[1:] & ~wide[:-1] & (owner[1:] == owner[:-1]))
    if len(late):
        raise ValueError(
            f"one_ring_each: {_name(plan, owner[late[0]])} has a local piece before a ring piece"
        )
    if int(np.bincount(owner[wide], minlength=1).max()) <= 1:
        return  # one multi-rank piece each: every_token_once has shown the rest
    # A list is named by its first sequence. Each sequence keeps one name and one place in it, and
    # has the ring of the first: so all ranks of a ring hold the same list.
    at = np.flatnonzero(wide)
    starts = np.ones(len(at), dtype=bool)
    starts[1:] = owner[at[1:]] != owner[at[:-1]]
    begin = np.flatnonzero(starts)
    which = np.cumsum(starts) - 1
    leader, place = plan.piece_seqs[at[begin]][which], np.arange(len(at)) - begin[which]
    seqs = plan.piece_seqs[at]
    own, own_leader, own_place = (np.zeros(plan.num_seqs, dtype=np.int64) for _ in range(3))
    own[seqs], own_leader[seqs], own_place[seqs] = np.arange(len(at)), leader, place
    moved = np.flatnonzero((own_leader[seqs] != leader) | (own_place[seqs] != place))
    if len(moved):
        here, there = at[moved[0]], at[own[seqs[moved[0]]]]
        raise ValueError(
            f"one_ring_each: {_name(plan, owner[here])} holds {_on_ring(plan, owner[here])} on its "
            f"ring, another rank of that ring holds {_on_ring(plan, owner[there])}"
        )
    _same_rings(plan, own_leader, np.unique(seqs))


def _same_rings(plan: StepPlan, leader: np.ndarray, seqs: np.ndarray) -> None:
    """Each of these sequences has the ring of its `leader`, in the same order."""
    others = seqs[leader[seqs] != seqs]
    same = plan.degrees[others] == plan.degrees[leader[others]]
    alike = others[same]
    count = plan.degrees[alike]
    along = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
    own, first = (np.repeat(plan.ring_offsets[s], count) + along for s in (alike, leader[alike]))
    differs = np.repeat(alike, count)[plan.ring_ranks[own] != plan.ring_ranks[first]]
    bad = np.concatenate([others[~same], differs])
    if len(bad):
        pair = (int(leader[bad[0]]), int(bad[0]))
        raise ValueError(f"one_ring_each: sequences {pair} share a microbatch but not a ring")


def _on_ring(plan: StepPlan, m: int) -> tuple[int, ...]:
    seqs = plan.piece_seqs[plan.piece_offsets[m] : plan.piece_offsets[m + 1]]
    return tuple(seqs[plan.degrees[seqs] > 1].tolist())


def gathered_alone(plan: StepPlan, meeting: np.ndarray) -> None:
    """A gathered sequence is on several ranks, and alone on its ring (local ones aside).

    Whether gathering pays, fits in memory and stays inside a node is the planner's concern.
    """
    if not plan.gathered.any():
        return
    local = np.flatnonzero(plan.gathered & (plan.degrees == 1))
    if len(local):
        raise ValueError(
            f"gathered_alone: sequence {local[0]} is gathered, but on one rank; "
            "only rings of two or more can be"
        )
    # one_ring_each has shown that a meeting has the same sequences on all of its ranks.
    seqs = plan.piece_seqs
    of_piece = np.repeat(meeting, np.diff(plan.piece_offsets))
    others = np.flatnonzero((plan.degrees[seqs] > 1) & (seqs != of_piece))
    bad = others[plan.gathered[seqs[others]] | plan.gathered[of_piece[others]]]
    if len(bad):
        first, other = int(of_piece[bad[0]]), int(seqs[bad[0]])
        raise ValueError(
            f"gathered_alone: sequences {first} and {other} share a ring, "
            "and one of them is gathered; gather only rings of a single sequence"
        )


def acyclic_order(plan: StepPlan, meeting: np.ndarray) -> None:
    """Walk all ranks at once: a meeting ends when all ranks of its ring are there."""
    shared = np.flatnonzero(meeting >= 0)
    ranks = plan.microbatch_ranks[shared]
    offsets = np.searchsorted(ranks, np.arange(plan.hdp_size + 1))
    _, end = walk(offsets, meeting[shared], np.zeros(len(shared)))
    waiting = stuck(offsets, end)[:8]
    if len(waiting):
        where = zip(ranks[waiting].tolist(), meeting[shared[waiting]].tolist(), strict=True)
        raise ValueError(
            "acyclic_order: deadlock: "
            + "; ".join(f"rank {rank} waits in sequence {seq}" for rank, seq in where)
        )


def same_index_under_pp(plan: StepPlan, meeting: np.ndarray) -> None:
    """With pp_size > 1 a shared microbatch has the same local index on all ranks of its ring."""
    if plan.pp_size > 1:
        _same_index(plan, meeting, "same_index_under_pp", f"pp_size={plan.pp_size}")


def aligned_as_promised(plan: StepPlan, meeting: np.ndarray) -> None:
    """With `aligned`, all ranks have equally many microbatches, and rings one index on all ranks.

    Ranks that meet in every layer (experts, weights) then meet in the same microbatch.
    """
    if not plan.aligned:
        return
    counts = plan.num_microbatches
    if int(counts.min()) != int(counts.max()):
        few, many = int(counts.argmin()), int(counts.argmax())
        raise ValueError(
            f"aligned_as_promised: rank {few} has {counts[few]} microbatches and rank {many} has "
            f"{counts[many]}; add empty ones, or make the plan without aligned"
        )
    _same_index(plan, meeting, "aligned_as_promised", "and the plan is aligned")


def _same_index(plan: StepPlan, meeting: np.ndarray, invariant: str, why: str) -> None:
    """Raise unless every shared microbatch has one local index on all ranks of its ring."""
    index = np.arange(len(meeting)) - plan.microbatch_offsets[plan.microbatch_ranks]
    shared = np.flatnonzero(meeting >= 0)
    low = np.full(plan.num_seqs, np.iinfo(np.int64).max)
    high = np.full(plan.num_seqs, -1)
    np.minimum.at(low, meeting[shared], index[shared])
    np.maximum.at(high, meeting[shared], index[shared])
    bad = np.flatnonzero((high >= 0) & (low != high))
    if len(bad):
        raise ValueError(
            f"{invariant}: sequence {bad[0]} is in microbatch {low[bad[0]]} of one rank "
            f"and {high[bad[0]]} of another, {why}"
        )


def no_rank_without_work(plan: StepPlan) -> None:
    """Every rank has at least one microbatch (it may be empty)."""
    idle = np.flatnonzero(plan.num_microbatches == 0)
    if len(idle):
        raise ValueError(
            f"no_rank_without_work: rank {idle[0]} has no microbatch; give it an empty one"
        )


def _name(plan: StepPlan, m: int) -> str:
    rank = int(plan.microbatch_ranks[m])
    return f"rank {rank} microbatch {int(m) - int(plan.microbatch_offsets[rank])}"
