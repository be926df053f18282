"""Source, and its kind with rows: what a reader of data has to offer.

A source splits itself into *shards*, small descriptions that any process can read independently,
and yields one item per row, in order: a `Document`, or a `Rejected` with the reason. It never drops
a row silently; whether a rejection is an error is decided where the shards are merged.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from .documents import Document, Rejected
from .rows import FORMATS, columns_of, find_format, row_document

_SAMPLED_ROWS = 1000  # the columns of a source are those of its first rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Part [start, stop) of a source, in units of the source."""

    file: int  # index into Source.files
    start: int
    stop: int
    num_bytes: int  # an estimate of the work


class Source(ABC):
    """Rows in a fixed order. Cheap to pickle: each worker gets a copy, and one shard at a time."""

    label: str
    files: list[str]  # names for reports
    row_kind: Literal["file", "line", "row"]
    notes: tuple[str, ...] = ()  # for the report: which files were chosen

    @property
    @abstractmethod
    def is_chat(self) -> bool:
        """Whether documents get a loss mask: chats, completions and tokens do, text does not."""

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """JSON that changes whenever the documents may have changed. Cheap: reads no contents."""

    @abstractmethod
    def num_bytes(self) -> int:
        """Approximate size of the data."""

    @abstractmethod
    def shards(self, target_bytes: int) -> list[Shard]:
        """Shards of about `target_bytes` each, in order."""

    @abstractmethod
    def read(self, shard: Shard) -> Iterator[Document | Rejected | None]:
        """One item per row of the shard, in order; None for a blank line, which is not a row."""

    def describe(self) -> list[str]:
        """Lines for the report: what was read, and as what."""
        return list(self.notes)


class RowSource(Source):
    """Rows with columns, which become documents as their format says (rows.py).

    Raises ValueError for an unknown `row_format`.
    """

    def __init__(self, text_column: str = "text", row_format: str = "auto") -> None:
        if row_format not in FORMATS:
            raise ValueError(
                f"unknown row format {row_format!r}: choose one of {', '.join(FORMATS)}"
            )
        self.text_column, self.requested_format = text_column, row_format

    @abstractmethod
    def rows(self, shard: Shard) -> Iterator[dict[str, Any] | Rejected | None]:
        """The rows of a shard."""

    @property
    def columns(self) -> list[str]:
        """The columns of the first rows, and of more if these fit no format."""
        return self._columns_and_format[0]

    @property
    def row_format(self) -> str:
        """The format of all rows.

        Raises ValueError, listing the columns, if they fit none or several.
        """
        columns, row_format = self._columns_and_format
        if row_format is not None:
            return row_format
        requested = self.requested_format
        if requested not in ("auto", "text"):
            needs = ", ".join(columns_of(requested, self.text_column)[0])
            raise ValueError(
                f"{self.label} does not have the columns of format {requested} ({needs}); its "
                f"columns are {columns}: choose another format (--format)"
            )
        is_pair = "chosen" in columns or "rejected" in columns
        hint = "; pairs are for --objective dpo and the like, or --format chosen" if is_pair else ""
        raise ValueError(
            f"{self.label} has no column {self.text_column!r}; its columns are {columns}: choose "
            "one with text_column (--text-column); chats need `messages`, and docs/data.md lists "
            f"other formats{hint}"
        )

    @cached_property
    def is_chat(self) -> bool:
        """Whether documents get a loss mask. Raises ValueError as `row_format` does."""
        return self.row_format != "text"

    def describe(self) -> list[str]:
        needs, uses = columns_of(self.row_format, self.text_column)
        used = [*needs, *[name for name in uses if name in self.columns]]
        unused = [name for name in self.columns if name not in used]
        beside = f"; not used: {', '.join(unused)}" if unused else ""
        return [f"format {self.row_format}: columns {', '.join(used)}{beside}", *self.notes]

    def read(self, shard: Shard) -> Iterator[Document | Rejected | None]:
        row_format, text_column = self.row_format, self.text_column
        for row in self.rows(shard):
            yield row_document(row, row_format, text_column) if isinstance(row, dict) else row

    @cached_property
    def _columns_and_format(self) -> tuple[list[str], str | None]:
        """The columns of enough rows to tell the format, and the format.

        A column that is null in every row counts only if nothing else fits.
        """
        every: dict[str, None] = {}
        filled: dict[str, None] = {}
        problem = ""
        for number, (where, row) in enumerate(self._all_rows(), 1):
            if isinstance(row, dict):
                is_new = any(row[name] is not None for name in row.keys() - filled.keys())
                every |= dict.fromkeys(row)
                filled |= dict.fromkeys(name for name, value in row.items() if value is not None)
            else:
                is_new = False
                problem = problem or (f"{where}: {row.detail}" if row is not None else "")
            is_time = number == _SAMPLED_ROWS or (number > _SAMPLED_ROWS and is_new)
            if is_time and self._format_of(filled):
                break
        if not every:
            raise ValueError(self._without_rows(problem))
        return list(every), self._format_of(filled) or self._format_of(every)

    def _format_of(self, columns: Iterable[str]) -> str | None:
        try:
            return find_format(list(columns), self.text_column, self.requested_format)
        except ValueError as error:
            raise ValueError(f"{self.label}: {error}") from None

    def _all_rows(self) -> Iterator[tuple[str, dict[str, Any] | Rejected | None]]:
        for i, path in enumerate(self.files):
            whole = Shard(file=i, start=0, stop=sys.maxsize, num_bytes=0)
            yield from ((f"{path}:{n}", row) for n, row in enumerate(self.rows(whole), 1))

    def _without_rows(self, problem: str) -> str:
        return f"{self.label} contains no rows" + (f": {problem}" if problem else "")
