"""RingLayout: the blocks of all ranks together are exactly the causal pairs, each once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hdp.attention.layout import RingLayout, Rows
from hdp.scheduler import StepPlan
from tests.random_plans import random_plan

LAYOUTS = st.tuples(
    st.integers(2, 7),
    st.lists(st.integers(1, 40), min_size=1, max_size=3),
    st.lists(st.integers(1, 9), max_size=3),
)


def _positions(layout):
    """(sequence, position) of each row."""
    return [(i, p) for i, start, stop in layout.spans() for p in range(start, stop)]


def _pairs(segments, q_rows, k_rows):
    """(q, k) row pairs that one varlen call computes."""
    cu_q, cu_k = segments.cu_seqlens_q, segments.cu_seqlens_k
    for i in range(len(segments.seqlens_q)):
        for a in range(cu_q[i], cu_q[i + 1]):
            for b in range(cu_k[i], cu_k[i + 1]):
                if not segments.causal or b - cu_k[i] <= a - cu_q[i]:
                    yield q_rows[a], k_rows[b]


@given(LAYOUTS)
def test_blocks_are_the_causal_pairs_each_once(case):
    size, ring_seqlens, local_seqlens = case
    layouts = [
        RingLayout(
            ring=tuple(range(10, 10 + size)),
            ring_rank=rank,
            ring_seqlens=tuple(ring_seqlens),
            local_seqlens=tuple(local_seqlens) if rank == 0 else (),
        )
        for rank in range(size)
    ]
    rows = [_positions(layout) for layout in layouts]
    met = []
    for rank, layout in enumerate(layouts):
        assert layout.total_tokens == len(rows[rank])
        met += _pairs(layout.first, rows[rank], rows[rank])
        assert [step.source for step in layout.steps] == [(rank - s) % size for s in range(1, size)]
        for step in layout.steps:
            assert layout.ring_tokens_at(step.source) == layouts[step.source].num_ring_tokens
            ours = step.q_rows.take(torch.arange(layout.num_ring_tokens))
            theirs = step.k_rows.take(torch.arange(layout.ring_tokens_at(step.source)))
            met += _pairs(
                step.segments,
                [rows[rank][i] for i in ours.tolist()],
                [rows[step.source][i] for i in theirs.tolist()],
            )
    lengths = ring_seqlens + local_seqlens
    expected = [
        ((i, q), (i, k)) for i, n in enumerate(lengths) for q in range(n) for k in range(q + 1)
    ]
    assert sorted(met) == expected


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.integers(1, 6), st.integers(0, 99))
def test_layouts_of_a_plan_cover_every_token_once(seqlens, hdp_size, seed):
    plan: StepPlan = random_plan(seqlens, hdp_size, seed)
    seen = []
    for rank in range(hdp_size):
        for microbatch in plan.microbatches(rank):
            layout = RingLayout.from_microbatch(microbatch, rank)
            assert layout.total_tokens == microbatch.num_tokens(rank)
            for i, start, stop in layout.spans():
                seen += [(microbatch.pieces[i].seq, p) for p in range(start, stop)]
    assert sorted(seen) == [(i, p) for i, n in enumerate(seqlens) for p in range(n)]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=6))
def test_rows_take_add(gaps_and_sizes):
    spans, at = [], 0
    for gap, size in gaps_and_sizes:
        spans.append((at + gap, at + gap + size))
        at += gap + size
    rows = Rows(spans)
    index = [i for start, stop in spans for i in range(start, stop)]
    assert rows.num_rows == len(index)
    if not index:
        return
    x = torch.randn(at + 2, 3)
    assert torch.equal(rows.take(x), x[index])
    assert torch.equal(rows.take(x.T, dim=1), x.T[:, index])
    values = torch.randn(len(index), 3)
    added, expected = x.clone(), x.clone()
    rows.add_(added, values)
    expected[index] += values
    assert torch.equal(added, expected)


def test_invalid_layouts_are_refused():
    with pytest.raises(ValueError, match="two or more"):
        RingLayout(ring=(3,), ring_seqlens=(5,))
    with pytest.raises(ValueError, match="at least one sequence"):
        RingLayout(ring=(3, 4))
    with pytest.raises(ValueError, match="not a position"):
        RingLayout(ring=(3, 4), ring_rank=2, ring_seqlens=(5,))
    with pytest.raises(ValueError, match="length of 1 or more"):
        RingLayout(local_seqlens=(0,))
