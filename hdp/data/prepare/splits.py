"""Splits: which files of a folder are trained on, by their names.

Names are read as `datasets` reads them: data/train-00000-of-00004.parquet, test.jsonl,
validation/x.csv, my_dev.json. Files that name no split belong to train. Test data are never trained
on silently: a split that does not exist is an error, and what was left out is in the report.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

_ALIASES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_SHARDED = re.compile(r"(?P<split>\w[\w.-]*?)-\d{5}-of-\d{5}")
_SHOWN = 3


def split_of(path: str) -> str | None:
    """The split that a relative path names, or None.

    A folder or a file of that name; a file that begins or ends with it; SPLIT-00000-of-00004.
    """
    *folders, name = path.replace(os.sep, "/").split("/")
    stem = name.partition(".")[0] if not name.startswith(".") else name
    sharded = _SHARDED.match(name)
    if sharded:
        return canonical(sharded["split"])
    words = [word for word in re.split(r"[^A-Za-z]+", stem.lower()) if word]
    for word in (*words[:1], *words[-1:]):
        if word in _ALIASES:
            return _ALIASES[word]
    for folder in reversed(folders):
        if folder.lower() in _ALIASES:
            return _ALIASES[folder.lower()]
    return None


def canonical(split: str) -> str:
    """The split's usual name: "dev" is "validation", and so on."""
    return _ALIASES.get(split.lower(), split)


def choose_split(
    label: str, files: dict[str, str], split: str, *, is_explicit: bool = False
) -> tuple[list[str], list[str]]:
    """(the files of a split, notes for the report).

    Args:
        files: path -> relative path, whose folders may name a split.
        split: one split, or several as in train+validation.
        is_explicit: the files were given one by one: all of them are read for "train".

    Raises ValueError, listing the splits, if there is no such split.
    """
    wanted = _parse(label, split)
    if is_explicit and wanted == ["train"]:
        return list(files), []
    found: dict[str, list[str]] = {}
    for path, relative in files.items():
        stem = os.path.basename(relative).partition(".")[0]
        name = stem if stem in wanted else split_of(relative) or "train"
        found.setdefault(name, []).append(path)
    missing = [name for name in wanted if name not in found]
    if missing and list(found) == ["train"] and not any(map(split_of, files.values())):
        raise ValueError(
            f"{label} has no splits, so split {split!r} (--split) does not apply: leave it out, or "
            "choose files with a pattern"
        )
    if missing:
        raise ValueError(
            f"{label} has no split {missing[0]!r}; it has {', '.join(sorted(found))}: choose one "
            "with split (--split)"
        )
    chosen = [path for path in files if any(path in found[name] for name in wanted)]
    return chosen, split_notes(split, files, found, chosen)


def split_notes(
    split: str, names: dict[str, str], found: dict[str, list[str]], chosen: Sequence[str]
) -> list[str]:
    """A line for the report: which files were read, and which were left out."""
    others = {name: paths for name, paths in found.items() if not set(paths) <= set(chosen)}
    if not others:
        return []
    left_out = "; ".join(
        f"{name}: {_listed([names[path] for path in paths])}" for name, paths in others.items()
    )
    read = _listed([names[path] for path in chosen])
    return [f"split {split}: {read}; left out: {left_out}"]


def _parse(label: str, split: str) -> list[str]:
    if "[" in split:
        raise ValueError(
            f"split {split!r} of {label}: parts of a split work for data from the hub only; write "
            "the part to a file, or load it with `datasets` and pass the object"
        )
    wanted = [canonical(part.strip()) for part in split.split("+")]
    if not all(wanted):
        raise ValueError(f"split {split!r} names no split: use a name such as train or test")
    return wanted


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    more = len(names) - _SHOWN
    return f"{shown} and {more} more" if more > 0 else shown
