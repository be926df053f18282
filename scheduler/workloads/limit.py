"""Maximum length: what to do with longer sequences."""

from __future__ import annotations

import numpy as np

OVERLONG = ("error", "drop", "truncate", "split")


def limit_lengths(
    seqlens: np.ndarray, max_length: int | None, overlong: str = "truncate"
) -> np.ndarray:
    """Limit lengths to `max_length`. `overlong` says what to do with longer ones: raise an "error",
    "drop", "truncate" or "split" them."""
    if overlong not in OVERLONG:
        raise ValueError(f"overlong must be one of {', '.join(OVERLONG)}, not {overlong!r}")
    if max_length is None:
        return seqlens
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, not {max_length}")
    too_long = seqlens > max_length
    if not too_long.any():
        return seqlens
    if overlong == "error":
        raise ValueError(
            f"{int(too_long.sum())} sequences are longer than max_length={max_length} "
            f"(longest: {int(seqlens.max())}); raise it, or drop, truncate or split them"
        )
    if overlong == "drop":
        return seqlens[~too_long]
    if overlong == "truncate":
        return np.minimum(seqlens, max_length)
    full, rest = np.divmod(seqlens, max_length)
    counts = full + (rest > 0)
    pieces = np.full(int(counts.sum()), max_length, dtype=np.int64)
    last = np.cumsum(counts) - 1
    pieces[last[rest > 0]] = rest[rest > 0]
    return pieces
