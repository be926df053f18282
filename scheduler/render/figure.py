"""Figures of plans: ranks down, time across, one color per sequence, idle time left empty.

    from hdp.scheduler.render.figure import draw_plans
    draw_plans([("static DP x CP", static, simulate(static, cost)),
                ("HDP", hdp, simulate(hdp, cost))], "plan.png")

How to read one: a sequence on several ranks is one block in a strong color, labeled with its
length; short sequences on one rank are pale. Gray hatching is exposed communication. Empty space is
a waiting rank. All plans share one time axis, so the shorter panel is the faster step.

Up to MAX_VECTOR_ROWS rows, each box is drawn as a shape (sharp at any size, also in SVG); beyond
that the plan becomes an image of at most 900 evenly spaced ranks, so 10,000 stay readable and
small. With a pipeline, all ranks are drawn once per stage, backward darker than forward. matplotlib
is imported only when a figure is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hdp.scheduler.costs.cost_model import CostModel
from hdp.scheduler.simulation.timeline import Timeline
from hdp.scheduler.step_plan import StepPlan

from .colors import STRONG, colors_of, is_long, pale, rgb
from .gantt import COMM, COMPUTE, OFFLOAD, REDUCE, Boxes, make_boxes
from .text import tokens_text

MAX_VECTOR_ROWS = 160
FORMATS = (".png", ".svg", ".pdf")

_COMM, _COMM_FLAT, _HATCH, _OFFLOAD, _REDUCE = "#f1f3f4", "#d3d7db", "#9aa0a6", "#f3d9a4", "#cfd8dc"
_BACKWARD_SHADE = 0.82
_ROW_GAP = 0.2  # share of a row left white between ranks that do not share a block
_INK, _SOFT = "#202124", "#5f6368"
_LEFT, _WIDTH = 0.07, 0.915  # of the page: where panels start, how wide they are


def draw_plans(
    plans: Sequence[tuple[str, StepPlan, Timeline]],
    path: str | Path,
    *,
    cost: CostModel | None = None,
    title: str | None = None,
    width_in: float = 11.0,
    dpi: int = 160,
) -> None:
    """Draw plans one below another on one time axis and write them to `path` (.png, .svg or .pdf).

    plans: (title, plan, timeline) each; the step's time and bubble are added to the title.
    cost: splits a microbatch's time among its pieces exactly; without it, roughly.
    Raises ValueError for other file types, or for no plans.
    """
    path = Path(path)
    check_format(path)
    if not plans:
        raise ValueError("no plans to draw")
    figure_of = figure_class()
    _, first, first_timeline = plans[0]
    first_s = first_timeline.makespan_s
    drawn = [
        _Panel(
            name=name,
            plan=plan,
            timeline=timeline,
            boxes=make_boxes(plan, timeline, cost),
            speedup=first_s / timeline.makespan_s
            if plan is not first and first_s > timeline.makespan_s > 0
            else None,
        )
        for name, plan, timeline in plans
    ]
    end_s = max(panel.timeline.makespan_s for panel in drawn)
    heights = [_height_in(panel.boxes.num_rows) for panel in drawn]
    top, bottom, gap = (0.70 if title else 0.34), 0.82, 0.46
    total = sum(heights) + gap * (len(heights) - 1) + top + bottom
    figure = figure_of(figsize=(width_in, total), dpi=dpi, facecolor="white")  # on any page
    if title:
        figure.text(_LEFT, 1 - 0.12 / total, title, ha="left", va="top", fontsize=13,
                    fontweight="bold", color=_INK)  # fmt: skip
    unit, scale = _time_unit(end_s)
    y = total - top
    for panel, height in zip(drawn, heights, strict=True):
        y -= height
        axes = figure.add_axes((_LEFT, y / total, _WIDTH, height / total))
        axes.set_xlim(0, end_s * scale * 1.003)
        _draw_panel(axes, panel, scale=scale, unit=unit)
        axes.tick_params(labelbottom=panel is drawn[-1])
        y -= gap
    axes.set_xlabel(f"time [{unit}]", color=_SOFT, fontsize=9, labelpad=1, loc="right")
    _draw_key(figure, drawn)
    figure.savefig(path)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Panel:
    name: str
    plan: StepPlan
    timeline: Timeline
    boxes: Boxes
    speedup: float | None = None  # over the first panel, where it shows another plan


def check_format(path: Path) -> None:
    """Raise ValueError for a path that does not end as one of FORMATS."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"cannot draw to {path}: use one of {', '.join(FORMATS)}")


def figure_class() -> Any:
    """matplotlib's Figure, without pyplot: no display, no global state. Also for other figures."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("drawing needs matplotlib: pip install matplotlib") from error
    return Figure


def _height_in(rows: int) -> float:
    """Height of a panel: generous for few ranks, growing slowly, at most 4.2 inches."""
    return float(np.clip(0.16 * rows, 0.9, 2.6) + min(max(rows - 16, 0) * 0.006, 1.6))


def _time_unit(end_s: float) -> tuple[str, float]:
    if end_s >= 1.0:
        return "s", 1.0
    return ("ms", 1e3) if end_s >= 1e-3 else ("us", 1e6)


# ---- one panel ----


def _draw_panel(axes: Any, panel: _Panel, *, scale: float, unit: str) -> None:
    rows, timeline = panel.boxes.num_rows, panel.timeline
    axes.set_ylim(rows, 0)
    if rows <= MAX_VECTOR_ROWS:
        _draw_shapes(axes, panel, scale)
    else:
        _draw_image(axes, panel, scale)
    end = timeline.makespan_s * scale
    axes.axvline(end, color=_INK, linewidth=1.0, linestyle=(0, (4, 3)))
    if timeline.num_stages == 1:
        ticks = _row_ticks(rows)
        axes.set_yticks([row + 0.5 for row in ticks], [str(row) for row in ticks])
        axes.set_ylabel("rank", color=_SOFT, fontsize=9)
    else:
        middles = (np.arange(timeline.num_stages) + 0.5) * timeline.num_ranks
        names = [f"stage {stage}" for stage in range(timeline.num_stages)]
        axes.set_yticks(middles, names, rotation=90, va="center")
        for stage in range(1, timeline.num_stages):
            axes.axhline(stage * timeline.num_ranks, color="#bdc1c6", linewidth=0.6)
        axes.set_ylabel(f"{timeline.num_ranks} ranks each", color=_SOFT, fontsize=9)
    axes.tick_params(colors=_SOFT, labelsize=8, length=2)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#bdc1c6")
    facts = f"{end:.3g} {unit},  bubble {100 * timeline.mean_bubble:.1f} %"
    if panel.speedup is not None:
        facts = f"{panel.speedup:.2f}x faster,  {facts}"
    axes.set_title(panel.name, loc="left", fontsize=11, fontweight="bold", color=_INK, pad=5)
    axes.set_title(facts, loc="right", fontsize=10, color=_INK, pad=5)


def _row_ticks(rows: int) -> list[int]:
    step = 1
    while rows / step > 9:
        step *= 2
    return list(range(0, rows, step))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Blocks:
    """Boxes of the same sequence, kind and time on consecutive rows, merged. Columns."""

    top: np.ndarray  # rows
    bottom: np.ndarray
    start: np.ndarray  # in the unit of the axis
    end: np.ndarray
    kind: np.ndarray
    seq: np.ndarray
    backward: np.ndarray


def _merge(boxes: Boxes, scale: float) -> _Blocks:
    tick = max(float(boxes.end_s.max(initial=0.0)), 1e-30) * 2e-3
    start = boxes.start_s / tick
    order = np.lexsort((boxes.row, np.round(start), boxes.backward, boxes.kind, boxes.seq))
    row, kind, seq, backward = (
        column[order] for column in (boxes.row, boxes.kind, boxes.seq, boxes.backward)
    )
    start, stop = start[order], boxes.end_s[order] / tick
    same = np.zeros(len(order), dtype=bool)
    same[1:] = (
        (row[1:] == row[:-1] + 1)
        & (row[1:] % boxes.num_ranks != 0)  # not into the next stage
        & (np.abs(start[1:] - start[:-1]) < 1)
        & (np.abs(stop[1:] - stop[:-1]) < 1)
        & (kind[1:] == kind[:-1])
        & (seq[1:] == seq[:-1])
        & (backward[1:] == backward[:-1])
        & (seq[1:] >= 0)
    )
    first = np.flatnonzero(~same)
    last = np.append(first[1:], len(order)) - 1 if len(first) else first
    source = order[first]
    return _Blocks(
        top=row[first].astype(float),
        bottom=row[last] + 1.0,
        start=boxes.start_s[source] * scale,
        end=boxes.end_s[source] * scale,
        kind=kind[first],
        seq=seq[first],
        backward=backward[first],
    )


def _draw_shapes(axes: Any, panel: _Panel, scale: float) -> None:
    """Draw each block as a rectangle; a ring on neighboring ranks is one block."""
    from matplotlib.collections import PolyCollection

    blocks, rows = _merge(panel.boxes, scale), panel.boxes.num_rows
    pad = _ROW_GAP / 2  # else neighbors that run alike would look like one ring
    y0, y1 = blocks.top + pad, blocks.bottom - pad
    path = ((blocks.start, y0), (blocks.end, y0), (blocks.end, y1), (blocks.start, y1))
    corners = np.stack([np.stack(point, axis=1) for point in path], axis=1)
    for code, face_of_kind in ((COMM, _COMM), (OFFLOAD, _OFFLOAD), (REDUCE, _REDUCE)):
        mine = blocks.kind == code
        if mine.any():
            axes.add_collection(
                PolyCollection(
                    list(corners[mine]),
                    facecolor=face_of_kind,
                    hatch="//////" if code == COMM else None,
                    edgecolor=_HATCH,
                    linewidth=0.0,
                )
            )
    mine = blocks.kind == COMPUTE
    if not mine.any():
        return
    face = _fill(panel.plan, blocks.seq[mine], blocks.backward[mine])
    # No edge on narrow blocks: a hundred short pieces must not become one white bar.
    wide = (blocks.end - blocks.start)[mine] > 0.003 * float(blocks.end.max())
    axes.add_collection(
        PolyCollection(list(corners[mine]), facecolor=face, edgecolor="white",
                       linewidth=np.where(wide, 0.6 if rows <= 48 else 0.3, 0.0))
    )  # fmt: skip
    _label(axes, panel.plan, blocks)


def _fill(plan: StepPlan, seq: np.ndarray, backward: np.ndarray) -> np.ndarray:
    """(n, 3) RGB of compute boxes; a pipeline's backward is darker than its forward."""
    face = np.full((len(seq), 3), 0.88)
    face[seq >= 0] = colors_of(plan)[seq[seq >= 0]]
    face[backward] *= _BACKWARD_SHADE
    return face


def _label(axes: Any, plan: StepPlan, blocks: _Blocks) -> None:
    """Write the length on blocks of long sequences that have room for it.

    A measured ring is many blocks, one per wait: only the widest on a rank gets the label.
    """
    long = (blocks.kind == COMPUTE) & (blocks.seq >= 0)
    long[long] = is_long(plan)[blocks.seq[long]]
    widest: dict[tuple[int, float, bool], int] = {}
    for i in np.flatnonzero(long)[np.argsort((blocks.end - blocks.start)[long], kind="stable")]:
        widest[int(blocks.seq[i]), float(blocks.top[i]), bool(blocks.backward[i])] = int(i)
    which = np.array(sorted(widest.values()), dtype=np.int64)
    place = axes.get_position()
    page_width, page_height = axes.figure.get_size_inches()
    inch_per_x = place.width * page_width / axes.get_xlim()[1]
    inch_per_row = place.height * page_height / axes.get_ylim()[0]
    colors = _fill(plan, blocks.seq[which], blocks.backward[which])
    for i, color in zip(which.tolist(), colors, strict=True):
        seq = int(blocks.seq[i])
        width = (blocks.end[i] - blocks.start[i]) * inch_per_x
        height = (blocks.bottom[i] - blocks.top[i]) * inch_per_row
        text = _text_that_fits(
            tokens_text(int(plan.seqlens[seq])), int(plan.degrees[seq]), width, height
        )
        if text is None:
            continue
        ink = "white" if color @ (0.299, 0.587, 0.114) < 0.62 else _INK
        axes.text((blocks.start[i] + blocks.end[i]) / 2, (blocks.top[i] + blocks.bottom[i]) / 2,
                  text, ha="center", va="center", fontsize=7.5, color=ink, linespacing=1.1,
                  clip_on=True)  # fmt: skip


def _text_that_fits(tokens: str, degree: int, width_in: float, height_in: float) -> str | None:
    """The longest that fits of "63K on 8 ranks", the same on two lines, and "63K"."""
    texts = [tokens]
    if degree > 1:
        texts = [f"{tokens} on {degree} ranks", f"{tokens}\non {degree} ranks", tokens]
    for text in texts:
        lines = text.split("\n")
        if width_in > 0.058 * max(map(len, lines)) + 0.06 and height_in > 0.115 * len(lines):
            return text
    return None


def _draw_image(axes: Any, panel: _Panel, scale: float) -> None:
    """Draw all boxes as pixels; if there are too many ranks, evenly spaced ones."""
    boxes, plan = panel.boxes, panel.plan
    width, end_s = 2000, axes.get_xlim()[1] / scale
    shown = np.unique(np.linspace(0, boxes.num_rows - 1, min(boxes.num_rows, 900)).astype(int))
    line_of_row = np.full(boxes.num_rows, -1)
    line_of_row[shown] = np.arange(len(shown))
    colors = np.empty((len(boxes.row), 3))
    for code, color in ((COMM, _COMM_FLAT), (OFFLOAD, _OFFLOAD), (REDUCE, _REDUCE)):
        colors[boxes.kind == code] = rgb(color)
    mine = boxes.kind == COMPUTE
    colors[mine] = _fill(plan, boxes.seq[mine], boxes.backward[mine])
    pixels = np.round(colors * 255).astype(np.uint8)
    left = np.round(boxes.start_s / end_s * width).astype(np.int64)
    right = np.round(boxes.end_s / end_s * width).astype(np.int64)
    line = line_of_row[boxes.row]
    image = np.full((len(shown), width, 3), 255, dtype=np.uint8)
    seen = np.flatnonzero((right > left) & (line >= 0))
    columns = (line, left, right)
    for row, x0, x1, pixel in zip(*(c[seen].tolist() for c in columns), pixels[seen], strict=True):
        image[row, x0:x1] = pixel
    axes.imshow(image, aspect="auto", interpolation="antialiased",
                extent=(0, end_s * scale, boxes.num_rows, 0))  # fmt: skip
    _label(axes, plan, _merge(boxes, scale))


# ---- the key ----


_Swatches = tuple[float, list[dict[str, Any]]]  # width of each in inches, and how each is drawn


def _draw_key(figure: Any, panels: Sequence[_Panel]) -> None:
    """Draw a one-line color key below the panels, scaled down to fit."""
    from matplotlib.patches import Rectangle

    width, height = figure.get_size_inches()
    entries = _key(panels)
    room, pad, gap, letter = (1.0 - _LEFT) * width - 0.1, 0.08, 0.22, 0.062
    needed = sum(len(looks) * size + pad + letter * len(text) for (size, looks), text in entries)
    scale = min(1.0, room / (needed + gap * (len(entries) - 1)))
    x, y, side = _LEFT * width, 0.16, 0.15
    for (size, looks), text in entries:
        for look in looks:
            figure.add_artist(
                Rectangle((x / width, y / height), size * scale / width, side / height,
                          transform=figure.transFigure, **{"linewidth": 0.0, **look})
            )  # fmt: skip
            x += size * scale
        figure.text((x + pad * scale) / width, (y + side / 2) / height, text, color=_SOFT,
                    fontsize=8.5 * scale, ha="left", va="center_baseline")  # fmt: skip
        x += (pad + letter * len(text) + gap) * scale


def _key(panels: Sequence[_Panel]) -> list[tuple[_Swatches, str]]:
    """Entries of the key for what the panels show, in order."""
    kinds = {code for panel in panels for code in np.unique(panel.boxes.kind).tolist()}
    pales = [{"facecolor": pale(hue)} for hue in (0.55, 0.12, 0.33, 0.8)]
    entries: list[tuple[_Swatches, str]] = [
        ((0.17, [{"facecolor": color} for color in STRONG[:3]]), "long sequence on its ring"),
        ((0.12, pales), "short sequences"),
    ]
    if any(panel.boxes.backward.any() for panel in panels):
        shades = [[part * shade for part in rgb(STRONG[0])] for shade in (1.0, _BACKWARD_SHADE)]
        entries.append(((0.17, [{"facecolor": color} for color in shades]), "forward, backward"))
    waiting: dict[str, Any] = {"facecolor": _COMM, "hatch": "//////", "edgecolor": _HATCH}
    if all(panel.boxes.num_rows > MAX_VECTOR_ROWS for panel in panels):  # pixels have no hatching
        waiting = {"facecolor": _COMM_FLAT}
    for code, look, text in (
        (COMM, waiting, "exposed KV transfer"),
        (OFFLOAD, {"facecolor": _OFFLOAD}, "host copies"),
        (REDUCE, {"facecolor": _REDUCE}, "gradients"),
    ):
        if code in kinds:
            entries.append(((0.4, [look]), text))
    empty = {"facecolor": "white", "edgecolor": "#bdc1c6", "linewidth": 0.6}
    return [*entries, ((0.4, [empty]), "idle")]
