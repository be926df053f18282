"""Curves: rows of metrics as series of bounded length.

A run of 100,000 steps is drawn in a thousand pixels. Steps are put in bins of equal width; each
keeps the mean and the range of its values, so that a single spike is still seen. A run of up to
`MOST_POINTS` steps keeps every value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

MOST_POINTS = 600
MOST_COLUMNS = 120  # of the map of idle time


def number(value: Any) -> float:
    """A finite float, or NaN for anything else: rows may hold anything."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    try:
        return float(value) if math.isfinite(value) else math.nan
    except OverflowError:
        return math.nan


def column(rows: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    """(num_rows,) float64: one value of each row, NaN where there is none."""
    return np.array([number(row.get(name)) for row in rows], dtype=np.float64)


def series(name: str, steps: np.ndarray, values: np.ndarray, *, scale: float = 1.0) -> dict | None:
    """A curve for the page: x, y and, where values were merged, low and high. None without values.

    steps: (n,) ascending. values: (n,), NaN where unknown.
    """
    values = values * scale  # 1e308 as a percentage is a gap too
    known = np.isfinite(values)
    if not known.any():
        return None
    x, y = steps[known], values[known]
    if len(x) <= MOST_POINTS:
        return {"name": name, "x": _plain(x), "y": _plain(y)}
    bins = _bins(x, MOST_POINTS)
    starts = np.flatnonzero(np.r_[True, np.diff(bins) > 0])
    counts = np.diff(np.r_[starts, len(x)])
    return {
        "name": name,
        "x": _plain(x[np.r_[starts[1:], len(x)] - 1]),
        "y": _plain(np.add.reduceat(y / np.repeat(counts, counts), starts)),  # no overflow
        "low": _plain(np.minimum.reduceat(y, starts)),
        "high": _plain(np.maximum.reduceat(y, starts)),
    }


def chart(
    title: str, lines: Sequence[dict | None], *, unit: str = "", note: str = ""
) -> dict | None:
    """A chart of the curves that exist; None if none does.

    Values that differ by orders of magnitude, as gradient norms with a spike do, get a logarithmic
    axis.
    """
    drawn = [line for line in lines if line]
    if not drawn:
        return None
    values = np.array([y for line in drawn for y in line.get("high", line["y"])])
    is_log = unit == "" and (values > 0).all() and values.max() > 50 * np.median(values)
    return {"title": title, "unit": unit, "note": note, "log": bool(is_log), "series": drawn}


def idle_map(rows: Sequence[dict[str, Any]]) -> dict | None:
    """Idle shares as columns of steps by rows of ranks; None if the run recorded none.

    A run that was resumed on another number of ranks shows the last one.
    """
    shares = [_shares(row) for row in rows]
    size = next((len(share) for share in reversed(shares) if share), 0)
    kept = [
        (row["step"], row, share)
        for row, share in zip(rows, shares, strict=True)
        if share and len(share) == size
    ]
    if not kept:
        return None
    steps = np.array([step for step, _, _ in kept], dtype=np.float64)
    table = np.array([share for _, _, share in kept])
    bins = _bins(steps, MOST_COLUMNS) if len(steps) > MOST_COLUMNS else np.arange(len(steps))
    starts = np.flatnonzero(np.r_[True, np.diff(bins) > 0])
    ends = np.r_[starts[1:], len(steps)]
    means = np.add.reduceat(table, starts, axis=0) / (ends - starts)[:, None]
    ranks = number(kept[-1][1].get("hdp_size"))
    block = max(1, math.ceil(ranks / size)) if math.isfinite(ranks) else 1
    return {
        "first": _plain(steps[starts]),
        "last": _plain(steps[ends - 1]),
        "share": [[round(value, 4) for value in line] for line in means.tolist()],
        "block": block,  # ranks per row
        "ranks": int(ranks) if math.isfinite(ranks) else size,
        "mean": [round(value, 4) for value in table.mean(axis=0).tolist()],
    }


def _shares(row: dict[str, Any]) -> list[float]:
    """The idle shares of a row, [] if they are missing or damaged."""
    idle = row.get("idle")
    if not isinstance(idle, list) or len(idle) > 1024:
        return []
    shares = [number(value) for value in idle]
    return shares if all(0 <= share <= 1 for share in shares) else []


def _bins(steps: np.ndarray, most: int) -> np.ndarray:
    """(n,) int64, ascending: the bin of each step, `most` of equal width."""
    first, last = steps[0], steps[-1]
    return np.minimum((steps - first) / (last - first + 1) * most, most - 1).astype(np.int64)


def _plain(values: np.ndarray) -> list[float]:
    """Numbers for JSON, short: six digits, integers exact."""
    return [
        int(value) if abs(value) < 2**53 and value == int(value) else float(f"{value:.6g}")
        for value in values.tolist()
    ]
