"""Sealed directories: built by one process, and either complete or absent.

When four ranks start together and need the same cache, one builds it and three wait to read it.

  1. look     a directory whose seal matches its files is ready: no lock, no waiting
  2. lock     one builder per path and machine; the kernel drops the lock of a killed process
  3. build    in a temporary directory next to the final one
  4. seal     write `meta.json` last: metadata and the size of every file
  5. rename   one atomic step; readers see the old state or the complete new one

Invariants, each with a test of the same name in tests/data/test_sealed.py:

* built_once                   processes that start at once build once and read the same files
* killed_build_leaves_nothing  after kill -9 at any point nothing opens, and the next start cleans
                               up and builds
* truncation_is_detected       a file whose size differs from the seal's breaks it: it is rebuilt

On a file system without locks (some network mounts), several processes may build at once; the first
rename wins and the others discard their copies.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hdp import console

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]

SEAL = "meta.json"


def build_once(path: Path, build: Callable[[Path], dict[str, Any]]) -> bool:
    """Build the sealed directory `path` unless it exists; return whether this call built it.

    `build(directory)` fills an empty directory and returns metadata for the seal (JSON). If it
    raises, nothing is left behind. Raises ValueError if the parent folder is not writable.
    """
    if read_seal(path) is not None:
        return False
    with _lock(path) as is_locked:
        if read_seal(path) is not None:  # another process was faster
            return False
        if is_locked:
            _remove_leftovers(path)
        directory = _temporary(path)
        directory.mkdir()
        try:
            _seal(directory, build(directory))
            _replace(directory, path)
        finally:
            shutil.rmtree(directory, ignore_errors=True)
    return True


def read_seal(path: Path) -> dict[str, Any] | None:
    """The seal's contents; None if the directory is missing or unsealed, or a file size differs."""
    try:
        meta = json.loads((path / SEAL).read_text(encoding="utf-8"))
        sizes = meta["files"]
        if all((path / name).stat().st_size == size for name, size in sizes.items()):
            return meta
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return None


def _seal(directory: Path, extra: dict[str, Any]) -> None:
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    for file in files:
        _flush_to_disk(file)
    sizes = {str(p.relative_to(directory)): p.stat().st_size for p in files}
    seal = directory / SEAL
    seal.write_text(json.dumps({**extra, "files": sizes}, indent=1), encoding="utf-8")
    _flush_to_disk(seal)
    _flush_to_disk(directory)


def _replace(directory: Path, path: Path) -> None:
    """Rename `directory` to `path`, replacing a broken directory there but not an intact one."""
    for _ in range(8):
        try:
            os.replace(directory, path)
            _flush_to_disk(path.parent)
            return
        except OSError:
            if not os.path.lexists(path):
                raise
        if read_seal(path) is not None:  # without locks: another process was faster
            return
        # Rename before removing: no other process may see a half-removed directory.
        trash = _temporary(path)
        os.replace(path, trash)
        _remove(trash)
    raise OSError(f"cannot replace {path}: it keeps reappearing; is another program writing it?")


def _temporary(path: Path) -> Path:
    return path.parent / f"{path.name}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def _remove_leftovers(path: Path) -> None:
    """Remove what killed builds left. Call with the lock held: no other build of `path` runs."""
    for leftover in path.parent.glob(f"{path.name}.tmp-*"):
        _remove(leftover)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _flush_to_disk(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError:
        pass  # some file systems cannot sync a directory
    finally:
        os.close(fd)


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Hold the lock of `path`; yield False if the file system has no locks.

    The lock file is never removed: otherwise two processes could hold locks for the same path.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path.parent / f"{path.name}.lock", "ab")  # noqa: SIM115
    except OSError as error:
        raise ValueError(
            f"cannot write to the cache folder {path.parent} ({error.strerror}): choose another "
            "with cache_dir (--cache-dir)"
        ) from error
    with file:
        yield _acquire(file.fileno(), path)


def _acquire(fd: int, path: Path) -> bool:
    if fcntl is None:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        console.note(f"another process is building {path}; waiting for it")
    except OSError:
        return False
    fcntl.flock(fd, fcntl.LOCK_EX)
    return True
