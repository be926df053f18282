"""Terminal reports: an aligned table of a plan's numbers, and its timeline as text.

    summary = summarize(plan, cost, timeline)          # numbers, also what --json prints
    print(table([summary]))
    print(ascii_timeline(plan, timeline))

In the text timeline ranks run down and time runs across. A letter is one long sequence (the legend
gives its length and number of ranks), `=` short sequences, `~` exposed communication, `%` exposed
host copies, `+` the gradient reduction, and a blank a waiting rank.
"""

from __future__ import annotations

import shutil
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hdp.scheduler.costs.cost_model import CostModel
from hdp.scheduler.simulation.timeline import Timeline
from hdp.scheduler.step_plan import StepPlan

from .gantt import COMM, COMPUTE, OFFLOAD, REDUCE, Boxes, make_boxes

MAX_LINES = 24
MAX_LEGEND_LINES = 3


def summarize(
    plan: StepPlan, cost: CostModel, timeline: Timeline, *, planning_s: float | None = None
) -> dict[str, Any]:
    """Numbers of one simulated plan; seconds, bytes and shares, JSON-ready."""
    step_s = timeline.makespan_s
    bound_s = plan.lower_bound_s
    busy = timeline.busy_s
    counts = plan.num_microbatches
    degrees, rings = np.unique(plan.degrees, return_counts=True)
    token_steps = kv_token_steps(plan)
    return {
        "policy": plan.policy,
        "step_s": step_s,
        "lower_bound_s": None if bound_s != bound_s else bound_s,
        "gap": None if not bound_s > 0 else step_s / bound_s - 1,
        "bubble": timeline.mean_bubble,
        "busy_s": {
            "min": float(busy.min()),
            "max": float(busy.max()),
            "std": float(busy.std()),
        },
        "exposed_comm": float(timeline.seconds("comm").mean() / step_s) if step_s > 0 else 0.0,
        "exposed_offload": float(timeline.seconds("offload").mean() / step_s) if step_s else 0.0,
        "kv_token_steps": token_steps,
        "sent_bytes": token_steps * cost.kv_bytes_per_token,
        "gathered_rings": int(plan.gathered.sum()),
        "rings_by_degree": dict(zip(degrees.tolist(), rings.tolist(), strict=True)),
        "microbatches_per_rank": {"min": int(counts.min()), "max": int(counts.max())},
        "tokens": int(plan.seqlens.sum()),
        "tokens_per_s": float(plan.seqlens.sum() / step_s) if step_s > 0 else 0.0,
        "planning_s": planning_s,
    }


def kv_token_steps(plan: StepPlan) -> int:
    """Sum over rings of tokens times ring steps: the traffic, in units of one token's KV.

    In a plain ring every block visits every rank; a gathered ring sends three quarters of that.
    """
    quarters = np.where(plan.gathered, 3, 4)
    return int((plan.seqlens * (plan.degrees - 1) * quarters).sum()) // 4


# ---- tables ----


def table(summaries: Sequence[Mapping[str, Any]]) -> str:
    """One column per plan, one row per number; labels left, numbers right."""
    rows: list[list[str]] = [["", *(str(s["policy"]) for s in summaries)]]
    best_s = min(s["step_s"] for s in summaries)

    def row(label: str, cells: Sequence[str]) -> None:
        if any(cell != "-" for cell in cells):
            rows.append([label, *cells])

    row("step time", [seconds_text(s["step_s"]) for s in summaries])
    if len(summaries) > 1:
        row("over the best", [f"{s['step_s'] / best_s:.2f}x" for s in summaries])
    row("lower bound", [seconds_text(s["lower_bound_s"]) for s in summaries])
    row("gap to it", [_percent(s["gap"]) for s in summaries])
    row("bubble", [_percent(s["bubble"]) for s in summaries])
    row("  exposed communication", [_percent(s["exposed_comm"]) for s in summaries])
    if any(s["exposed_offload"] for s in summaries):
        row("  exposed host copies", [_percent(s["exposed_offload"]) for s in summaries])
    row("busy per rank, min", [seconds_text(s["busy_s"]["min"]) for s in summaries])
    row("busy per rank, max", [seconds_text(s["busy_s"]["max"]) for s in summaries])
    row("tokens/s", [f"{s['tokens_per_s']:,.0f}" for s in summaries])
    if any(s["sent_bytes"] for s in summaries) or not any(s["kv_token_steps"] for s in summaries):
        row("sent over rings", [bytes_text(s["sent_bytes"]) for s in summaries])
    else:
        row("KV tokens sent", [f"{s['kv_token_steps']:,}" for s in summaries])
    row("rings, degree x count", [_rings(s["rings_by_degree"]) for s in summaries])
    if any(s["gathered_rings"] for s in summaries):
        row("  of them gathered", [f"{s['gathered_rings']:,}" for s in summaries])
    row("microbatches per rank", [_range(s["microbatches_per_rank"]) for s in summaries])
    row("planning", [seconds_text(s["planning_s"]) for s in summaries])
    return align(rows)


def align(rows: Sequence[Sequence[str]], *, gap: int = 3) -> str:
    """Text table: first column left-aligned, others right-aligned, a rule below the header."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for cells in rows:
        first, *others = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        lines.append((first + "".join(" " * gap + cell for cell in others)).rstrip())
    lines.insert(1, "-" * (sum(widths) + gap * (len(widths) - 1)))
    return "\n".join(lines)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The same rows as a Markdown table."""
    head, *body = ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join([head, "|---" + "|---:" * (len(rows[0]) - 1) + "|", *body])


def seconds_text(value: float | None) -> str:
    """Three digits and a unit; "-" for None."""
    if not value:
        return "-" if value is None else "0 s"
    for size, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if value >= 0.9995 * size or unit == "us":  # 999.7 ms are 1.00 s, not 1,000 ms
            scaled = value / size
            digits = 0 if scaled >= 100 else 1 if scaled >= 10 else 2
            return f"{scaled:,.{digits}f} {unit}"
    raise AssertionError(value)


def bytes_text(value: float) -> str:
    """Three digits and a decimal unit."""
    for size, unit in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"


def tokens_text(tokens: int) -> str:
    """Short text for a number of tokens: 900, 12K, 312K, 2M."""
    for size, letter in ((2**20, "M"), (2**10, "K")):
        if tokens >= size:
            text = f"{tokens / size:.1f}".removesuffix(".0")
            return (text if tokens < 10 * size else f"{tokens / size:.0f}") + letter
    return str(tokens)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * max(value, 0.0):.1f} %"


def _range(value: Mapping[str, int]) -> str:
    return str(value["min"]) if value["min"] == value["max"] else f"{value['min']}-{value['max']}"


def _rings(counts: Mapping[int, int]) -> str:
    """1x412 2x9 8x1; beyond four degrees, the middle ones are merged."""
    items = sorted(counts.items())
    if len(items) <= 4:
        return " ".join(f"{degree}x{count}" for degree, count in items)
    middle = items[1:-1]
    between = f"{middle[0][0]}..{middle[-1][0]}x{sum(count for _, count in middle)}"
    return f"{items[0][0]}x{items[0][1]} {between} {items[-1][0]}x{items[-1][1]}"


# ---- the text timeline ----


def ascii_timeline(
    plan: StepPlan,
    timeline: Timeline,
    *,
    cost: CostModel | None = None,
    width: int | None = None,
    max_lines: int = MAX_LINES,
    end_s: float | None = None,
) -> str:
    """Text timeline of a plan (module docstring), at most `max_lines` ranks and `width` columns.

    width: columns of text; default: the terminal's. Identical neighboring ranks share a line; if
    there are still too many, some are left out, evenly spread, each gap with a line that names its
    ranks. end_s: time at the right edge; default:
    the end of this timeline.
    """
    width = shutil.get_terminal_size((100, 24)).columns if width is None else width
    boxes = make_boxes(plan, timeline, cost)
    end_s = timeline.makespan_s if end_s is None else end_s
    letters, legend = _letters(plan)
    groups = _equal_rows(boxes, _symbols(boxes, letters))
    hidden = _hidden(len(groups), max_lines)
    names = [_group_name(first, last, timeline) for first, last, *_ in groups]
    gaps = {at: _gap_name(groups[at][0], groups[stop - 1][1], timeline) for at, stop in hidden}
    skipped = {i for at, stop in hidden for i in range(at, stop)}
    shown = [name for i, name in enumerate(names) if i not in skipped]
    margin = max(map(len, [*shown, *gaps.values()])) + 2
    columns = max(width - margin - 1, 10)
    lines = []
    for i, (name, (_, _, start_s, stop_s, symbols)) in enumerate(zip(names, groups, strict=True)):
        if i in gaps:
            lines.append(f"{gaps[i]:>{margin - 2}} : not shown")
        if i in skipped:
            continue
        text = _line(start_s / end_s * columns, stop_s / end_s * columns, symbols, columns)
        lines.append(f"{name:>{margin - 2}} |{text}")
    lines.append(" " * margin + f"0{seconds_text(end_s):>{columns - 1}}")
    if len(shown) < len(groups):
        lines.append(f"({len(shown)} of {len(groups)} different rows, {boxes.num_rows} in all)")
    return "\n".join(lines + _wrapped(legend, width))


def _hidden(count: int, most: int) -> list[tuple[int, int]]:
    """[start, stop) of the lines to leave out so that `most` of `count` remain: a few even gaps."""
    if count <= most:
        return []
    num_gaps = min(max(most // 3, 1), count - most)
    chunks = np.array_split(np.arange(most), num_gaps + 1)
    sizes = [len(chunk) for chunk in np.array_split(np.arange(count - most), num_gaps)]
    gaps, at = [], 0
    for chunk, size in zip(chunks, sizes, strict=False):
        at += len(chunk)
        gaps.append((at, at + size))
        at += size
    return gaps


def _gap_name(first: int, last: int, timeline: Timeline) -> str:
    """Rows that are left out; they may go on in the next stage."""
    if first // timeline.num_ranks == last // timeline.num_ranks:
        return _group_name(first, last, timeline)
    return f"{_group_name(first, first, timeline)} to {_group_name(last, last, timeline)}"


_Group = tuple[int, int, np.ndarray, np.ndarray, np.ndarray]


def _equal_rows(boxes: Boxes, symbols: np.ndarray) -> list[_Group]:
    """Runs of rows that look the same: first row, last row, and their start_s, end_s, symbols."""
    order = np.lexsort((boxes.start_s, boxes.row))
    start_s, end_s, symbols = boxes.start_s[order], boxes.end_s[order], symbols[order]
    bounds = np.searchsorted(boxes.row[order], np.arange(boxes.num_rows + 1))
    tolerance_s = 1e-3 * float(end_s.max(initial=0.0))
    groups: list[_Group] = []
    for row in range(boxes.num_rows):
        mine = slice(bounds[row], bounds[row + 1])
        columns = start_s[mine], end_s[mine], symbols[mine]
        if (
            groups
            and row % boxes.num_ranks  # the first rank of another stage
            and np.array_equal(groups[-1][4], columns[2])
            and np.allclose(groups[-1][2], columns[0], rtol=0.0, atol=tolerance_s)
            and np.allclose(groups[-1][3], columns[1], rtol=0.0, atol=tolerance_s)
        ):
            groups[-1] = (groups[-1][0], row, *columns)
        else:
            groups.append((row, row, *columns))
    return groups


def _group_name(first: int, last: int, timeline: Timeline) -> str:
    stage, rank = divmod(first, timeline.num_ranks)
    name = f"{rank}" if first == last else f"{rank}-{last % timeline.num_ranks}"
    return name if timeline.num_stages == 1 else f"stage {stage}: {name}"


def _letters(plan: StepPlan) -> tuple[np.ndarray, list[str]]:
    """(num_seqs,) one-character strings, and the legend's entries for the long sequences."""
    letters = np.full(plan.num_seqs, "=", dtype="<U1")
    names = string.ascii_uppercase + string.ascii_lowercase
    order = np.argsort(-plan.seqlens, kind="stable")
    long = [s for s in order.tolist() if plan.seqlens[s] > plan.max_tokens_per_rank]
    if not long:  # all fit on one rank: show those on several anyway
        long = [s for s in order.tolist() if plan.degrees[s] > 1]
    legend = []
    for name, seq in zip(names, long, strict=False):
        letters[seq] = name
        mode = ", gathered" if plan.gathered[seq] else ""
        tokens = tokens_text(int(plan.seqlens[seq]))
        legend.append(f"{name} {tokens} on {int(plan.degrees[seq])}{mode}")
    letters[long[len(names) :]] = "#"
    if len(long) > len(names):
        legend.insert(0, f"# {len(long) - len(names)} more long ones")
    if (letters == "=").any():
        legend.insert(0, "= short")
    return letters, legend


def _symbols(boxes: Boxes, letters: np.ndarray) -> np.ndarray:
    """(num_boxes,) one-character strings."""
    symbols = np.full(len(boxes.row), "=", dtype="<U1")
    for code, symbol in ((COMM, "~"), (OFFLOAD, "%"), (REDUCE, "+")):
        symbols[boxes.kind == code] = symbol
    known = (boxes.kind == COMPUTE) & (boxes.seq >= 0)
    symbols[known] = letters[boxes.seq[known]]
    return symbols


def _line(start: np.ndarray, end: np.ndarray, symbols: np.ndarray, columns: int) -> str:
    """Each cell shows what fills most of it, idle included. Times are in columns."""
    cells = []
    for x in range(columns):
        share = np.minimum(end, x + 1) - np.maximum(start, x)
        inside = np.flatnonzero(share > 0)
        if share[inside].sum() < 0.5:
            cells.append(" ")
            continue
        kinds, position = np.unique(symbols[inside], return_inverse=True)
        cells.append(str(kinds[np.argmax(np.bincount(position, weights=share[inside]))]))
    return "".join(cells).rstrip()


def _wrapped(entries: Sequence[str], width: int) -> list[str]:
    """At most MAX_LEGEND_LINES lines of entries."""
    lines, line = [], ""
    for entry in entries:
        if line and len(line) + 3 + len(entry) > width:
            lines.append(line)
            line = ""
        line += ("   " if line else "") + entry
    lines = [*lines, line] if line else lines
    if len(lines) > MAX_LEGEND_LINES:
        lines[MAX_LEGEND_LINES - 1] = lines[MAX_LEGEND_LINES - 1][: width - 6] + "   ..."
    return lines[:MAX_LEGEND_LINES]
