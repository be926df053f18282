"""The page: a run as one HTML file that loads nothing.

Everything that comes from files is escaped: text by `html.escape`, and the data of the curves as
JSON without `<`, `>` and `&`, which the script only ever puts into text nodes. A content security
policy forbids all other scripts and every load, so a run folder from somebody else is safe to show.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hdp.config import TrainConfig
from hdp.console import duration

from .curves import chart, column, idle_map, number, series
from .files import RunFiles
from .plans import plan_view

_HERE = Path(__file__).parent
_LONGEST_VALUE = 300  # characters of a configuration entry that are shown


def page(run: RunFiles) -> str:
    """The HTML text, ASCII only. Sums that overflow are left out, like values that are missing."""
    with np.errstate(over="ignore"):
        return _page(run)


def _page(run: RunFiles) -> str:
    script = (_HERE / "page.js").read_text(encoding="ascii")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    title = html.escape(f"{run.folder.resolve().name}: run report")
    charts = _charts(run)
    idle = idle_map(run.rows)
    plans = [plan_view(trace) for trace in run.traces]
    data = {"charts": charts, "idle": idle, "plans": plans}
    text = "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
            f"style-src 'unsafe-inline'; script-src 'sha256-{digest}'\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{title}</title>",
            f"<style>{(_HERE / 'page.css').read_text(encoding='ascii')}</style>",
            "</head><body><main>",
            _head(run),
            _problems(run.problems),
            '<section id="charts" class="charts">',
            *(f'<figure class="card chart" data-chart="{i}"></figure>' for i in range(len(charts))),
            "</section>",
            _idle_section(idle),
            *_plan_sections(plans),
            _configuration(run.config),
            _files(run),
            "<noscript><p>The curves and plans are drawn by a script in this file; "
            "your browser does not run it.</p></noscript>",
            "</main><div id='tip' hidden></div>",
            f'<script type="application/json" id="data">{_json(data)}</script>',
            f"<script>{script}</script>",
            "</body></html>",
        ]
    )
    return text.encode("ascii", "xmlcharrefreplace").decode() + "\n"


def _json(value: Any) -> str:
    """JSON that can stand in a script element: no text in it can end that element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


# ---- curves ----


def _charts(run: RunFiles) -> list[dict[str, Any]]:
    rows, evals = run.rows, run.evals
    steps = column(rows, "step")

    def line(label: str, name: str, scale: float = 1.0) -> dict | None:
        return series(label, steps, column(rows, name), scale=scale)

    names = sorted({name for row in evals for name in row if re.match("eval_loss(/|$)", name)})
    eval_steps = column(evals, "step")
    eval_lines = [
        series(name.replace("_", " ", 1), eval_steps, column(evals, name)) for name in names[:6]
    ]
    hosts = column(rows, "host_bytes")
    host = series("host, offload", steps, hosts, scale=2**-30) if (hosts > 0).any() else None
    made = [
        chart("Loss", [line("training", "loss"), *eval_lines], note="nats per label token"),
        chart("Learning rate", [line("lr", "lr")]),
        chart("Gradient norm", [line("norm", "grad_norm")], note="before clipping"),
        chart(
            "Throughput",
            [line("tokens/s per rank", "tokens_per_s_per_rank")],
            note="tokens/s per rank",
        ),
        chart(
            "Step time",
            [line("measured", "step_s"), line("planned", "planned_s")],
            unit=" s",
            note="the plan counts forward and backward; data and the optimizer are not in it",
        ),
        chart(
            "Bubble",
            [line("measured", "bubble", 100), line("planned", "planned_bubble", 100)],
            unit=" %",
            note=_bubble_note(rows),
        ),
        chart("MFU", [line("MFU", "mfu", 100)], unit=" %"),
        chart(
            "Memory",
            [line("device" if _on_gpu(run) else "resident set", "mem_bytes", 2**-30), host],
            unit=" GiB",
            note="peak so far, of the rank with most",
        ),
    ]
    return [one for one in made if one]


def _on_gpu(run: RunFiles) -> bool:
    return run.config.get("device") == "cuda"


def _bubble_note(rows: list[dict[str, Any]]) -> str:
    if any(row.get("shared_cores") is True for row in rows):
        return (
            "ranks shared CPU cores: the measured bubble holds the time in which the operating "
            "system ran another rank"
        )
    return "share of the step that ranks wait or communicate"


# ---- sections ----


def _head(run: RunFiles) -> str:
    tiles = "".join(
        f'<div class="tile"><b>{html.escape(value)}</b><span>{html.escape(label)}</span></div>'
        for label, value in _summary(run)
    )
    return (
        f"<header><h1>{html.escape(run.folder.resolve().name)}</h1>"
        f"<p>{html.escape(_status(run))}</p></header>"
        f'<section class="tiles">{tiles}</section>'
    )


def _status(run: RunFiles) -> str:
    """How far the run is, and when it last wrote something: it may still be going."""
    if not run.rows:
        return "No step has been recorded."
    step, steps = run.rows[-1]["step"], run.num_steps
    if steps is None:
        return f"Step {step:,}."
    if step >= steps:
        return f"All {steps:,} steps are done."
    ago = ""
    if run.written_s is not None:
        ago = f"; metrics last written {duration(max(run.read_s - run.written_s, 0))} ago"
    return f"Step {step:,} of {steps:,}: still going, or stopped early{ago}."


def _summary(run: RunFiles) -> list[tuple[str, str]]:
    """(label, value) of the tiles."""
    rows = run.rows
    if not rows:
        return []
    last = rows[-1]
    losses, seconds = column(rows, "loss"), column(rows, "step_s")
    gaps = np.diff(column(rows, "step"), prepend=0)  # logged steps stand for those before them
    known = np.isfinite(seconds)
    spent_s = float((seconds[known] * gaps[known]).sum())
    tiles = [("steps", f"{last['step']:,}")]
    tokens = number(last.get("total_tokens"))
    if math.isfinite(tokens):
        tiles.append(("tokens", f"{tokens:,.0f}"))
    ranks = number(last.get("hdp_size"))
    if math.isfinite(ranks):
        tiles.append(("ranks", f"{ranks:,.0f}"))
    if known.any() and 0 < spent_s < math.inf:
        tiles.append(("time in steps", duration(spent_s)))
        rate = np.nanmedian(column(rows, "num_tokens") / np.where(seconds > 0, seconds, np.nan))
        if math.isfinite(rate):
            tiles.append(("tokens/s of all ranks, median", f"{rate:,.0f}"))
    if np.isfinite(losses).any():
        best = int(np.nanargmin(losses))
        label = f"best training loss, step {rows[best]['step']:,}"
        tiles.append((label, f"{losses[best]:.4f}"))
    evals = column(run.evals, "eval_loss")
    if np.isfinite(evals).any():
        best = int(np.nanargmin(evals))
        label = f"best eval loss, step {run.evals[best]['step']:,}"
        tiles.append((label, f"{evals[best]:.4f}"))
    shared = ", shared cores" if any(row.get("shared_cores") is True for row in rows) else ""
    shares = ((f"bubble, median{shared}", "bubble"), ("bubble, planned", "planned_bubble"))
    for label, name in shares:
        values = column(rows, name)
        median = np.nanmedian(values) if np.isfinite(values).any() else math.nan
        if math.isfinite(100 * median):
            tiles.append((label, f"{median:.1%}"))
    return tiles


def _problems(problems: list[str]) -> str:
    if not problems:
        return ""
    items = "".join(f"<li>{html.escape(problem)}</li>" for problem in problems)
    return f'<section class="card problems"><h2>Left out</h2><ul>{items}</ul></section>'


def _idle_section(idle: dict[str, Any] | None) -> str:
    if idle is None:
        return ""
    rows = f"each row is {idle['block']} consecutive ranks" if idle["block"] > 1 else "one row each"
    return (
        '<section class="card"><h2>Idle per rank</h2><p>Share of the step in which a rank does '
        f"not compute, over the run: {rows}. The bar on the right is its mean.</p>"
        '<div id="idle"></div></section>'
    )


def _plan_sections(plans: list[dict[str, Any]]) -> Iterable[str]:
    for i, view in enumerate(plans):
        yield (
            f'<section class="card"><h2>Plan of step {view["step"]:,}</h2>'
            f"<p>{len(view['lengths']):,} sequences, {view['tokens']:,} tokens on "
            f"{view['ranks']:,} ranks, at most {view['capacity']:,} tokens per rank and "
            f"microbatch; policy {html.escape(view['policy'])}. Point at a box: its sequence "
            "lights up on all ranks of its ring.</p>"
            f'<div class="plan" data-plan="{i}"></div></section>'
        )


def _configuration(config: dict[str, Any]) -> str:
    if not config:
        return ""
    defaults = json.loads(TrainConfig().to_json())
    changed = {
        name: value
        for name, value in config.items()
        if name not in defaults or defaults[name] != value
    }
    rows = [(name, _shown(value), _default(defaults, name)) for name, value in changed.items()]
    every = [(name, _shown(value)) for name, value in config.items()]
    differ = _table(("option", "value", "default"), rows)
    if not rows:
        differ = "<p>All options have their defaults.</p>"
    return (
        f'<section class="card"><h2>Differences from the defaults</h2>{differ}'
        f"<details><summary>All {len(every)} options</summary>"
        f"{_table(('option', 'value'), every)}</details></section>"
    )


def _default(defaults: dict[str, Any], name: str) -> str:
    return _shown(defaults[name]) if name in defaults else "(unknown option)"


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) and value else json.dumps(value)
    return text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + "..."


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    def cells(tag: str, row: tuple[str, ...]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"

    body = "".join(cells("td", row) for row in rows)
    return f"<table><thead>{cells('th', head)}</thead><tbody>{body}</tbody></table>"


def _files(run: RunFiles) -> str:
    rows = [("folder", str(run.folder.resolve()))]
    if run.checkpoints:
        rows.append(("checkpoints", ", ".join(run.checkpoints)))
    for trace in run.traces:
        names = f"timeline_{trace.step}.json, timeline_{trace.step}.png, trace_{trace.step}.json"
        rows.append((f"traces of step {trace.step}", names))
    for name in ("metrics.jsonl", "tensorboard", "wandb"):
        if (run.folder / name).exists():
            rows.append((name, str(run.folder / name)))
    table = _table(("what", "where"), rows)
    return f'<section class="card"><h2>Where things are</h2>{table}</section>'
