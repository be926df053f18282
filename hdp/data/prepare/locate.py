"""open_source(): from the name of some data to its source.

    open_source("stdlib")              the source files of the running Python's standard library
    open_source("~/project")           a folder: each text or code file is a document
    open_source("chats.jsonl.gz")      rows: JSON, CSV, Parquet or Arrow, also compressed
    open_source("data/*.parquet")      a quoted glob
    open_source("user/name")           a dataset on the hub; a `datasets.Dataset` works, too

A folder of data files is a table; any other folder is text. A folder that mixes both is an error:
guessing would train on raw JSON or skip half of the folder. Where file names or the README tell
splits, one split is read (splits.py).
"""

from __future__ import annotations

import fnmatch
import os
import re
import sysconfig
from glob import glob, has_magic
from typing import Any

from .files import check_not_archive, inner_suffix, kind_of
from .json_rows import has_rows
from .rows import find_format
from .source import Source
from .sources import DatasetSource, FileSource, JsonLinesSource, TableSource, configured_files
from .splits import canonical, choose_split, split_notes

_TABLES = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".tsv": "csv"}
_LINES = (".jsonl", ".ndjson")
_FILE_SUFFIXES = {*_TABLES, *_LINES, ".json", ".txt", ".md", ".py", ".gz", ".bz2", ".xz", ".zst"}
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_README_CONFIGS = re.compile(r"\A---\s.*?^configs:.*?^---\s*$", re.DOTALL | re.MULTILINE)


def open_source(
    data: Any = "stdlib",
    *,
    text_column: str = "text",
    pattern: str | None = None,
    subset: str | None = None,
    split: str = "train",
    format: str = "auto",
) -> Source:
    """The source named by `data`.

    Args:
        data: "stdlib", a file, a folder, a glob, a list of files, a hub name, a `datasets.Dataset`
            or a Source.
        text_column: the column that holds the text, for data with rows.
        pattern: for a folder: comma-separated globs to match file names or relative paths.
        subset: a configuration of a hub dataset, or of a folder whose README has some.
        split: of a hub dataset (train[:10%] works), of a saved one, or of files whose names tell
            their split.
        format: what rows are, one of rows.FORMATS; "auto" follows from the columns.

    Raises ValueError if the data or the split does not exist, or if a folder mixes data files with
    text.
    """
    if isinstance(data, Source):
        return data
    columns = (text_column, format)
    _check_subset(data, subset)
    if hasattr(data, "column_names") and hasattr(data, "select_columns"):
        return _dataset_object(data, split, columns)
    if isinstance(data, (list, tuple)):
        files = [_expand(path) for path in data]
        missing = [path for path in files if not os.path.isfile(path)]
        if missing:
            raise ValueError(f"no such file: {missing[0]} ({len(missing)} of {len(files)} missing)")
        return _file_source(f"{len(files)} files", files, split, columns, is_explicit=True)
    if str(data) == "stdlib":
        root = sysconfig.get_paths()["stdlib"]
        return FileSource("stdlib", _walk(root, pattern or "*.py", "stdlib"))
    path = _expand(data)
    if os.path.isdir(path):
        return _folder_source(path, pattern, subset, split, columns)
    if os.path.isfile(path):
        return _file_source(path, [path], split, columns, is_explicit=True)
    if has_magic(path):
        found = sorted(name for name in glob(path, recursive=True) if os.path.isfile(name))
        return _file_source(path, found, split, columns)
    if os.path.exists(path):
        raise ValueError(
            f"{path} is {kind_of(path)}, not a regular file: data are read more than once, so "
            "write them to a file first"
        )
    is_file_name = os.path.splitext(path.lower())[1] in _FILE_SUFFIXES
    if is_file_name or not _HUB_NAME.fullmatch(str(data)):
        raise ValueError(f"no such file or folder: {path}")
    load = {"path": str(data), "name": subset, "split": split}
    return DatasetSource(str(data), load=load, text_column=text_column, row_format=format)


def _check_subset(data: Any, subset: str | None) -> None:
    """Raise ValueError for a subset of data that have none; folders are looked at later."""
    if subset is None:
        return
    is_name = isinstance(data, (str, os.PathLike)) and str(data) != "stdlib"
    path = _expand(data) if is_name else ""
    if not is_name or os.path.isfile(path) or (has_magic(path) and not os.path.isdir(path)):
        what = data if isinstance(data, (str, os.PathLike)) else f"a {type(data).__name__}"
        raise ValueError(
            f"subset {subset!r} (--subset) applies to hub datasets and to folders whose README "
            f"has `configs`; {what} has no subsets: leave it out"
        )


def _dataset_object(data: Any, split: str, columns: tuple[str, str]) -> Source:
    if isinstance(data.column_names, dict):
        raise ValueError(
            f"got a dict of splits {list(data)}: pass one of them, such as data[{split!r}]"
        )
    if not hasattr(data, "__len__"):
        raise ValueError(
            "a streaming dataset has no length and no index: load it without streaming"
        )
    text_column, row_format = columns
    return DatasetSource("dataset", dataset=data, text_column=text_column, row_format=row_format)


def _folder_source(
    path: str, pattern: str | None, subset: str | None, split: str, columns: tuple[str, str]
) -> Source:
    text_column, row_format = columns
    if os.path.exists(f"{path}/dataset_dict.json"):
        return DatasetSource(
            path,
            load={"disk": path, "split": split},
            text_column=text_column,
            row_format=row_format,
        )
    if all(os.path.exists(f"{path}/{name}") for name in ("dataset_info.json", "state.json")):
        return DatasetSource(
            path,
            load={"disk": path, "split": split},
            text_column=text_column,
            row_format=row_format,
        )
    if pattern is None and _has_configs(path):
        found = configured_files(path, subset)
        if split not in found and canonical(split) in found:
            split = canonical(split)
        if split not in found:
            raise ValueError(
                f"{path} has no split {split!r}; its README has {', '.join(sorted(found))}: choose "
                "one with split (--split)"
            )
        names = {file: os.path.relpath(file, path) for files in found.values() for file in files}
        source = _file_source(path, sorted(found[split]), "train", columns, is_explicit=True)
        source.notes = tuple(split_notes(split, names, found, found[split]))
        return source
    if subset is not None:
        raise ValueError(
            f"subset {subset!r} (--subset) applies to hub datasets and to folders whose README "
            f"has `configs`; {path} has none: choose files with a pattern"
        )
    return _file_source(path, _walk(path, pattern, path), split, columns, is_folder=True)


def _file_source(
    label: str,
    files: list[str],
    split: str,
    columns: tuple[str, str],
    *,
    is_folder: bool = False,
    is_explicit: bool = False,
) -> Source:
    if not files:
        raise ValueError(f"no files in {label}")
    formats = {path: _format(path, is_folder=is_folder) for path in files}
    if is_folder:
        formats = _folder_formats(label, formats, columns)
    if len(set(formats.values())) > 1:
        first, other = _examples(formats)
        raise ValueError(
            f"{label} contains files of different kinds, such as {first} and {other}: pass one "
            "kind at a time"
        )
    files = [path for path in files if path in formats]
    file_format = formats[files[0]]
    # In a folder of code, test.py is not a split.
    if file_format is not None or all(inner_suffix(path) == ".txt" for path in files):
        root = label if is_folder else os.path.commonpath([os.path.dirname(p) for p in files])
        names = {path: os.path.relpath(path, root or ".") for path in files}
        files, notes = choose_split(label, names, split, is_explicit=is_explicit)
    elif split != "train":
        raise ValueError(
            f"{label} is text without splits, so split {split!r} (--split) does not apply"
        )
    else:
        notes = []
    source = _reader(label, files, file_format, columns)
    source.notes = tuple(notes)
    return source


def _reader(
    label: str, files: list[str], file_format: str | None, columns: tuple[str, str]
) -> Source:
    if file_format is None:
        if columns[1] not in ("auto", "text"):
            raise ValueError(f"{label} is text, not rows: format {columns[1]!r} does not apply")
        return FileSource(label, files)
    reader = JsonLinesSource if file_format == "json" else TableSource
    return reader(label, files, *columns)


def _has_configs(path: str) -> bool:
    """Whether the README of a folder tells its configurations and splits, in its front matter."""
    try:
        with open(f"{path}/README.md", encoding="utf-8", errors="replace") as file:
            return _README_CONFIGS.search(file.read(1 << 20)) is not None
    except OSError:
        return False


def _folder_formats(
    label: str, formats: dict[str, str | None], columns: tuple[str, str]
) -> dict[str, str | None]:
    """Formats for a folder: those of one table, without its readme, or all text."""
    data = {path: kind for path, kind in formats.items() if kind or not _accompanies_data(path)}
    if not any(formats.values()):
        # In a folder of code, .json is text like the rest, unless all of it holds rows.
        is_json = bool(data) and all(inner_suffix(path) == ".json" for path in data)

        def recognized(names: list[str]) -> bool:
            return find_format(names, *columns) is not None

        return (
            dict.fromkeys(data, "json") if is_json and has_rows(min(data), recognized) else formats
        )
    if len(set(data.values())) == 1:
        return data
    if set(formats.values()) <= {"csv", None}:  # code often comes with tables
        return dict.fromkeys(formats)
    first, other = _examples(data)
    raise ValueError(
        f"{label} contains both data files and others, such as {first} and {other}: choose with a "
        "pattern, such as '*.jsonl' or '*.py,*.md', or list the files"
    )


def _examples(formats: dict[str, str | None]) -> tuple[str, str]:
    """Two files of different kinds."""
    first = max(formats, key=lambda path: formats[path] or "")
    return first, next(path for path in formats if formats[path] != formats[first])


def _format(path: str, *, is_folder: bool = False) -> str | None:
    """The reader for a file: "json", the kind of a table, or None for text."""
    if not is_folder:
        check_not_archive(path)
    suffix = inner_suffix(path)
    if suffix in _LINES or (suffix == ".json" and not is_folder):
        return "json"
    return _TABLES.get(suffix)


def _accompanies_data(path: str) -> bool:
    """Whether a file accompanies data rather than being part of it."""
    name = os.path.basename(path).lower()
    return name.startswith(("readme", "license", "dataset_info"))


def _walk(root: str, pattern: str | None, label: str) -> list[str]:
    """Files below `root`, sorted, without hidden files, caches and installed packages.

    Links to folders are followed, but each folder is visited only once. A folder that cannot be
    listed is part of the result: reading it gives a rejection instead of silently skipping it.
    """
    globs = [part.strip() for part in pattern.split(",")] if pattern else ["*"]
    found: list[str] = []

    def keep_unlisted(error: OSError) -> None:
        found.append(str(error.filename))

    walked = set()
    for folder, folders, names in os.walk(root, onerror=keep_unlisted, followlinks=True):
        if (real_path := os.path.realpath(folder)) in walked:
            folders[:] = []
            continue
        walked.add(real_path)
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and name not in ("__pycache__", "site-packages")
        )
        for name in names:
            path = os.path.join(folder, name)
            relative = os.path.relpath(path, root)
            matches = any(fnmatch.fnmatch(name, g) or fnmatch.fnmatch(relative, g) for g in globs)
            if matches and not name.startswith("."):
                found.append(path)
    if not found:
        raise ValueError(f"no files match {pattern or '*'!r} in {label} ({root})")
    return sorted(found)


def _expand(path: Any) -> str:
    return os.path.expanduser(os.fspath(path))
