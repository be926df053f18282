"""The three facts of zigzag.py, and that its functions agree with each other."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hdp.scheduler.zigzag import chunk_bounds, rank_chunks, rank_tokens

lengths, degrees = st.integers(0, 10_000), st.integers(1, 64)


@given(lengths, degrees)
def test_chunks_cover_once(seqlen: int, degree: int) -> None:
    bounds = chunk_bounds(seqlen, degree)
    assert bounds[0] == 0 and bounds[-1] == seqlen and len(bounds) == 2 * degree + 1
    assert bounds == sorted(bounds)
    spans = sorted(span for k in range(degree) for span in rank_chunks(seqlen, degree, k))
    assert spans == sorted(pairwise(bounds))


@given(lengths, degrees)
def test_fullest_rank_is_ceil(seqlen: int, degree: int) -> None:
    tokens = rank_tokens(seqlen, degree, np.arange(degree))
    assert tokens.sum() == seqlen
    assert tokens.max() == -(-seqlen // degree)
    assert tokens.max() - tokens.min() <= 2


@given(degrees)
def test_short_is_legal(degree: int) -> None:
    for seqlen in range(1, 2 * degree):
        held = [sum(stop - start for start, stop in rank_chunks(seqlen, degree, k))
                for k in range(degree)]  # fmt: skip
        assert sum(held) == seqlen and min(held) >= 0


@given(lengths, degrees)
def test_rank_tokens_is_length_of_chunks(seqlen: int, degree: int) -> None:
    for k in range(degree):
        (a, b), (c, d) = rank_chunks(seqlen, degree, k)
        assert rank_tokens(seqlen, degree, k) == b - a + d - c
        assert b <= c or (b - a) * (d - c) == 0  # the early chunk comes first


def test_zigzag_evens_out_attention_work() -> None:
    """Pairs of (query, key) of each rank against all keys: equal where chunks are equal."""
    degree, size = 8, 16
    work = []
    for k in range(degree):
        spans = rank_chunks(2 * degree * size, degree, k)
        work.append(sum(q + 1 for start, stop in spans for q in range(start, stop)))
    assert len(set(work)) == 1
