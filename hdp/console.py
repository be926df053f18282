"""Console output: progress bars, tables and notes. The only file that imports rich.

Three rules keep output useful for people, logs and pipes alike:

* progress bars appear only on a terminal
* tables are drawn by rich on a terminal and as plain aligned ASCII elsewhere
* without rich, everything still works in plain text

Notes and bars go to stderr and tables to stdout, so tables can be piped.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

Advance = Callable[[float], None]


def is_terminal(stream: TextIO) -> bool:
    """Whether `stream` is a terminal."""
    try:
        return stream.isatty()
    except (AttributeError, ValueError):  # replaced or closed streams
        return False


@contextmanager
def progress(
    description: str,
    total: float | None = None,
    *,
    unit: str = "",
    enabled: bool | None = None,
    stream: TextIO | None = None,
) -> Iterator[Advance]:
    """A progress bar; yields `advance(amount)`.

    Args:
        description: what is happening, such as "tokenizing".
        total: the amount at which the work is done; None: unknown, shown as a pulse.
        unit: "bytes" formats sizes and rates; anything else is printed verbatim.
        enabled: None: only on a terminal.
    """
    stream = sys.stderr if stream is None else stream
    if enabled is None:
        enabled = is_terminal(stream)
    try:
        if not enabled:
            raise ImportError
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        yield lambda amount: None
        return
    columns = _bar_columns(unit, known_total=total is not None)
    with Progress(*columns, console=Console(file=stream), transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda amount: bar.advance(task, amount)


def _bar_columns(unit: str, *, known_total: bool) -> list[Any]:
    from rich import progress as rich_progress

    columns: list[Any] = [rich_progress.TextColumn("{task.description}"), rich_progress.BarColumn()]
    if unit == "bytes":
        columns += [rich_progress.DownloadColumn(), rich_progress.TransferSpeedColumn()]
    elif known_total:
        columns += [rich_progress.MofNCompleteColumn(), rich_progress.TextColumn(unit)]
    if known_total:
        columns.append(rich_progress.TimeRemainingColumn())
    else:
        columns.append(rich_progress.TimeElapsedColumn())
    return columns


def printable(text: str) -> str:
    """`text` on one line and without escapes: file names and rows may hold anything.

    Bytes that are not UTF-8 become U+FFFD, and characters that a terminal acts on or hides
    (escapes, line ends, marks of direction) their escape sequence.
    """
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


StepBar = Callable[[int, str], None]


@contextmanager
def step_bar(
    total: int,
    done: int = 0,
    *,
    enabled: bool = True,
    stream: TextIO | None = None,
) -> Iterator[StepBar | None]:
    """The bar of a run: yields `update(steps done, text beside the bar)`; None if none is drawn.

    It is drawn on a terminal with rich, as the last line: notes appear above it.
    """
    stream = sys.stderr if stream is None else stream
    try:
        if not (enabled and total > 0 and is_terminal(stream)):
            raise ImportError
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    except ImportError:
        yield None
        return
    columns = [TextColumn("step"), MofNCompleteColumn(), BarColumn()]
    text_column = TextColumn("{task.fields[text]}", markup=False)
    out = Console(file=stream)
    # Two redraws a second: more would take time from a rank that shares the core.
    with Progress(*columns, text_column, console=out, transient=True, refresh_per_second=2) as bar:
        task = bar.add_task("", total=total, completed=done, text="")
        yield lambda done, text: bar.update(task, completed=done, text=text)


def count(number: int, name: str) -> str:
    """1 rank, 2 ranks, 1,000 ranks: a number of things whose plural ends in s."""
    return f"{number:,} {name}" + ("" if number == 1 else "s")


def duration(seconds: float) -> str:
    """12 s, 3 min 20 s, 2 h 5 min, 3 d 4 h; "unknown" if `seconds` is not finite."""
    if not math.isfinite(seconds):
        return "unknown"
    whole = round(seconds)
    for size, unit, part, small in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {unit}" + (f" {rest} {small}" if rest else "")
    return f"{whole} s"


def note(message: str, *, stream: TextIO | None = None) -> None:
    """Print one line for people and logs, such as which fallback is in use."""
    stream = sys.stderr if stream is None else stream
    lines = [printable(line) for line in message.split("\n")]
    print("hdp: " + "\n".join(lines), file=stream, flush=True)


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    title: str | None = None,
    stream: TextIO | None = None,
) -> None:
    """Print a table; columns of numbers are right-aligned."""
    stream = sys.stdout if stream is None else stream
    try:
        if not is_terminal(stream):
            raise ImportError
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        print(table_text(columns, rows, title=title), file=stream)
        return
    table = Table(title=title)
    right = _numeric_columns(columns, rows)
    for i, column in enumerate(columns):
        table.add_column(Text(column), justify="right" if right[i] else "left")
    for row in rows:
        table.add_row(*[Text(cell_text(cell)) for cell in row])
    Console(file=stream).print(table)


def table_text(
    columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str | None = None
) -> str:
    """The table as aligned ASCII, without a trailing newline.

    Raises ValueError if a row's number of cells differs from the number of columns.
    """
    right = _numeric_columns(columns, rows)
    cells = [list(columns), *[[cell_text(cell) for cell in row] for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]

    def line_text(line: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(line, widths, right, strict=True)
        ]
        return "  ".join(padded).rstrip()

    rule = "  ".join("-" * width for width in widths)
    lines = [line_text(cells[0]), rule, *[line_text(line) for line in cells[1:]]]
    return "\n".join([title, *lines] if title else lines)


def cell_text(cell: object) -> str:
    """A cell as text: thousands separators for ints, 4 digits for floats, "-" for None."""
    if cell is None:
        return "-"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, int):
        return f"{cell:,}"
    if isinstance(cell, float):
        return f"{cell:.4g}"
    return str(cell)


def _numeric_columns(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> list[bool]:
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(
                f"row {list(row)} has {len(row)} cells for {len(columns)} columns {list(columns)}"
            )
    return [
        bool(rows)
        and all(
            row[i] is None or (isinstance(row[i], (int, float)) and not isinstance(row[i], bool))
            for row in rows
        )
        for i in range(len(columns))
    ]
