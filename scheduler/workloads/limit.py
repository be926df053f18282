"""Maximum length: what to do with longer sequences."""

from __future__ import annotations

import numpy as np

from hdp.scheduler.plain import item, whole

MOST_SEQUENCES = 2**26  # of a workload: half a gigabyte of lengths
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
    max_length = counted("max_length", max_length, most=2**53)
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
    if float(counts.sum(dtype=np.float64)) > MOST_SEQUENCES:
        raise ValueError(
            f"max_length={max_length} splits {len(seqlens)} sequences into more than "
            f"{MOST_SEQUENCES}; raise it"
        )
    pieces = np.full(int(counts.sum()), max_length, dtype=np.int64)
    last = np.cumsum(counts) - 1
    pieces[last[rest > 0]] = rest[rest > 0]
    return pieces


def counted(name: str, value: int, *, low: int = 1, most: int | None = None) -> int:
    """`value` as an int in [low, most]. Raises ValueError for anything else."""
    number = item(value)
    if isinstance(number, int) and not isinstance(number, bool) and number < low:
        raise ValueError(f"{name} must be at least {low}, not {number}")
    return whole(name, number, low=low, most=most)
