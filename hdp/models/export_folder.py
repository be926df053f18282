"""The folder of an exported model: it appears when it is complete, and replaces only its like.

An export ends by renaming a finished folder, so a killed one leaves what was there. What is there
may be anything that a path can name: a run's folder has a config.json too. So an export leaves a
list of its own files, `hdp_export.json`, and only a folder with such a list and nothing beside it
is replaced.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

MARK = "hdp_export.json"


def check_target(path: str | os.PathLike) -> Path:
    """`path`, resolved, if a model may be exported there; call it before hours of training.

    Raises ValueError if something else is there, or if its parent cannot be written.
    """
    target = Path(path).expanduser().resolve()
    parent = next(folder for folder in target.parents if folder.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise ValueError(f"{target}: cannot write into {parent}; choose another folder")
    if not target.exists():
        return target
    if not target.is_dir():
        raise ValueError(f"{target} is a file, not a folder for a model; choose another path")
    there = sorted(entry.name for entry in target.iterdir())
    strange = [name for name in there if name not in _own_files(target)]
    if strange:
        told = ", ".join(strange[:4]) + (", ..." if len(strange) > 4 else "")
        raise ValueError(
            f"{target} exists and is no exported model, or more than that: it holds {told}; "
            "choose another folder"
        )
    return target


def partial_path(target: Path) -> Path:
    """Where the export is while it is being written."""
    return target.with_name(target.name + ".partial")


def publish(target: Path) -> None:
    """Give the finished folder at `partial_path(target)` its name; an earlier export goes."""
    partial, replaced = partial_path(target), target.with_name(target.name + ".replaced")
    files = sorted(entry.name for entry in partial.iterdir())
    (partial / MARK).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")
    check_target(target)  # again: a run takes long
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        target.rename(replaced)
    partial.rename(target)
    shutil.rmtree(replaced, ignore_errors=True)


def _own_files(target: Path) -> set[str]:
    try:
        files = json.loads((target / MARK).read_text(encoding="utf-8"))["files"]
        return {MARK, *files}
    except (OSError, ValueError, KeyError, TypeError):
        return set()
