"""Rows of tables: CSV with the standard library, Parquet and Arrow with pyarrow.

CSV has no types, so every cell stays the text that it is (a date is not parsed, "NA" is not null).
Parquet and Arrow are read a few rows at a time, from each file on its own: files whose columns
differ are fine, and nothing is copied to another cache. Only this file imports pyarrow.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any

from hdp.installation import pip_install

from . import json_text
from .documents import MALFORMED, UNREADABLE, Rejected
from .files import inner_suffix, open_file, problem

_BATCH_ROWS = 64
_MAX_CELL = 1 << 30  # the library's own limit is 128 KiB; a document may be longer


def csv_rows(path: str) -> Iterator[dict[str, Any] | Rejected]:
    """Rows of a .csv or .tsv file with a header. Raises files.READ_ERRORS."""
    csv.field_size_limit(_MAX_CELL)
    delimiter = "\t" if inner_suffix(path) == ".tsv" else ","
    with open_file(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            header = next(reader, None)
        except csv.Error as error:
            yield Rejected(reason=UNREADABLE, detail=f"its header: {error}")
            return
        if header is None:
            return
        if len(set(header)) < len(header):
            yield Rejected(reason=UNREADABLE, detail=f"its header names a column twice: {header}")
            return
        while True:
            first = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                # A quote that is not closed takes the rows after it along, so each line counts.
                lines = _lines(first, reader.line_num)
                for _ in range(first, reader.line_num + 1):
                    yield Rejected(reason=MALFORMED, detail=f"{lines}: {error}")
                continue
            if not cells:  # a blank line
                continue
            if len(cells) > len(header):
                lines = _lines(first, reader.line_num)
                detail = f"{lines}: {len(cells)} cells for {len(header)} columns"
                yield Rejected(reason=MALFORMED, detail=detail)
                continue
            yield dict(zip(header, cells, strict=False))


def _lines(first: int, last: int) -> str:
    return f"line {last}" if first == last else f"lines {first} to {last}, which a quote joins"


def num_groups(path: str) -> int:
    """How many parts a Parquet or Arrow file has that can be read alone; 1 if it is unreadable."""
    try:
        with _table(path) as table:
            return max(1, table.num_groups)
    except _errors():
        return 1


def table_rows(path: str, start: int, stop: int) -> Iterator[dict[str, Any] | Rejected]:
    """Rows of parts [start, stop) of a Parquet or Arrow file; one rejection if it is unreadable."""
    try:
        with _table(path) as table:
            json_columns = [field.name for field in table.schema if _holds_json(field.type)]
            for batch in table.batches(start, min(stop, table.num_groups)):
                for row in _rows_of(batch):
                    if isinstance(row, dict):
                        for name in json_columns:
                            row[name] = _decoded(row[name], table.schema.field(name).type)
                    yield row
    except _errors() as error:
        yield Rejected(reason=UNREADABLE, detail=f"{problem(error)}; the rest of it is skipped")


def _rows_of(batch: Any) -> Iterator[dict[str, Any] | Rejected]:
    """Rows of a batch; a damaged batch row by row, so that one bad row is one rejection.

    Arrow files are mapped as they are: without validation, damaged offsets read outside the map.
    """
    try:
        batch.validate(full=True)
        rows = batch.to_pylist()
    except _errors(ValueError, OverflowError) as error:  # such as UnicodeDecodeError
        if batch.num_rows <= 1:
            yield Rejected(reason=MALFORMED, detail=problem(error))
            return
        for i in range(batch.num_rows):
            yield from _rows_of(batch.slice(i, 1))
        return
    yield from rows


class _Parquet:
    def __init__(self, library: Any, path: str) -> None:
        import pyarrow.parquet

        self._source = open_file(path)
        try:
            self._file = pyarrow.parquet.ParquetFile(self._source)
        except BaseException:
            self._source.close()
            raise
        self.num_groups, self.schema = self._file.num_row_groups, self._file.schema_arrow

    def batches(self, start: int, stop: int) -> Iterator[Any]:
        groups = list(range(start, stop))
        return self._file.iter_batches(_BATCH_ROWS, row_groups=groups, use_threads=False)

    def __enter__(self) -> _Parquet:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._source.close()


class _Arrow:
    """An Arrow file, or the Arrow stream that `datasets` writes under the same suffix."""

    def __init__(self, library: Any, path: str) -> None:
        open_file(path).close()  # a regular file, and readable
        self._map = library.memory_map(path)
        try:
            self._file = library.ipc.open_file(self._map)
            self.num_groups: int = self._file.num_record_batches
            self._batches: list[Any] | None = None
        except library.ArrowInvalid:
            self._map.seek(0)
            stream = library.ipc.open_stream(self._map)
            self._file, self._batches = stream, list(stream)  # views of the map
            self.num_groups = len(self._batches)
        self.schema = self._file.schema

    def batches(self, start: int, stop: int) -> Iterator[Any]:
        for i in range(start, stop):
            known = self._batches
            batch = known[i] if known is not None else self._file.get_batch(i)
            for row in range(0, batch.num_rows, _BATCH_ROWS):
                yield batch.slice(row, _BATCH_ROWS)

    def __enter__(self) -> _Arrow:
        return self

    def __exit__(self, *_: object) -> None:
        self._map.close()


def _table(path: str) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError:
        raise ValueError(
            f"reading {path} requires the package `pyarrow`: {pip_install('hf')}; .jsonl and "
            ".csv files do not need it"
        ) from None
    kind = _Arrow if inner_suffix(path) == ".arrow" else _Parquet
    return kind(pyarrow, path)


def _errors(*others: type[Exception]) -> tuple[type[BaseException], ...]:
    """What a damaged file raises, and `others`."""
    try:
        import pyarrow
    except ImportError:
        return (OSError, *others)
    return (OSError, pyarrow.ArrowException, *others)


def _holds_json(kind: Any) -> bool:
    """Whether a type is JSON in a string, at any depth: `datasets` stores mixed types so."""
    if getattr(kind, "extension_name", "") == "arrow.json":
        return True
    return any(_holds_json(kind.field(i).type) for i in range(getattr(kind, "num_fields", 0)))


def _decoded(value: Any, kind: Any) -> Any:
    if value is None:
        return None
    if getattr(kind, "extension_name", "") == "arrow.json":
        try:
            return json_text.loads(value) if isinstance(value, (str, bytes)) else value
        except (ValueError, RecursionError):
            return value
    if isinstance(value, dict):
        return {name: _decoded(item, kind.field(name).type) for name, item in value.items()}
    if isinstance(value, list) and hasattr(kind, "value_type"):
        return [_decoded(item, kind.value_type) for item in value]
    return value
