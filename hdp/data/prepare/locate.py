"""open_source(): from the name of some data to its source.

    open_source("stdlib")              the source files of the running Python's standard library
    open_source("~/project")           a folder: each text or code file is a document
    open_source("chats.jsonl")         one JSON object per line, with `text` or `messages`
    open_source("data/*.parquet")      rows through `datasets`; also .arrow, .csv, .jsonl.gz, ...
    open_source("user/name")           a dataset on the hub; a `datasets.Dataset` works, too

A folder of data files (.jsonl, .parquet, .arrow, .csv) is a table; any other folder is text. A
folder that mixes both is an error: guessing would train on raw JSON or skip half of the folder.
"""

from __future__ import annotations

import fnmatch
import os
import re
import sysconfig
from glob import glob, has_magic
from typing import Any

from .sources import DatasetSource, FileSource, JsonLinesSource, Source

_DATASETS_FORMATS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}
_LINES = (".jsonl", ".ndjson")
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".lz4")
_FILE_SUFFIXES = {*_DATASETS_FORMATS, *_LINES, *_COMPRESSED, ".json", ".txt", ".md", ".py"}
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def open_source(
    data: Any = "stdlib",
    *,
    text_column: str = "text",
    pattern: str | None = None,
    subset: str | None = None,
    split: str = "train",
) -> Source:
    """The source named by `data`.

    Args:
        data: "stdlib", a file, a folder, a glob, a list of files, a hub name, a `datasets.Dataset`
            or a Source.
        text_column: the column that holds the text, for data with rows.
        pattern: for a folder: comma-separated globs to match file names or relative paths.
        subset, split: of a hub dataset.

    Raises ValueError if the data does not exist, or if a folder mixes data files with text.
    """
    if isinstance(data, Source):
        return data
    if hasattr(data, "column_names") and hasattr(data, "select_columns"):
        if isinstance(data.column_names, dict):
            raise ValueError(
                f"got a dict of splits {list(data)}: pass one of them, such as data[{split!r}]"
            )
        if not hasattr(data, "__len__"):
            raise ValueError(
                "a streaming dataset has no length and no index: load it without streaming"
            )
        return DatasetSource("dataset", dataset=data, text_column=text_column)
    if isinstance(data, (list, tuple)):
        files = [_expand(path) for path in data]
        missing = [path for path in files if not os.path.isfile(path)]
        if missing:
            raise ValueError(f"no such file: {missing[0]} ({len(missing)} of {len(files)} missing)")
        return _file_source(f"{len(files)} files", files, text_column)
    if str(data) == "stdlib":
        root = sysconfig.get_paths()["stdlib"]
        return FileSource("stdlib", _walk(root, pattern or "*.py", "stdlib"))
    path = _expand(data)
    if os.path.isdir(path):
        if all(os.path.exists(f"{path}/{name}") for name in ("dataset_info.json", "state.json")):
            return DatasetSource(path, load={"disk": path}, text_column=text_column)
        return _file_source(path, _walk(path, pattern, path), text_column, is_folder=True)
    if os.path.isfile(path):
        return _file_source(path, [path], text_column)
    if has_magic(path):
        found = sorted(name for name in glob(path, recursive=True) if os.path.isfile(name))
        return _file_source(path, found, text_column)
    is_file_name = os.path.splitext(path.lower())[1] in _FILE_SUFFIXES
    if is_file_name or not _HUB_NAME.fullmatch(str(data)):
        raise ValueError(f"no such file or folder: {path}")
    load = {"path": str(data), "name": subset, "split": split}
    return DatasetSource(str(data), load=load, text_column=text_column)


def _file_source(
    label: str, files: list[str], text_column: str, *, is_folder: bool = False
) -> Source:
    if not files:
        raise ValueError(f"no files in {label}")
    formats = {path: _format(path, is_folder=is_folder) for path in files}
    if is_folder and any(formats.values()):
        formats = _folder_formats(label, formats)
    if len(set(formats.values())) > 1:
        first, other = _examples(formats)
        raise ValueError(
            f"{label} contains files of different kinds, such as {first} and {other}: pass one "
            "kind at a time"
        )
    files = [path for path in files if path in formats]
    file_format = formats[files[0]]
    if file_format is None:
        return FileSource(label, files)
    if file_format == "lines":
        return JsonLinesSource(label, files, text_column)
    load = {"path": file_format, "data_files": files, "split": "train"}
    return DatasetSource(label, load=load, text_column=text_column)


def _folder_formats(label: str, formats: dict[str, str | None]) -> dict[str, str | None]:
    """Formats for a folder with data files: those of one table, without its readme, or all text."""
    data = {path: kind for path, kind in formats.items() if kind or not _accompanies_data(path)}
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
    """The reader for a file: "lines", the name of a `datasets` builder, or None for text."""
    stem, suffix = os.path.splitext(path.lower())
    if suffix in _COMPRESSED:
        inner = os.path.splitext(stem)[1]
        return "json" if inner in (*_LINES, ".json") else _DATASETS_FORMATS.get(inner)
    if suffix in _LINES:
        return "lines"
    if suffix == ".json" and not is_folder:  # in a folder of code, .json is text like the rest
        with open(path, "rb") as file:
            return "json" if file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[" else "lines"
    return _DATASETS_FORMATS.get(suffix)


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
