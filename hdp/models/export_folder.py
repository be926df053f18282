"""The folder of an export: it appears once complete, and replaces nothing but an earlier export.

An export is written to a folder of its own next to the target and renamed at the end, so a killed
or failed export leaves the old one intact. Overwriting or removing somebody's files would be worse
than failing, hence three rules:

* Each export lists its files in `hdp_export.json`, and only a folder that contains no others is
  ever replaced. (A run's folder has a config.json too.)
* The folder being written has a random name, is created, never opened, and carries a locked mark.
  What a killed export left behind is removed only if it bears the mark and nobody holds its lock.
* A target that is a link is refused.

    with new_export(target) as folder:      # fill folder; an exception removes it
        ...
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows: nothing abandoned is removed there
    fcntl = None  # type: ignore[assignment]

MARK = "hdp_export.json"
_WORK_MARK = ".hdp-export-in-progress"
_WORK, _OLD = ".hdp-new", ".hdp-old"  # suffixes of the folders next to the target


def check_target(path: str | os.PathLike) -> Path:
    """Return `path` resolved, if a model may be exported there. Call it before training starts.

    Raises ValueError if `path` is a link, holds anything other than an export, or its parent is
    not writable.
    """
    given = Path(path).expanduser()
    if given.is_symlink():
        raise ValueError(f"{given} is a link; pass the folder that it points to")
    target = given.resolve()
    parent = next((folder for folder in target.parents if folder.exists()), target)
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        raise ValueError(f"{target}: cannot write to {parent}; choose another folder")
    if not target.exists():
        return target
    if not target.is_dir():
        raise ValueError(f"{target} is a file; choose a folder for the exported model")
    if foreign := _foreign_files(target):
        listed = ", ".join(foreign[:4]) + (", ..." if len(foreign) > 4 else "")
        raise ValueError(
            f"{target} exists and holds files that no export wrote ({listed}); "
            "choose another folder"
        )
    return target


@contextlib.contextmanager
def new_export(target: Path) -> Iterator[Path]:
    """A new folder that becomes `target` at the end, or is removed if an exception is raised.

    target: as `check_target` returns it; it is checked again at the end, as hours may have passed.
    Raises ValueError like `check_target`, and OSError if the folder cannot be written or renamed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target)
    folder = _beside(target, _WORK)
    folder.mkdir()  # fails if anything has this name
    with _locked_mark(folder):
        try:
            yield folder
            files = sorted(_files(folder) - {_WORK_MARK})
            text = json.dumps({"files": files}, indent=1)
            (folder / MARK).write_text(text, encoding="utf-8")
            check_target(target)
            (folder / _WORK_MARK).unlink()
            _replace(target, folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def _replace(target: Path, folder: Path) -> None:
    """Rename `folder` to `target`; an old export is set aside first, and put back on failure."""
    old = _beside(target, _OLD)
    replaces = target.exists()
    if replaces:
        target.rename(old)
    try:
        folder.rename(target)
    except OSError:
        if replaces:
            old.rename(target)
        raise
    _remove_abandoned(target)  # among them the one set aside


def _beside(target: Path, suffix: str) -> Path:
    return target.with_name(f".{target.name[:100]}.{secrets.token_hex(8)}{suffix}")


@contextlib.contextmanager
def _locked_mark(folder: Path) -> Iterator[None]:
    """A mark in `folder`, locked while the export runs. It is locked before it gets its name."""
    unnamed = folder / f"{_WORK_MARK}.tmp"
    with unnamed.open("w") as file:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unnamed.rename(folder / _WORK_MARK)
        yield


def _remove_abandoned(target: Path) -> None:
    """Remove what killed exports to `target` left next to it. Errors are ignored.

    A set-aside export is kept as long as there is no other at `target`.
    """
    for folder in target.parent.iterdir():
        if not folder.name.startswith(f".{target.name[:100]}.") or folder.is_symlink():
            continue
        if folder.name.endswith(_WORK) and _is_abandoned(folder / _WORK_MARK):
            shutil.rmtree(folder, ignore_errors=True)
        is_old = folder.name.endswith(_OLD) and (folder / MARK).is_file()
        if is_old and target.exists() and not _foreign_files(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _is_abandoned(mark: Path) -> bool:
    """Whether `mark` is an export's and no process holds its lock."""
    if fcntl is None or mark.is_symlink() or not mark.is_file():
        return False
    try:
        with mark.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except OSError:
        return False


def _files(folder: Path) -> set[str]:
    """All files in `folder` and below, relative to it. Links are files; empty folders count."""
    found = set()
    for entry in folder.rglob("*"):
        is_folder = entry.is_dir() and not entry.is_symlink()
        if not is_folder or not any(entry.iterdir()):
            found.add(entry.relative_to(folder).as_posix())
    return found


def _foreign_files(folder: Path) -> list[str]:
    """Files in `folder` that its mark does not list: entries of the folder, then files below."""
    try:
        listed = json.loads((folder / MARK).read_text(encoding="utf-8"))["files"]
        own = {MARK, *map(str, listed)}
    except (OSError, ValueError, KeyError, TypeError):
        own = set()
    entries = {entry.name for entry in folder.iterdir()} - {name.partition("/")[0] for name in own}
    return sorted(entries or _files(folder) - own)
