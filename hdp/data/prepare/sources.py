"""Sources of documents, behind one small interface (source.py).

    FileSource          each text or code file is a document
    JsonLinesSource     JSON: one object per line, or arrays of objects
    TableSource         CSV, Parquet and Arrow files
    DatasetSource       rows of a `datasets.Dataset`: in memory, saved, or from the hub

Files are read here rather than by `datasets`, whose readers parse dates and numbers in text, fill
missing keys with null, stop at the first bad row without giving its line, and copy the data. So a
row means the same in every file (rows.py), compressed or not. Only this file imports `datasets`,
and only for its own objects, the hub, and the configurations in a folder's README.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Literal

from hdp import console
from hdp.installation import pip_install

from .documents import EMPTY, NOT_UTF8, UNREADABLE, Document, Rejected
from .files import READ_ERRORS, file_state, inner_suffix, is_compressed, open_file, problem
from .json_rows import Layout, layout, line_rows, value_rows
from .rows import FORMATS, columns_of
from .source import RowSource, Shard, Source
from .splits import canonical
from .tables import csv_rows, num_groups, table_rows


class FileSource(Source):
    """Each file is a document. Shard units: files."""

    is_chat = False
    row_kind = "file"

    def __init__(self, label: str, files: Sequence[str]) -> None:
        self.label, self.files = label, list(files)

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": "files", "files": [file_state(path) for path in self.files]}

    def num_bytes(self) -> int:
        return sum(file_state(path)[1] for path in self.files)

    def shards(self, target_bytes: int) -> list[Shard]:
        return _cut_rows([file_state(path)[1] for path in self.files], target_bytes)

    def read(self, shard: Shard) -> Iterator[Document | Rejected]:
        for path in self.files[shard.start : shard.stop]:
            yield self._document(path)

    def _document(self, path: str) -> Document | Rejected:
        if is_compressed(path) and inner_suffix(path) == ".tar":
            return Rejected(reason=UNREADABLE, detail="an archive: unpack it first")
        try:
            with open_file(path) as file:
                content = file.read()
        except READ_ERRORS as error:
            return Rejected(reason=UNREADABLE, detail=problem(error))
        try:
            text = content.decode("utf-8-sig")  # strips a byte order mark
        except UnicodeDecodeError as error:
            return Rejected(reason=NOT_UTF8, detail=f"byte {error.start}: {error.reason}")
        return Document(text=text) if text else Rejected(reason=EMPTY)


class _FileRows(RowSource):
    """Rows of files that are read here."""

    def __init__(
        self,
        label: str,
        files: Sequence[str],
        text_column: str = "text",
        row_format: str = "auto",
    ) -> None:
        super().__init__(text_column, row_format)
        self.label, self.files = label, list(files)

    def fingerprint(self) -> dict[str, Any]:
        return {
            "kind": type(self).__name__,
            "files": [file_state(path) for path in self.files],
            "text_column": self.text_column,
            "format": self.requested_format,
        }

    def num_bytes(self) -> int:
        return sum(file_state(path)[1] for path in self.files)


class JsonLinesSource(_FileRows):
    """JSON objects, one per line or in arrays. Shard units: bytes of one file.

    A file that is compressed, or holds an array, is one shard.
    """

    @property
    def row_kind(self) -> Literal["line", "row"]:  # type: ignore[override]
        return "line" if all(kind == "lines" for kind in self._layouts) else "row"

    @cached_property
    def _layouts(self) -> list[Layout | None]:
        """How each file holds its rows; None for one that cannot be read."""
        found: list[Layout | None] = []
        for path in self.files:
            try:
                found.append(layout(path))
            except READ_ERRORS:
                found.append("lines")  # reading it gives the reason
        return found

    def shards(self, target_bytes: int) -> list[Shard]:
        shards = []
        for i, path in enumerate(self.files):
            size = max(1, file_state(path)[1])  # also for an unreadable file
            step = target_bytes if self._is_divisible(i) else size
            for start in range(0, size, step):
                stop = min(size, start + step)
                whole = not self._is_divisible(i)
                shards.append(
                    Shard(
                        file=i,
                        start=start,
                        stop=sys.maxsize if whole else stop,
                        num_bytes=stop - start,
                    )
                )
        return shards

    def _is_divisible(self, file: int) -> bool:
        return self._layouts[file] == "lines" and not is_compressed(self.files[file])

    def rows(self, shard: Shard) -> Iterator[dict[str, Any] | Rejected | None]:
        path, kind = self.files[shard.file], self._layouts[shard.file]
        try:
            if kind == "lines":
                yield from line_rows(path, shard.start, shard.stop)
            else:
                yield from value_rows(path, is_array=kind == "array")
        except READ_ERRORS as error:
            yield Rejected(reason=UNREADABLE, detail=problem(error))

    def _without_rows(self, problem: str) -> str:
        return f"{self.label} contains no JSON object: {problem or 'it is empty'}"


class TableSource(_FileRows):
    """Rows of CSV, Parquet or Arrow files. Shard units: the parts of one file."""

    row_kind = "row"

    def shards(self, target_bytes: int) -> list[Shard]:
        shards = []
        for i, path in enumerate(self.files):
            size, count = file_state(path)[1], self._num_parts(path)
            step = max(1, int(target_bytes * count / max(1, size)))
            for start in range(0, count, step):
                stop = min(count, start + step)
                share = size * (stop - start) // count
                shards.append(Shard(file=i, start=start, stop=stop, num_bytes=share))
        return shards

    def _num_parts(self, path: str) -> int:
        return 1 if inner_suffix(path) in (".csv", ".tsv") else num_groups(path)

    def rows(self, shard: Shard) -> Iterator[dict[str, Any] | Rejected | None]:
        path = self.files[shard.file]
        if inner_suffix(path) not in (".csv", ".tsv"):
            yield from table_rows(path, shard.start, shard.stop)
            return
        try:
            yield from csv_rows(path)
        except READ_ERRORS as error:
            yield Rejected(reason=UNREADABLE, detail=problem(error))

    def _without_rows(self, problem: str) -> str:
        return f"cannot load {self.label}: {problem or 'it has no rows'}"


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
        row_format: str = "auto",
    ) -> None:
        """`load`: arguments for `datasets.load_dataset`, or {"disk": path}."""
        super().__init__(text_column, row_format)
        self.label, self.files = label, [label]
        self._load, self._dataset = load, dataset

    @property
    def dataset(self) -> Any:
        if self._dataset is None:
            assert self._load is not None, "needs either `dataset` or `load`"
            self._dataset = _load_dataset(self.label, self._load)
        return self._dataset

    def fingerprint(self) -> dict[str, Any]:
        return {
            "kind": "rows",
            "text_column": self.text_column,
            "format": self.requested_format,
            "dataset": self.dataset._fingerprint,
        }

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

    def rows(self, shard: Shard) -> Iterator[dict[str, Any]]:
        stop = min(shard.stop, len(self.dataset))
        used = self._used_columns()
        if not used:  # `datasets` returns nothing for such rows
            yield from ({} for _ in range(shard.start, stop))
            return
        rows = self.dataset.select_columns(used).with_format(None)
        for start in range(shard.start, stop, 64):
            batch = rows[start : min(start + 64, stop)]
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(batch, values, strict=True))

    def _used_columns(self) -> list[str]:
        """Those that a format may use: others, such as images, are not decoded for nothing."""
        wanted = {self.text_column}
        for name in FORMATS[2:]:
            wanted.update(*columns_of(name))
        return [name for name in self.dataset.column_names if name in wanted]

    def _all_rows(self) -> Iterator[tuple[str, dict[str, Any] | Rejected | None]]:
        yield self.label, dict.fromkeys(self.dataset.column_names)  # those that are not read, too
        yield from super()._all_rows()


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
            f"reading {label} requires the package `datasets`: {pip_install('hf')}; folders "
            "of text and .jsonl files do not need it"
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
        hint = "" if "disk" in load else " (not a local file or folder, so taken for a hub dataset)"
        raise ValueError(f"cannot load {label}{hint}: {cause}") from error
    return _saved_split(label, dataset, load["split"]) if "disk" in load else dataset


def _saved_split(label: str, dataset: Any, split: str) -> Any:
    """One split of a folder that `save_to_disk` wrote."""
    if isinstance(dataset, dict):
        name = split if split in dataset else canonical(split)
        if name not in dataset:
            raise ValueError(
                f"{label} has no split {split!r}; it has {', '.join(dataset)}: choose one with "
                "split (--split)"
            )
        return dataset[name]
    saved = str(dataset.split or "train")
    if split not in ("train", saved):
        raise ValueError(
            f"{label} was saved without splits, so split {split!r} does not apply: leave it out"
        )
    return dataset


def configured_files(folder: str, subset: str | None) -> dict[str, list[str]]:
    """{split: files} of a folder whose README has `configs`, as `datasets` reads them.

    Raises ValueError, listing the configurations, if there are several and `subset` names none.
    """
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"the README of {folder} has configurations, which require the package `datasets` to "
            f"read: {pip_install('hf')}, or choose files with a pattern"
        ) from None
    try:
        builder = datasets.load_dataset_builder(folder, subset)
    except Exception as error:  # it raises many classes
        cause = " ".join(str(error).partition("Example of usage")[0].split())
        hint = "" if subset else " (choose one with --subset)"
        raise ValueError(f"cannot load {folder}: {cause}{hint}") from error
    data_files = builder.config.data_files or {}
    return {str(split): [str(path) for path in paths] for split, paths in data_files.items()}
