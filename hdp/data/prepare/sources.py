"""Sources of documents: one small interface, three readers.

    FileSource          each text or code file is a document
    JsonLinesSource     one JSON object per line, with a text column or `messages`
    DatasetSource       rows of a `datasets.Dataset`: Parquet, Arrow, CSV, the hub

A source splits itself into *shards*, small descriptions that any process can read independently,
and yields one item per row, in order: a `Document`, or a `Rejected` with the reason. It never drops
a row silently; whether a rejection is an error is decided where the shards are merged.

Plain files and JSON Lines are read here rather than by `datasets`: its text reader stops at the
first file that is not UTF-8; its JSON reader fails on one malformed row without giving the line,
and gives all rows the same keys (None for missing ones); and both copy the data. All other rows
come from `datasets`, which only this file imports, and only when needed.
"""

from __future__ import annotations

import os
import stat
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from hdp import console

from .documents import (
    EMPTY,
    NO_COLUMN,
    NOT_UTF8,
    UNREADABLE,
    Document,
    Rejected,
    chat_document,
    parse_line,
    text_document,
    without_none,
)


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

    @property
    @abstractmethod
    def is_chat(self) -> bool:
        """Whether documents are conversations, whose tokens get a loss mask."""

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


class FileSource(Source):
    """Each file is a document. Shard units: files."""

    is_chat = False
    row_kind = "file"

    def __init__(self, label: str, files: Sequence[str]) -> None:
        self.label, self.files = label, list(files)

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": "files", "files": [_file_state(path) for path in self.files]}

    def num_bytes(self) -> int:
        return sum(_file_state(path)[1] for path in self.files)

    def shards(self, target_bytes: int) -> list[Shard]:
        sizes = [_file_state(path)[1] for path in self.files]
        return _cut_rows(sizes, target_bytes)

    def read(self, shard: Shard) -> Iterator[Document | Rejected]:
        for path in self.files[shard.start : shard.stop]:
            try:
                if not stat.S_ISREG(os.stat(path).st_mode):
                    yield Rejected(reason=UNREADABLE, detail="not a regular file")
                    continue
                content = Path(path).read_bytes()
            except OSError as error:
                yield Rejected(reason=UNREADABLE, detail=str(error.strerror or error))
                continue
            try:
                text = content.decode("utf-8-sig")  # strips a byte order mark
            except UnicodeDecodeError as error:
                yield Rejected(reason=NOT_UTF8, detail=f"byte {error.start}: {error.reason}")
                continue
            yield Document(text=text) if text else Rejected(reason=EMPTY)


class RowSource(Source):
    """Rows with columns; the `text` or `messages` column becomes the document."""

    def __init__(self, text_column: str = "text") -> None:
        self.text_column = text_column

    @property
    @abstractmethod
    def columns(self) -> list[str]:
        """The columns of the source, or of its first row."""

    @cached_property
    def is_chat(self) -> bool:
        """Whether rows are chats: they have `messages`, and no other text column was requested.

        Raises ValueError, listing the columns, if there is neither.
        """
        if self.text_column in self.columns and self.text_column != "text":
            return False
        if "messages" in self.columns and self.text_column == "text":
            return True
        if self.text_column in self.columns:
            return False
        raise ValueError(
            f"{self.label} has no column {self.text_column!r}; its columns are {self.columns}: "
            "choose one with text_column (--text-column); chats need `messages`"
        )

    def document(self, row: dict[str, Any]) -> Document | Rejected:
        """The document of one row."""
        name = "messages" if self.is_chat else self.text_column
        value = row.get(name)
        if value is None:
            return Rejected(reason=NO_COLUMN, detail=f"no {name!r} among {sorted(row)}")
        if self.is_chat:
            return chat_document(value, row.get("tools"))
        return text_document(value, name)


class JsonLinesSource(RowSource):
    """One JSON object per line. Shard units: bytes of one file."""

    row_kind = "line"

    def __init__(self, label: str, files: Sequence[str], text_column: str = "text") -> None:
        super().__init__(text_column)
        self.label, self.files = label, list(files)

    def fingerprint(self) -> dict[str, Any]:
        states = [_file_state(path) for path in self.files]
        return {"kind": "lines", "files": states, "text_column": self.text_column}

    @cached_property
    def columns(self) -> list[str]:
        first_problem = "it is empty"
        for i, path in enumerate(self.files):
            whole = Shard(file=i, start=0, stop=sys.maxsize, num_bytes=0)
            for number, row in enumerate(self._rows(whole), 1):
                if isinstance(row, dict):
                    return list(row)
                if row is not None and first_problem == "it is empty":
                    first_problem = f"{path}:{number}: {row.detail}"
        raise ValueError(f"{self.label} contains no JSON object: {first_problem}")

    def num_bytes(self) -> int:
        return sum(_file_state(path)[1] for path in self.files)

    def shards(self, target_bytes: int) -> list[Shard]:
        spans = [
            (i, start, min(size, start + target_bytes))
            for i, size in enumerate(_file_state(path)[1] for path in self.files)
            for start in range(0, max(1, size), target_bytes)  # also for an unreadable file
        ]
        return [
            Shard(file=i, start=start, stop=stop, num_bytes=stop - start)
            for i, start, stop in spans
        ]

    def read(self, shard: Shard) -> Iterator[Document | Rejected | None]:
        for row in self._rows(shard):
            yield self.document(row) if isinstance(row, dict) else row

    def _rows(self, shard: Shard) -> Iterator[dict[str, Any] | Rejected | None]:
        """The parsed lines that begin in the shard; one rejection if its file cannot be read."""
        try:
            with open(self.files[shard.file], "rb") as file:
                position = 0
                if shard.start:
                    file.seek(shard.start - 1)
                    position = shard.start - 1 + len(file.readline())
                while position < shard.stop:
                    line = file.readline()
                    if not line:
                        return
                    position += len(line)
                    yield parse_line(line)
        except OSError as error:
            yield Rejected(reason=UNREADABLE, detail=str(error.strerror or error))


class DatasetSource(RowSource):
    """Rows of a `datasets.Dataset`, loaded on first use. Shard units: rows."""

    row_kind = "row"

    def __init__(
        self,
        label: str,
        *,
        load: dict[str, Any] | None = None,
        dataset: Any = None,
        text_column: str = "text",
    ) -> None:
        """`load`: arguments for `datasets.load_dataset`, or {"disk": path}."""
        super().__init__(text_column)
        self.label, self.files = label, [label]
        self._load, self._dataset = load, dataset

    @property
    def dataset(self) -> Any:
        if self._dataset is None:
            assert self._load is not None, "needs either `dataset` or `load`"
            self._dataset = _load_dataset(self.label, self._load)
        return self._dataset

    @property
    def columns(self) -> list[str]:
        return list(self.dataset.column_names)

    def fingerprint(self) -> dict[str, Any]:
        description: dict[str, Any] = {"kind": "rows", "text_column": self.text_column}
        if self._load is not None and "data_files" in self._load:  # without loading it
            states = [_file_state(path) for path in self._load["data_files"]]
            return {**description, "builder": self._load["path"], "files": states}
        return {**description, "dataset": self.dataset._fingerprint}

    def num_bytes(self) -> int:
        return max(self.dataset.data.nbytes, len(self.dataset))

    def shards(self, target_bytes: int) -> list[Shard]:
        num_rows = len(self.dataset)
        row_bytes = self.num_bytes() / max(1, num_rows)
        step = max(1, int(target_bytes / max(1.0, row_bytes)))
        spans = [(start, min(num_rows, start + step)) for start in range(0, num_rows, step)]
        return [
            Shard(file=0, start=start, stop=stop, num_bytes=int((stop - start) * row_bytes))
            for start, stop in spans
        ]

    def read(self, shard: Shard) -> Iterator[Document | Rejected]:
        wanted = [self.text_column, *(["messages", "tools"] if self.is_chat else [])]
        names = [name for name in self.columns if name in wanted]
        rows = self.dataset.select_columns(names).with_format(None)
        for start in range(shard.start, shard.stop, 64):
            batch = rows[start : min(start + 64, shard.stop)]
            for values in zip(*batch.values(), strict=True):
                yield self.document(without_none(dict(zip(batch, values, strict=True))))


def _file_state(path: str) -> tuple[str, int, int]:
    try:
        state = os.stat(path)
    except OSError:
        return os.path.abspath(path), 0, 0
    return os.path.abspath(path), state.st_size, state.st_mtime_ns


def _cut_rows(sizes: Sequence[int], target_bytes: int) -> list[Shard]:
    shards: list[Shard] = []
    start = total = 0
    for row, size in enumerate(sizes):
        total += size
        if total >= target_bytes or row + 1 == len(sizes):
            shards.append(Shard(file=0, start=start, stop=row + 1, num_bytes=total))
            start, total = row + 1, 0
    return shards


def _load_dataset(label: str, load: dict[str, Any]) -> Any:
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"reading {label} requires the package `datasets`: pip install 'hdp[hf]'; folders of "
            "text and .jsonl files do not need it"
        ) from None
    if not console.is_terminal(sys.stderr):
        datasets.disable_progress_bars()
    try:
        if "disk" in load:
            dataset = datasets.load_from_disk(load["disk"])
        else:
            dataset = datasets.load_dataset(**load)
    except Exception as error:  # it raises many classes, including network errors
        cause = f"{error}; {error.__cause__}" if error.__cause__ else str(error)
        is_file = "data_files" in load or "disk" in load
        hint = "" if is_file else " (not a local file or folder, so taken for a hub dataset)"
        raise ValueError(f"cannot load {label}{hint}: {cause}") from error
    if isinstance(dataset, dict):
        raise ValueError(f"{label} contains splits {list(dataset)}: pass the folder of one of them")
    return dataset
