"""Draw the report of a measured cost model: its predictions and their errors.

    hdp profile --redraw cost.json --plot cost.png

    top left      microbatches of one long sequence: measured (dots) and predicted (lines)
    top right     one layer's attention alone: speed by shard size, relative to the fastest
    bottom left   error of every microbatch: filled dots were fitted, hollow ones only predicted
    bottom right  links: rate by message size

Panels without measurements are left out: a single rank has no P2P, for example.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hdp.scheduler import CostModel
from hdp.scheduler.render.figure import FORMATS, figure_class
from hdp.scheduler.render.text import tokens_text

GOAL = 0.08  # predictions should have errors below this
ATTENTION_FIELDS = ("quadratic_s", "small_shard_tokens", "linear_s", "ring_step_s")

_INK, _SOFT, _GRID, _BAND = "#202124", "#5f6368", "#e8eaed", "#e6f4ea"
_COLORS = ("#d1495b", "#00798c", "#edae49", "#30638e", "#7a4b94", "#3f9b57", "#e07a3f", "#8d6e63")


def check_drawable(path: str | Path) -> None:
    """Raise ValueError if `path` cannot be drawn: unknown suffix, or matplotlib is missing."""
    if Path(path).suffix.lower() not in FORMATS:
        raise ValueError(f"cannot draw to {path}: use one of {', '.join(FORMATS)}")
    figure_class()


def draw_profile(cost: CostModel, report: dict[str, Any], path: str | Path) -> None:
    """Draw a `report` written by hdp/profile/report.py to `path` (.png, .svg or .pdf).

    Raises ValueError for any other suffix, or a report with nothing to draw.
    """
    check_drawable(path)
    steps = report.get("microbatches", [])
    attention = [row for row in report.get("kernels", []) if row["kind"] == "ring"]
    links = report.get("links", [])
    parts: list[Callable[[Any], None]] = []
    if steps:
        parts.append(lambda axes: _draw_times(axes, cost, steps))
    if attention and report.get("attention_of_one_layer"):
        parts.append(lambda axes: _draw_attention(axes, report, attention))
    if steps:
        parts.append(lambda axes: _draw_errors(axes, steps))
    if links:
        parts.append(lambda axes: _draw_links(axes, links))
    if not parts:
        raise ValueError(
            f"cost model {cost.name!r} has no measurements to draw: use a file from `hdp profile`"
        )
    rows = -(-len(parts) // 2)
    figure = figure_class()(figsize=(11, 0.95 + 3.7 * rows), dpi=160, facecolor="white")
    figure.text(0.065, 1 - 0.16 / figure.get_figheight(), cost.name, ha="left", va="top",
                fontsize=13, fontweight="bold", color=_INK)  # fmt: skip
    known = report.get("provenance", {})
    words = {
        "machine": "",
        "torch": "torch ",
        "attention": "",
        "date": "",
        "hdp": "hdp ",
        "commit": "commit ",
    }
    facts = [f"{word}{known[name]}" for name, word in words.items() if name in known]
    figure.text(0.065, 1 - 0.44 / figure.get_figheight(), ",  ".join(facts), ha="left", va="top",
                fontsize=9, color=_SOFT)  # fmt: skip
    grid = figure.add_gridspec(
        rows, 2, left=0.065, right=0.985, top=1 - 1.05 / figure.get_figheight(),
        bottom=0.55 / figure.get_figheight(), hspace=0.42, wspace=0.17,
    )  # fmt: skip
    for i, part in enumerate(parts):
        axes = figure.add_subplot(grid[i // 2, i % 2])
        part(axes)
        _finish(axes)
    figure.savefig(path)


# ---- panels ----


def _draw_times(axes: Any, cost: CostModel, steps: Sequence[dict[str, Any]]) -> None:
    long = [row for row in steps if len(row["lengths"]) == 1]
    for degree, color in _by_degree(long):
        mine = [row for row in long if row["degree"] == degree]
        lengths = np.array([row["lengths"][0] for row in mine], dtype=float)
        x = np.geomspace(lengths.min() * 0.85, lengths.max() * 1.18, 60)
        model = cost.piece_s(x, degree, mine[0]["across_nodes"]) + cost.fixed_s
        axes.plot(x, model, color=color, linewidth=1.3, label=_ranks(degree))
        for fitted in (True, False):
            _dots(axes, [(r["lengths"][0], r["measured_s"]) for r in mine if r["fitted"] == fitted],
                  color, fitted)  # fmt: skip
    axes.set(xscale="log", yscale="log")
    _tokens_axis(axes)
    axes.set_title("one long sequence: seconds of its microbatch", loc="left")
    axes.set_xlabel("tokens of the sequence")
    axes.legend(frameon=False, fontsize=8.5, loc="upper left", labelcolor=_SOFT)


def _draw_attention(axes: Any, report: dict[str, Any], attention: Sequence[dict[str, Any]]) -> None:
    """Work per second, tokens^2 / degree / seconds; 1 is the model's limit for long shards."""
    known = {name: report["attention_of_one_layer"][name] for name in ATTENTION_FIELDS}
    model = CostModel.from_coefficients(**known)
    for degree, color in _by_degree(attention):
        mine = [row for row in attention if row["degree"] == degree]
        shard = np.array([row["seqlen"] / degree for row in mine])
        seconds = np.array([row["seconds"] for row in mine])
        best_s = model.quadratic_s * degree
        axes.plot(shard, best_s * shard**2 / seconds, "o", color=color, markersize=6,
                  label=_ranks(degree), zorder=3)  # fmt: skip
        x = np.geomspace(shard.min() * 0.85, shard.max() * 1.18, 60)
        seconds = model.compute_s(x * degree, degree)
        axes.plot(x, best_s * x**2 / seconds, color=color, linewidth=1.3)
    axes.set(xscale="log", ylim=(0, None))
    _tokens_axis(axes)
    axes.set_title("attention of one layer, forward + backward: relative speed", loc="left")
    axes.set_xlabel("tokens of one rank's shard")
    axes.legend(frameon=False, fontsize=8.5, loc="lower right", labelcolor=_SOFT)


def _draw_errors(axes: Any, steps: Sequence[dict[str, Any]]) -> None:
    axes.axhspan(-100 * GOAL, 100 * GOAL, color=_BAND, linewidth=0, zorder=0)
    axes.axhline(0, color=_SOFT, linewidth=0.8, zorder=1)
    for degree, color in _by_degree(steps):
        for fitted in (True, False):
            mine = [row for row in steps if row["degree"] == degree and row["fitted"] == fitted]
            _dots(axes, [(max(r["lengths"]), 100 * r["error"]) for r in mine], color, fitted)
    worst = max(100 * GOAL * 1.5, *(100 * abs(row["error"]) * 1.4 for row in steps))
    axes.set(xscale="log", ylim=(-worst, worst))
    _tokens_axis(axes)
    axes.set_title(f"error of the model, % (shaded: up to {100 * GOAL:.0f})", loc="left")
    axes.set_xlabel("tokens of the longest sequence")
    _dots(axes, [], _SOFT, True, label="fitted")
    _dots(axes, [], _SOFT, False, label="only predicted")
    axes.legend(frameon=False, fontsize=8.5, loc="upper left", ncols=2, labelcolor=_SOFT)


def _draw_links(axes: Any, links: Sequence[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(_link_name(row) for row in links))
    most = max(row["bytes"] for row in links)
    for name, color in zip(names, _COLORS * len(names), strict=False):
        mine = [row for row in links if _link_name(row) == name]
        rates = [row["bytes_per_s"] / 1e9 for row in mine]
        axes.plot([row["bytes"] for row in mine], rates, "o-", color=color, markersize=4,
                  linewidth=1.3)  # fmt: skip
    axes.set(xscale="log", yscale="log", xlim=(None, most * 60))
    _label_ends(axes, links, names, most)
    ticks = sorted({row["bytes"] for row in links})
    axes.set_xticks(ticks, [_bytes_text(n) for n in ticks])
    axes.set_xticks([], minor=True)
    axes.set_title("links: GB/s of one rank, one direction", loc="left")
    axes.set_xlabel("bytes of a message")


def _label_ends(axes: Any, links: Sequence[dict[str, Any]], names: list[str], most: int) -> None:
    """Write names next to the last points, pushed apart where they would overlap (log scale)."""
    ends = []
    for name, color in zip(names, _COLORS * len(names), strict=False):
        last = [row for row in links if _link_name(row) == name][-1]
        ends.append((np.log10(last["bytes_per_s"] / 1e9), name, color))
    ends.sort()
    rates = [np.log10(row["bytes_per_s"] / 1e9) for row in links]
    gap = max((max(rates) - min(rates)) / 16, 1e-3)
    places = np.array([rate for rate, _, _ in ends])
    for _ in range(100):  # neighbors that are too close push each other apart
        lack = np.maximum(gap - np.diff(places), 0) / 2
        places[:-1] -= lack
        places[1:] += lack
    low, high = axes.get_ylim()
    axes.set_ylim(low, max(high, 10 ** (places[-1] + gap)))
    for place, (_, name, color) in zip(places, ends, strict=True):
        axes.text(most * 1.5, 10**place, name, color=color, fontsize=8, va="center")


# ---- shared helpers ----


def _by_degree(rows: Sequence[dict[str, Any]]) -> list[tuple[int, str]]:
    degrees = sorted({row["degree"] for row in rows})
    return list(zip(degrees, _COLORS * len(degrees), strict=False))


def _dots(
    axes: Any,
    points: Sequence[tuple[float, float]],
    color: str,
    filled: bool,
    label: str | None = None,
) -> None:
    axes.plot([x for x, _ in points], [y for _, y in points], "o", markersize=6, label=label,
              markerfacecolor=color if filled else "white", markeredgecolor=color,
              markeredgewidth=1.4, zorder=3, linestyle="none")  # fmt: skip


def _tokens_axis(axes: Any) -> None:
    low, high = axes.get_xlim()
    ticks = [2**n for n in range(30) if low <= 2**n <= high]
    ticks = ticks[:: -(-len(ticks) // 8)] if ticks else []
    axes.set_xticks(ticks, [tokens_text(n) for n in ticks])
    axes.set_xticks([], minor=True)


def _log_axis(axes: Any) -> None:
    """Tick at 1, 2 and 5 of each decade if that gives few ticks, else at 1; no 6 x 10^-1."""
    low, high = axes.get_ylim()
    decades = [10.0**n for n in range(-9, 10)]
    ticks = [m * ten for ten in decades for m in (1, 2, 5) if low <= m * ten <= high]
    if len(ticks) > 6:
        ticks = [ten for ten in decades if low <= ten <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks([], minor=True)


def _finish(axes: Any) -> None:
    if axes.get_yscale() == "log":
        _log_axis(axes)
    axes.grid(True, color=_GRID, linewidth=0.7, zorder=0)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_SOFT, labelsize=8.5, length=0, which="both")
    axes.xaxis.label.set(color=_SOFT, fontsize=9)
    for name in ("left", "center", "right"):
        axes.set_title(axes.get_title(loc=name), loc=name, fontsize=10.5, color=_INK, pad=8)
    for side in axes.spines.values():
        side.set_visible(False)


def _ranks(degree: int) -> str:
    return "1 rank" if degree == 1 else f"{degree} ranks"


def _link_name(row: dict[str, Any]) -> str:
    return f"{row['link']}, {row['who']}" if "who" in row else str(row["link"])


def _bytes_text(num_bytes: int) -> str:
    power = min(int(np.log2(num_bytes) // 10), 3)
    return f"{num_bytes >> 10 * power}{'BKMG'[power]}"
