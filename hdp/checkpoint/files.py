"""Checkpoint files: reads and writes sharded state through torch.distributed.checkpoint.

The only file that imports it. checkpointer.py decides when and where to save; this file implements
how: tensor names, compatibility checks, files with checksums, and the commit as the last step of
torch's protocol (it runs on rank 0 once all ranks have written; an error on any rank is raised on
all).
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from .directory import (
    CheckpointInfo,
    ChecksumStream,
    FileRecord,
    checksum,
    commit,
    next_serial,
    prune,
)

# Names that do not depend on the order of parameters and parameter groups.
_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)
ERRORS = (Exception, CheckpointException)  # CheckpointException is not an Exception


# ---- state ----


def state_of(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    averages: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, dict[str, Any]]:
    """Sharded state by name. Initializes the (zero) state of a new optimizer."""
    state: dict[str, dict[str, Any]] = {"model": dict(get_model_state_dict(model))}
    if optimizer is not None:
        state["optimizer"] = dict(get_optimizer_state_dict(model, optimizer, options=_OPTIONS))
    if averages is not None:
        state["ema"] = dict(averages)  # the tensors themselves: `fetch` fills them in place
    return state


def check_fits(state: Mapping[str, Any], metadata: Metadata, checkpoint: Path) -> None:
    """Raise ValueError unless names, shapes and dtypes of all tensors match the checkpoint's."""
    saved = metadata.state_dict_metadata
    expected = {f"{part}.{name}": value for part, d in state.items() for name, value in d.items()}
    parts = tuple(f"{part}." for part in state)
    problems = [f"{name} is missing" for name in expected if name not in saved]
    problems += [
        f"{name} is not in this model"
        for name in saved
        if name.startswith(parts) and name not in expected
    ]
    for name, value in expected.items():
        stored = saved.get(name)
        if isinstance(value, torch.Tensor) and isinstance(stored, TensorStorageMetadata):
            theirs = (stored.properties.dtype, tuple(stored.size))
            ours = (value.dtype, tuple(value.shape))
            if theirs != ours:
                problems.append(
                    f"{name} is {theirs[0]} {theirs[1]} there and {ours[0]} {ours[1]} here"
                )
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(
            f"{checkpoint} does not match this model or optimizer: {'; '.join(problems[:4])}{more};"
            " choose a checkpoint of this model, or another folder"
        )


def put_state(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    state: Mapping[str, dict[str, Any]],
) -> None:
    """Set the state: the inverse of `state_of`."""
    set_model_state_dict(model, state["model"])
    if optimizer is not None:
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=_OPTIONS)


# ---- reading ----


def read_metadata(checkpoint: Path) -> Metadata:
    """Names, shapes and locations of a checkpoint's tensors.

    Raises ValueError for a file that refers to anything else, since unpickling it would run code.
    """
    return _Reader(checkpoint).read_metadata()


def has_part(metadata: Metadata, part: str) -> bool:
    """Whether a checkpoint has tensors of a part of `state_of`."""
    return any(name.startswith(f"{part}.") for name in metadata.state_dict_metadata)


def rng_buffer(metadata: Metadata, rank: int) -> torch.Tensor:
    """An empty buffer for the result of `pack_rng` on `rank`."""
    saved = cast(TensorStorageMetadata, metadata.state_dict_metadata[f"rng.{rank}"])
    return torch.empty(saved.size, dtype=torch.uint8)


def fetch(state: dict[str, Any], checkpoint: Path, group: dist.ProcessGroup) -> None:
    """Fill `state` in place, resharding as needed. Collective; raises ERRORS on all ranks."""
    reader = _Reader(checkpoint)
    dcp.load(state, storage_reader=reader, planner=_LoadPlanner(), process_group=group)


class _MetadataUnpickler(pickle.Unpickler):
    """Builds only what torch puts into .metadata; a checkpoint may come from a stranger."""

    # One by one: a module's other names include all that it imports, such as `dataclass`, which
    # compiles code from what it is given.
    _ALLOWED = re.compile(
        r"torch\.distributed\.checkpoint\.metadata\.(Metadata|MetadataIndex|TensorProperties"
        r"|TensorStorageMetadata|BytesStorageMetadata|ChunkStorageMetadata|StorageMeta"
        r"|_MEM_FORMAT_ENCODING)|torch\.distributed\.checkpoint\.filesystem\._StorageInfo"
        r"|torch\.serialization\._get_layout|torch\.Size|torch\.device"
        r"|torch\.(bool|u?int(8|16|32|64)|b?float(16|32|64)|float8_[a-z0-9]+|complex(64|128))"
        r"|pathlib\.(Pure)?(Posix|Windows)?Path|collections\.OrderedDict|builtins\.(set|frozenset)"
    )

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if not self._ALLOWED.fullmatch(full):
            raise pickle.UnpicklingError(f"it refers to {full}")
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    """torch's reader, but reading a checkpoint runs no code from it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            metadata = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
            if not isinstance(metadata, Metadata):
                raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}")
        except Exception as error:  # damaged pickles raise many classes
            raise ValueError(f"{path} was not written by torch ({error}); remove it") from error
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _LoadPlanner(DefaultLoadPlanner):
    """torch's planner, which unpickles values that are not tensors, but only if that is safe."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)  # raises for anything but plain data
        value.seek(0)
        super().load_bytes(read_item, value)


# ---- writing ----


def make_stager(*, pinned: bool) -> DefaultStager:
    """A stager that copies state synchronously to host buffers, which all saves reuse."""
    return DefaultStager(
        StagingOptions(
            use_pinned_memory=pinned,
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=pinned,
        )
    )


def save_async(
    state: dict[str, Any],
    info: CheckpointInfo,
    *,
    path: Path,
    final: Path,
    keep_last: int | None,
    keep_step: int | None,
    group: dist.ProcessGroup,
    stager: DefaultStager,
) -> Future[Any]:
    """Copy `state`, then write it to `path` in the background and commit it as `final`.

    If any rank fails, the future raises one of ERRORS on all ranks.
    """
    writer = _Writer(path, final, info, keep_last, keep_step)
    saving = dcp.async_save(state, storage_writer=writer, process_group=group, async_stager=stager)
    return cast("Future[Any]", saving)


def reason(error: BaseException) -> str:
    """The end of a message, such as " on rank 2: OSError: No space left on device"."""
    failures = getattr(error, "failures", None)
    if not failures:
        return f": {_in_words(error)}"
    cause = failures[min(failures)][0]
    ranks = ", ".join(map(str, sorted(failures)[:8]))
    return f" on rank {ranks}: {_in_words(cause)}"


def _in_words(error: BaseException) -> str:
    text = str(error).splitlines()[0] if str(error) else ""
    if "enforce fail at inline_container" in text or "PytorchStreamWriter failed" in text:
        # How torch's archive writer reports any failed write, whatever the cause.
        return "the disk took no more data: it is full, or a quota is; make room for the next save"
    return f"{type(error).__name__}: {text}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _WrittenFile:
    """The record of a file, sent to rank 0 with the results of torch's writer."""

    name: str
    record: FileRecord


class _Writer(dcp.FileSystemWriter):
    """torch's writer with checksums; `finish` commits the checkpoint.

    torch calls `finish` on rank 0 when all ranks have written, and raises any step's error on all.
    """

    def __init__(
        self,
        path: Path,
        final: Path,
        info: CheckpointInfo,
        keep_last: int | None,
        keep_step: int | None,
    ) -> None:
        super().__init__(path, single_file_per_rank=True, sync_files=True)
        self._final, self._info = final, info
        self._keep_last, self._keep_step = keep_last, keep_step
        self._files = _ChecksumFiles()
        self.fs = self._files

    def prepare_local_plan(self, plan: Any) -> Any:
        return plan  # torch's version creates the folder here, on all ranks

    def prepare_global_plan(self, plans: list[Any]) -> list[Any]:
        shutil.rmtree(self.path, ignore_errors=True)  # of a failed save
        self.fs.mkdir(self.path)
        return super().prepare_global_plan(plans)

    def write_data(self, plan: Any, planner: Any) -> Any:
        results: list[Any] = super().write_data(plan, planner).wait()
        results += [_WrittenFile(name=name, record=r) for name, r in self._files.records.items()]
        future: torch.futures.Future[Any] = torch.futures.Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        path = Path(self.path)
        written = [x for rank in results for x in rank if isinstance(x, _WrittenFile)]
        files = {item.name: item.record for item in written}
        for name, record in files.items():
            if not (path / name).is_file() or (path / name).stat().st_size != record.num_bytes:
                raise OSError(
                    f"{path / name} is missing or has another size than was written; do all nodes "
                    "share the folder?"
                )
        super().finish(
            metadata, [[x for x in rank if not isinstance(x, _WrittenFile)] for rank in results]
        )
        index = path / ".metadata"
        files[index.name] = FileRecord(num_bytes=index.stat().st_size, crc32=checksum(index))
        serial = next_serial(self._final.parent)
        dataclasses.replace(self._info, serial=serial, files=files).write(path)
        commit(path, self._final)
        if self._keep_last is not None:
            with contextlib.suppress(OSError):  # the save itself succeeded
                prune(self._final.parent, self._keep_last, self._keep_step)


class _ChecksumFiles(FileSystem):
    """A file system that records the size and CRC-32 of the files it writes."""

    def __init__(self) -> None:
        self.records: dict[str, FileRecord] = {}

    @contextlib.contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream:
            checked = ChecksumStream(stream)
            yield checked
        if Path(path).suffix == ".distcp":
            record = FileRecord(num_bytes=checked.num_bytes, crc32=checked.crc32)
            self.records[Path(path).name] = record
