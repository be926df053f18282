"""A run's checkpoint folder: its layout, and how it changes while staying consistent.

    checkpoints/
      .lock                       held by rank 0 of the run that writes here
      step-00000100/              complete: renamed to this after everything is on disk
        hdp.json                  format, step, model config, the run's state, size of each file
        .metadata, *.distcp       files of torch.distributed.checkpoint
      .saving-step-00000200-4f1c/ in progress, or left by a killed save: removed at the next start
      .removing-step-00000050/    being deleted: removed at the next start

Every change is one rename, so a process can be killed at any point:

    save                write all, then    .saving-X -> X
    save X again        X -> .replaced-X   .saving-X -> X   (if X is missing at the next start,
                                                             .replaced-X is renamed back)
    delete              X -> .removing-X   then delete the files

The latest checkpoint is the one with the highest serial number, which each commit increments, not
the one with the highest step: after going back from step 200 to 100, step-110 is the latest.

No torch here, and no communication: checkpointer.py calls the writing functions only on rank 0.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import re
import shutil
import socket
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

INFO_FILE = "hdp.json"
FORMAT = "hdp-checkpoint"
FORMAT_VERSION = 2  # version 1 had no checksum of hdp.json itself
_NAME = re.compile(r"step-(\d{8,})")
_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """The expected size and checksum of a checkpoint file."""

    num_bytes: int
    crc32: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """The contents of hdp.json."""

    step: int
    serial: int  # increases by one with each commit to the folder
    world_size: int
    hdp_version: str
    torch_version: str
    model_config: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)  # the run's state: sampler, schedule, seed
    files: dict[str, FileRecord] = field(default_factory=dict)

    def write(self, directory: Path) -> None:
        """Write hdp.json and flush it to disk."""
        data = {"format": FORMAT, "version": FORMAT_VERSION, **asdict(self)}
        text = json.dumps({**data, "crc32": _json_crc32(data)}, indent=1)
        with open(directory / INFO_FILE, "w", encoding="ascii") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def read(cls, checkpoint: Path) -> CheckpointInfo:
        """Read hdp.json. Raises ValueError, with the file and a remedy, if it is unusable."""
        path = checkpoint / INFO_FILE
        if not checkpoint.is_dir():
            found = ", ".join(other.name for other in committed(checkpoint.parent)) or "none"
            raise ValueError(f"{checkpoint} does not exist; checkpoints in its folder: {found}")
        if not path.is_file():
            raise ValueError(
                f"{checkpoint} is not an hdp checkpoint: it has no {INFO_FILE}; "
                f"{_remedy(checkpoint)}"
            )
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["format"] != FORMAT:
                raise KeyError("format")
            if (version := data["version"]) not in (1, FORMAT_VERSION):
                raise ValueError(
                    f"{checkpoint} has format version {version}, but this hdp reads "
                    f"{FORMAT_VERSION}; use hdp {data.get('hdp_version')}, which wrote it"
                )
            if version > 1 and data.pop("crc32") != _json_crc32(data):
                raise ValueError(
                    f"{path} is damaged: its checksum differs from the one written; "
                    f"{_remedy(checkpoint)}"
                )
            del data["format"], data["version"]
            data["files"] = {name: FileRecord(**record) for name, record in data["files"].items()}
            info = cls(**data)
            info._check_types()
            return info
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(
                f"{path} is truncated or damaged ({error}); {_remedy(checkpoint)}"
            ) from error
        except (KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path} was not written by hdp ({error!r}); {_remedy(checkpoint)}"
            ) from error

    def _check_types(self) -> None:
        """Raise TypeError for a value that `write` cannot have written."""
        for name in ("step", "serial", "world_size"):
            value = getattr(self, name)
            if type(value) is not int or value < (name == "world_size"):
                raise TypeError(f"{name}: {value!r}")
        for name in ("model_config", "extra"):
            if not isinstance(getattr(self, name), dict):
                raise TypeError(f"{name}: {getattr(self, name)!r}")
        for name, record in self.files.items():
            if type(record.num_bytes) is not int or type(record.crc32) is not int:
                raise TypeError(f"{name}: {record}")
            if Path(name).name != name:
                raise TypeError(f"{name!r} is not in the checkpoint")

    def verify(self, checkpoint: Path, names: Iterable[str]) -> None:
        """Compare the named files with their records. Raises ValueError for the first mismatch."""
        for name in names:
            path, record = checkpoint / name, self.files[name]
            if not path.is_file():
                raise ValueError(f"{path} is missing; {_remedy(checkpoint)}")
            if (num_bytes := path.stat().st_size) != record.num_bytes:
                raise ValueError(
                    f"{path} is truncated or replaced: it has {num_bytes} bytes, but "
                    f"{record.num_bytes} were written; {_remedy(checkpoint)}"
                )
            if checksum(path) != record.crc32:
                raise ValueError(
                    f"{path} is damaged: its checksum differs from the one written; "
                    f"{_remedy(checkpoint)}"
                )


def _json_crc32(data: dict[str, Any]) -> int:
    """CRC-32 of the values, however they are laid out in the file."""
    return zlib.crc32(json.dumps(data, sort_keys=True).encode("ascii"))


def _remedy(checkpoint: Path) -> str:
    others = [path for path in committed(checkpoint.parent) if path.name != checkpoint.name]
    if others and _NAME.fullmatch(checkpoint.name):
        return f"remove it to resume from {others[-1].name}, or choose another checkpoint"
    return "remove it to start from scratch, or choose another checkpoint"


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            crc = zlib.crc32(chunk, crc)
    return crc


class ChecksumStream:
    """Computes the CRC-32 of a binary file that is written from start to end."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.num_bytes = self.crc32 = 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._stream.write(view)
        self.crc32 = zlib.crc32(view, self.crc32)
        self.num_bytes += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        return self.num_bytes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def step_path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}"


def saving_path(final: Path, run_id: str) -> Path:
    """Where a checkpoint is while it is being written. Each start of a run has its own `run_id`."""
    return final.with_name(f".saving-{final.name}-{run_id}")


def committed(directory: Path) -> list[Path]:
    """Complete checkpoints in commit order; one with an unreadable hdp.json comes last.

    The caller is meant to fail on that one: silently resuming from an older state loses work.
    """

    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: (_serial(path), path.name))


def _serial(checkpoint: Path) -> float:
    """The place in the order of commits; inf if hdp.json is unreadable."""
    try:
        data = json.loads((checkpoint / INFO_FILE).read_text(encoding="utf-8"))
        is_intact = data["version"] == 1 or data.pop("crc32") == _json_crc32(data)
        return int(data["serial"]) if is_intact else math.inf
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return math.inf


def next_serial(directory: Path) -> int:
    serials = [0]
    for path in committed(directory):
        with contextlib.suppress(ValueError):
            serials.append(CheckpointInfo.read(path).serial)
    return max(serials) + 1


def commit(saved: Path, final: Path) -> None:
    """Rename a finished save to its final name, which makes it the run's latest checkpoint."""
    replaced = final.with_name(f".replaced-{final.name}")
    sync_directory(saved)
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    saved.rename(final)
    sync_directory(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def prune(directory: Path, keep_last: int, keep_step: int | None = None) -> None:
    """Delete all but the last `keep_last` checkpoints and that of `keep_step`.

    Unreadable ones are left alone.
    """
    readable = [path for path in committed(directory) if _serial(path) < math.inf]
    for path in readable[:-keep_last]:
        if keep_step is not None and path == step_path(directory, keep_step):
            continue
        removing = path.with_name(f".removing-{path.name}")
        shutil.rmtree(removing, ignore_errors=True)
        path.rename(removing)
        shutil.rmtree(removing, ignore_errors=True)


def clean(directory: Path) -> None:
    """Remove what killed saves left; restore a checkpoint whose replacement was not finished."""
    for path in directory.glob(".replaced-step-*"):
        final = path.with_name(path.name.removeprefix(".replaced-"))
        if not final.exists():
            path.rename(final)
    for prefix in (".replaced-", ".saving-", ".removing-"):
        for path in directory.glob(f"{prefix}step-*"):
            shutil.rmtree(path, ignore_errors=True)


def sync_directory(directory: Path) -> None:
    """Flush a directory's entries to disk, on file systems that support it."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Lock:
    """Allows one writing run per folder. The kernel releases it when the process ends or dies."""

    def __init__(self, directory: Path) -> None:
        """Acquire the lock. Raises ValueError if another process holds it."""
        path = directory / ".lock"
        self._file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - held until close()
        try:
            # A record lock, which children that outlive this process do not inherit, unlike flock.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            self._file.close()
            raise ValueError(
                f"{directory} is in use by another run ({holder}); stop it or use another folder"
            ) from error
        except OSError:
            return  # the file system has no locks
        self._file.truncate(0)
        self._file.write(f"{socket.gethostname()} pid {os.getpid()}\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
