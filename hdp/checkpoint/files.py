"""Checkpoint files: sharded state in and out through torch.distributed.checkpoint.

The one file that imports it. checkpointer.py decides when and where; here is how: names of tensors,
what must fit what, files with checksums, and the commit as the last act of torch's own protocol
(it runs on rank 0 once all ranks have written, and what any rank raises is raised on all).
"""

from __future__ import annotations

import contextlib
import dataclasses
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
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
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

# One name per tensor whatever the order of parameters and groups.
_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)
ERRORS = (Exception, CheckpointException)  # torch derives its own from BaseException


# ---- state ----


def state_of(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer | None
) -> dict[str, dict[str, Any]]:
    """Sharded state by name; a fresh optimizer gets its (zero) state here."""
    state: dict[str, dict[str, Any]] = {"model": dict(get_model_state_dict(model))}
    if optimizer is not None:
        state["optimizer"] = dict(get_optimizer_state_dict(model, optimizer, options=_OPTIONS))
    return state


def check_fits(state: Mapping[str, Any], metadata: Metadata, checkpoint: Path) -> None:
    """ValueError unless the checkpoint has exactly this model's tensors, in shape and dtype."""
    saved = metadata.state_dict_metadata
    wanted = {f"{part}.{name}": value for part, d in state.items() for name, value in d.items()}
    parts = tuple(f"{part}." for part in state)
    problems = [f"{name} is missing" for name in wanted if name not in saved]
    problems += [
        f"{name} is not in this model"
        for name in saved
        if name.startswith(parts) and name not in wanted
    ]
    for name, value in wanted.items():
        there = saved.get(name)
        if isinstance(value, torch.Tensor) and isinstance(there, TensorStorageMetadata):
            shapes = (tuple(there.size), tuple(value.shape))
            dtypes = (there.properties.dtype, value.dtype)
            if shapes[0] != shapes[1] or dtypes[0] != dtypes[1]:
                problems.append(
                    f"{name} is {dtypes[0]} {shapes[0]} there and {dtypes[1]} {shapes[1]} here"
                )
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(
            f"{checkpoint} does not fit this model or optimizer: {'; '.join(problems[:4])}{more}; "
            "name a checkpoint of this model, or use another folder"
        )


def put_state(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    state: Mapping[str, dict[str, Any]],
) -> None:
    """Inverse of `state_of`."""
    set_model_state_dict(model, state["model"])
    if optimizer is not None:
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=_OPTIONS)


# ---- reading ----


def read_metadata(checkpoint: Path) -> Metadata:
    """Names, shapes and places of a checkpoint's tensors."""
    return dcp.FileSystemReader(checkpoint).read_metadata()


def rng_buffer(metadata: Metadata, rank: int) -> torch.Tensor:
    """Room for what `pack_rng` gave on `rank`."""
    saved = cast(TensorStorageMetadata, metadata.state_dict_metadata[f"rng.{rank}"])
    return torch.empty(saved.size, dtype=torch.uint8)


def fetch(state: dict[str, Any], checkpoint: Path, group: dist.ProcessGroup) -> None:
    """Fill `state` in place, resharding as needed. Collective; raises ERRORS on all ranks."""
    dcp.load(state, storage_reader=dcp.FileSystemReader(checkpoint), process_group=group)


# ---- writing ----


def make_stager(*, pinned: bool) -> DefaultStager:
    """Copies state to host buffers that it keeps for all saves; done when the call returns."""
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
    group: dist.ProcessGroup,
    stager: DefaultStager,
) -> Future[Any]:
    """Copy `state`, then write it in the background to `path` and commit it as `final`.

    The future raises one of ERRORS, on all ranks, if any rank failed.
    """
    writer = _Writer(path, final, info, keep_last)
    saving = dcp.async_save(state, storage_writer=writer, process_group=group, async_stager=stager)
    return cast("Future[Any]", saving)


def reason(error: BaseException) -> str:
    """Like " on rank 2: OSError: No space left on device"."""
    failures = getattr(error, "failures", None)
    if not failures:
        return f": {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    cause = failures[min(failures)][0]
    named = ", ".join(map(str, sorted(failures)[:8]))
    return f" on rank {named}: {type(cause).__name__}: {cause}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Written:
    """Travels to rank 0 with the results of torch's writer."""

    name: str
    record: FileRecord


class _Writer(dcp.FileSystemWriter):
    """torch's writer, with checksums; `finish`, on rank 0, is the commit.

    torch calls `finish` when all ranks have written, and passes on to all what any step raises.
    """

    def __init__(self, path: Path, final: Path, info: CheckpointInfo, keep_last: int | None):
        super().__init__(path, single_file_per_rank=True, sync_files=True)
        self._final, self._info, self._keep_last = final, info, keep_last
        self._files = _ChecksumFiles()
        self.fs = self._files

    def prepare_local_plan(self, plan: Any) -> Any:
        return plan  # torch's makes the folder here, on all ranks

    def prepare_global_plan(self, plans: list[Any]) -> list[Any]:
        shutil.rmtree(self.path, ignore_errors=True)  # of a failed save
        self.fs.mkdir(self.path)
        return super().prepare_global_plan(plans)

    def write_data(self, plan: Any, planner: Any) -> Any:
        results: list[Any] = super().write_data(plan, planner).wait()
        results += [_Written(name=name, record=r) for name, r in self._files.records.items()]
        future: torch.futures.Future[Any] = torch.futures.Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        path = Path(self.path)
        written = [x for rank in results for x in rank if isinstance(x, _Written)]
        files = {item.name: item.record for item in written}
        for name, record in files.items():
            if not (path / name).is_file() or (path / name).stat().st_size != record.num_bytes:
                raise OSError(f"{path / name} is not as written; do all nodes share the folder?")
        super().finish(
            metadata, [[x for x in rank if not isinstance(x, _Written)] for rank in results]
        )
        own = path / ".metadata"
        files[own.name] = FileRecord(num_bytes=own.stat().st_size, crc32=checksum(own))
        serial = next_serial(self._final.parent)
        dataclasses.replace(self._info, serial=serial, files=files).write(path)
        commit(path, self._final)
        if self._keep_last is not None:
            with contextlib.suppress(OSError):  # the save itself is safe
                prune(self._final.parent, self._keep_last)


class _ChecksumFiles(FileSystem):
    """Files that note size and CRC-32 of what is written into them."""

    def __init__(self) -> None:
        self.records: dict[str, FileRecord] = {}

    @contextlib.contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream:
            watched = ChecksumStream(stream)
            yield watched
        if Path(path).suffix == ".distcp":
            record = FileRecord(num_bytes=watched.num_bytes, crc32=watched.crc32)
            self.records[Path(path).name] = record
