"""Checkpointer: save in the background, commit by one rename, resume on any number of ranks.

    with Checkpointer("checkpoints", mesh, model_config=config.to_dict(), seed=seed) as saver:
        restored = saver.load(model=model, optimizer=optimizer)      # None: nothing saved yet
        for step in range(restored.step if restored else 0, num_steps):
            ...
            if step % save_every == 0:
                saver.save(step, model=model, optimizer=optimizer, extra={"sampler": ...})

A save has three parts. The training thread copies model and optimizer shards to host memory and
goes on. A background thread on each rank writes its shard, with coordination over a gloo group of
its own: its collectives can never mix with those of the training thread. When all are on disk,
rank 0 writes hdp.json with size and checksum of every file, renames the folder to its final name
and forgets all but the last `keep_last` (checkpoint_dir.py has the folder's rules).

A save that fails on any rank (disk full) leaves the previous checkpoint as it was, removes what it
wrote, and raises CheckpointError on ALL ranks at the next `save` or `wait`: the caller may go on.

Loading checks everything first - format, model config, presence, size and checksum of each file,
names and shapes of all tensors - and raises ValueError on all ranks before anything has changed.
State is resharded to the ranks there are. Random number generators continue on the same number of
ranks and are seeded from (seed, step, rank) on another one; the sampler does not depend on it.

Invariants (tests of the same names in tests/runtime/test_checkpoint.py): any_number_of_ranks,
killed_save_leaves_the_previous_one, failed_save_leaves_the_previous_one, error_reaches_all_ranks,
one_save_at_a_time, staged_state_is_a_snapshot, damage_is_found_before_anything_changes.

A checkpoint is trusted input: torch's own part of it is a pickle.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
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

from . import __version__
from .agree import on_all_ranks, on_rank_0
from .checkpoint_dir import (
    CheckpointInfo,
    ChecksumStream,
    FileRecord,
    Lock,
    checksum,
    clean,
    commit,
    committed,
    next_serial,
    prune,
    saving_path,
    step_path,
)
from .mesh import HDPMesh
from .rng import pack_rng, seed_rng, unpack_rng

SAVE_TIMEOUT_S = 3600.0
_SHARED_S = 10.0
_LEAVE_S = 30.0
# One name per tensor whatever the order of parameters and groups.
_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


class CheckpointError(RuntimeError):
    """A save failed; the checkpoints before it are intact. Raised on all ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What `Checkpointer.load` found beside the model's and the optimizer's state."""

    path: Path
    step: int
    extra: dict[str, Any]
    world_size: int  # ranks that wrote it


class Checkpointer:
    """Saves and loads one run's state. All methods are collective over the mesh."""

    def __init__(
        self,
        directory: str | Path,
        mesh: HDPMesh,
        *,
        keep_last: int | None = 3,
        model_config: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        """Take `directory` (made if need be, shared by all nodes) and clean up after killed saves.

        `model_config`: what defines the model, as JSON can hold it; loading a checkpoint with
        another one is an error, so leave out what may change (versions, paths). `keep_last`:
        complete checkpoints to keep, None for all. Raises ValueError on all ranks.
        """
        if keep_last is not None and keep_last < 1:
            raise ValueError(f"keep_last={keep_last} must be at least 1, or None to keep all")
        self.directory = Path(directory).absolute()
        self.keep_last = keep_last
        self.seed = seed
        self.status = "idle"  # for the log
        self._mesh = mesh
        self._model_config = _plain(model_config or {}, "model_config")
        self._lock: Lock | None = None
        self._saving: Future[Any] | None = None
        self._step = -1  # of the save in progress
        self._began_s = 0.0
        ranks = dist.get_process_group_ranks(mesh.hdp_group)
        self._group = dist.new_group(
            ranks,
            backend="gloo",
            timeout=timedelta(seconds=SAVE_TIMEOUT_S),
            use_local_synchronization=len(ranks) < dist.get_world_size(),
        )
        cuda = mesh.device.type == "cuda"
        self._stager = DefaultStager(
            # Pinned buffers are kept for all saves; the copy is done when save() returns.
            StagingOptions(
                use_pinned_memory=cuda,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=cuda,
            )
        )
        self._start = on_rank_0(self._take_directory, self._group)
        self._check_shared()

    # ---- saving ----

    def save(
        self,
        step: int,
        *,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Start saving; returns once the state is copied. Waits for a save that is still running.

        `extra`: anything JSON can hold, the same on all ranks (sampler, schedule, tokens seen).
        Raises CheckpointError, and saves nothing, if the save before this one failed; call again
        to save.
        """
        self.wait()
        plain = _plain(extra or {}, "extra")
        state = _state_of(model, optimizer)
        state["rng"] = {str(self._mesh.hdp_rank): pack_rng(self._mesh.device)}
        info = CheckpointInfo(
            step=step,
            serial=0,
            world_size=self._mesh.hdp_size,
            hdp_version=__version__,
            torch_version=torch.__version__,
            model_config=self._model_config,
            extra=plain,
        )
        self._step, self._began_s = step, time.monotonic()
        final = step_path(self.directory, step)
        writer = _Writer(saving_path(final, self._start), final, info, self.keep_last)
        self.status = f"saving step {step}"
        self._saving = dcp.async_save(  # type: ignore[assignment]
            state, storage_writer=writer, process_group=self._group, async_stager=self._stager
        )

    def wait(self) -> None:
        """Wait for the save in progress. Raises CheckpointError on all ranks if it failed."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        try:
            saving.result()
        except (Exception, CheckpointException) as error:
            self.status = f"saving step {self._step} failed"
            final = step_path(self.directory, self._step)
            if self._mesh.hdp_rank == 0:
                shutil.rmtree(saving_path(final, self._start), ignore_errors=True)
            left = committed(self.directory)
            raise CheckpointError(
                f"saving {final} failed{_reason(error)}; it was removed, "
                + (f"{left[-1].name} is intact" if left else "there is no checkpoint yet")
            ) from error
        self.status = f"saved step {self._step} in {time.monotonic() - self._began_s:.1f} s"

    @property
    def busy(self) -> bool:
        """A save is running here. May differ between ranks: for logging only."""
        return self._saving is not None and not self._saving.done()

    # ---- loading ----

    def latest(self) -> Path | None:
        """The checkpoint committed last; the same on all ranks."""
        found = on_rank_0(lambda: committed(self.directory), self._group)
        return found[-1] if found else None

    def load(
        self,
        *,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        path: str | Path | None = None,
    ) -> Restored | None:
        """Load `path`, by default the latest checkpoint (None if there is none), into the model,
        the optimizer and the random number generators.

        Raises ValueError on all ranks, with nothing changed, for a checkpoint that is damaged, not
        hdp's, or of another model.
        """
        self.wait()
        checkpoint = self.latest() if path is None else Path(path).absolute()
        if checkpoint is None:
            return None
        info = on_rank_0(lambda: self._read_info(checkpoint), self._group)
        names = sorted(info.files)[self._mesh.hdp_rank :: self._mesh.hdp_size]
        on_all_ranks(lambda: info.verify(checkpoint, names), self._group)
        reader = dcp.FileSystemReader(checkpoint)
        metadata = on_all_ranks(reader.read_metadata, self._group)
        state = _state_of(model, optimizer)
        on_all_ranks(lambda: _compare(state, metadata, checkpoint), self._group)
        own_rng = f"rng.{self._mesh.hdp_rank}"
        continues = info.world_size == self._mesh.hdp_size
        if continues:
            saved = cast(TensorStorageMetadata, metadata.state_dict_metadata[own_rng])
            state["rng"] = {str(self._mesh.hdp_rank): torch.empty(saved.size, dtype=torch.uint8)}
        try:
            dcp.load(state, storage_reader=reader, process_group=self._group)
        except CheckpointException as error:
            raise CheckpointError(
                f"reading {checkpoint} failed{_reason(error)}, after all checks; model and "
                "optimizer "
                "may hold a part of it"
            ) from error
        set_model_state_dict(model, state["model"])
        if optimizer is not None:
            set_optimizer_state_dict(model, optimizer, state["optimizer"], options=_OPTIONS)
        if continues:
            unpack_rng(state["rng"][str(self._mesh.hdp_rank)], self._mesh.device)
        else:
            seed_rng(self.seed, step=info.step, rank=self._mesh.hdp_rank)
        return Restored(
            path=checkpoint, step=info.step, extra=info.extra, world_size=info.world_size
        )

    def _read_info(self, checkpoint: Path) -> CheckpointInfo:
        info = CheckpointInfo.read(checkpoint)
        ours, theirs = self._model_config, info.model_config
        if ours and theirs and ours != theirs:
            keys = [k for k in sorted(ours.keys() | theirs) if ours.get(k) != theirs.get(k)]
            told = ", ".join(f"{k}={theirs.get(k)} there and {ours.get(k)} here" for k in keys[:4])
            raise ValueError(
                f"{checkpoint} is of another model: {told}; name a checkpoint of this model, or "
                "use another folder"
            )
        return info

    # ---- leaving ----

    def close(self) -> None:
        """Finish the save in progress and let go of the folder."""
        try:
            self.wait()
        finally:
            self._release()
            dist.destroy_process_group(self._group)

    def _release(self) -> None:
        self._stager.close()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
            return
        # The error may be everybody's (a non-finite loss), and then the save is worth finishing; or
        # another rank is gone, and it never will.
        if self._saving is not None:
            concurrent.futures.wait([self._saving], timeout=_LEAVE_S)
        self._release()

    # ---- the folder ----

    def _take_directory(self) -> str:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot make the checkpoint folder: {error}") from error
        self._lock = Lock(self.directory)
        clean(self.directory)
        return uuid.uuid4().hex[:8]

    def _check_shared(self) -> None:
        """All ranks must see one folder, or their shards would end in different ones."""
        mark = self.directory / ".shared"
        on_rank_0(lambda: mark.write_text("all ranks must see this file"), self._group)

        def seen() -> None:
            deadline = time.monotonic() + _SHARED_S
            while not mark.exists():  # network file systems remember for a while what was not there
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"{self.directory} is not the folder that rank 0 sees; checkpoints need a "
                        "file system that all nodes share"
                    )
                time.sleep(0.1)

        on_all_ranks(seen, self._group)
        on_rank_0(lambda: mark.unlink(missing_ok=True), self._group)


def full_state_dict(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's state, unsharded, on global rank 0 in host memory; {} elsewhere. Collective."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(dict[str, torch.Tensor], get_model_state_dict(model, options=options))


# ---- state ----


def _state_of(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer | None
) -> dict[str, dict[str, Any]]:
    """Sharded state by name; a fresh optimizer gets its (zero) state here."""
    state: dict[str, dict[str, Any]] = {"model": dict(get_model_state_dict(model))}
    if optimizer is not None:
        state["optimizer"] = dict(get_optimizer_state_dict(model, optimizer, options=_OPTIONS))
    return state


def _compare(state: Mapping[str, Any], metadata: Metadata, checkpoint: Path) -> None:
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


# ---- writing ----


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


def _reason(error: BaseException) -> str:
    """Like " on rank 2: OSError: No space left on device"."""
    failures = getattr(error, "failures", None)
    if not failures:
        return f": {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    cause = failures[min(failures)][0]
    named = ", ".join(map(str, sorted(failures)[:8]))
    return f" on rank {named}: {type(cause).__name__}: {cause}"


def _plain(value: Mapping[str, Any], what: str) -> dict[str, Any]:
    """`value` as JSON gives it back."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} must hold only what JSON can: {error}") from error
