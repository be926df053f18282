"""Zigzag chunks: how a sequence is split over the ranks of its ring.

A causal sequence on `degree` ranks is split into `2 * degree` chunks, and rank k of the ring holds
chunks k and 2 * degree - 1 - k (ByteScale section 7, Fig. 14). Early chunks see few keys and late
chunks see many, so the pair evens out: in every ring step all ranks have the same attention work.

Lengths need not be divisible: the first `seqlen % (2 * degree)` chunks are one token longer. Three
facts follow, each with a test of the same name in tests/scheduler/test_zigzag.py.

* chunks_cover_once      chunks are contiguous and cover [0, seqlen) once, in order
* fullest_rank_is_ceil   the fullest rank holds exactly ceil(seqlen / degree) tokens, so a capacity
                         check on ceil() is exact; nothing is padded to 2 * degree
* short_is_legal         a sequence shorter than 2 * degree has empty chunks, and a rank may hold
                         none of its tokens
"""

from __future__ import annotations

from typing import Any

import numpy as np


def chunk_bounds(seqlen: int, degree: int) -> list[int]:
    """Boundaries of the 2 * degree chunks: chunk c is tokens [bounds[c], bounds[c + 1])."""
    size, extra = divmod(seqlen, 2 * degree)
    return [c * size + min(c, extra) for c in range(2 * degree + 1)]


def rank_chunks(
    seqlen: int, degree: int, ring_rank: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The two [start, stop) token spans of ring position `ring_rank`, the early one first."""
    size, extra = divmod(seqlen, 2 * degree)

    def bound(c: int) -> int:
        return c * size + min(c, extra)

    late = 2 * degree - 1 - ring_rank
    return (bound(ring_rank), bound(ring_rank + 1)), (bound(late), bound(late + 1))


def rank_tokens(seqlen: Any, degree: Any, ring_rank: Any) -> np.ndarray:
    """Tokens of a sequence at ring position `ring_rank`, int64.

    Takes integers or broadcastable integer arrays. Equals the length of the spans of `rank_chunks`.
    """
    seqlen, degree, ring_rank = np.asarray(seqlen), np.asarray(degree), np.asarray(ring_rank)
    size, extra = np.divmod(seqlen, 2 * degree)
    late = 2 * degree - 1 - ring_rank
    return 2 * size + (ring_rank < extra) + (late < extra)
