"""Sealed directories: built by one process, and either complete or absent.

When four ranks start together and need the same cache, one builds it and three wait to read it.

  1. look     a directory whose seal matches its files is ready: no lock, no waiting
  2. lock     one builder per path and machine; the kernel drops the lock of a killed process
  3. build    in a temporary directory next to the final one
  4. seal     write `meta.json` last: metadata, and the size and checksum of every file
  5. rename   one atomic step; readers see the old state or the complete new one

Invariants, each with a test of the same name in tests/data/test_sealed.py:

* built_once                   processes that start at once build once and read the same files
* killed_build_leaves_nothing  after kill -9 at any point nothing opens, and the next start cleans
                               up and builds
* truncation_is_detected       a file whose size differs from the seal's breaks it: it is rebuilt
* damage_is_detected           so does a changed byte in the seal, in .npy and .json files, and in
                               others up to 64 MiB

On a file system without locks (some network mounts), several processes may build at once; the first
rename wins and the others discard their copies.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hdp import console

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]

Check = Callable[[Path, dict[str, Any]], None]

SEAL = "meta.json"
_CHECKED_BYTES = 64 << 20  # larger files are read only on request


def build_once(
    path: Path,
    build: Callable[[Path], dict[str, Any]],
    *,
    check: Check | None = None,
) -> bool:
    """Build the sealed directory `path` unless it exists; return whether this call built it.

    `build(directory)` fills an empty directory and returns metadata for the seal (JSON). If it
    raises, nothing is left behind. `check(directory, metadata)` may raise for a directory whose
    seal is intact; then it is rebuilt. Raises ValueError if the parent folder is not writable, and
    OSError, naming it, if it is full.
    """
    if read_seal(path, check=check) is not None:
        return False
    with _lock(path) as is_locked:
        if read_seal(path, check=check) is not None:  # another process was faster
            return False
        if is_locked:
            _remove_leftovers(path)
        directory = _temporary(path)
        try:
            directory.mkdir()
            _seal(directory, build(directory))
            _replace(directory, path, check)
        except OSError as error:  # reading is the source's part: this is about writing
            raise OSError(
                f"cannot write to the cache folder {path.parent}: {error.strerror or error}; free "
                "some space, or choose another folder with cache_dir (--cache-dir)"
            ) from error
        finally:
            shutil.rmtree(directory, ignore_errors=True)
    return True


def read_seal(
    path: Path, *, check: Check | None = None, every_byte: bool = False
) -> dict[str, Any] | None:
    """The seal's contents; None if the directory is missing, unsealed or damaged.

    every_byte: check large files, too, at the cost of reading them.
    """
    try:
        meta = json.loads((path / SEAL).read_text(encoding="utf-8"))
        if meta.pop("seal_crc") != _crc(json.dumps(meta, sort_keys=True).encode()):
            return None
        for name, size in meta["files"].items():
            if (path / name).stat().st_size != size:
                return None
            is_small = size <= _CHECKED_BYTES or name.endswith((".npy", ".json"))
            if (is_small or every_byte) and _file_crc(path / name) != meta["crcs"][name]:
                return None
        if check is not None:
            check(path, meta)
        return meta
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _seal(directory: Path, extra: dict[str, Any]) -> None:
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    for file in files:
        _flush_to_disk(file)
    names = {str(p.relative_to(directory)): p for p in files}
    meta = {
        **extra,
        "files": {name: p.stat().st_size for name, p in names.items()},
        "crcs": {name: _file_crc(p) for name, p in names.items()},
    }
    meta = json.loads(json.dumps(meta))  # as a reader will see it
    seal_crc = _crc(json.dumps(meta, sort_keys=True).encode())
    seal = directory / SEAL
    seal.write_text(json.dumps({**meta, "seal_crc": seal_crc}, indent=1), encoding="utf-8")
    _flush_to_disk(seal)
    _flush_to_disk(directory)


def _file_crc(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            crc = zlib.crc32(chunk, crc)
    return crc


def _crc(content: bytes) -> int:
    return zlib.crc32(content)


def _replace(directory: Path, path: Path, check: Check | None) -> None:
    """Rename `directory` to `path`, replacing a broken directory there but not an intact one."""
    for _ in range(8):
        try:
            os.replace(directory, path)
            _flush_to_disk(path.parent)
            return
        except OSError:
            if not os.path.lexists(path):
                raise
        if read_seal(path, check=check) is not None:  # without locks: another process was faster
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
