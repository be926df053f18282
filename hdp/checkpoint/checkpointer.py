"""Checkpointer: save in the background, commit by one rename, resume on any number of ranks.

    with Checkpointer("checkpoints", mesh, model_config=config.to_dict(), seed=seed) as saver:
        restored = saver.load(model=model, optimizer=optimizer)      # None: nothing saved yet
        for step in range(restored.step if restored else 0, num_steps):
            ...
            if step % save_every == 0:
                saver.save(step, model=model, optimizer=optimizer, extra={"sampler": ...})

A save has three parts. The training thread copies model and optimizer shards to host memory and
continues. A background thread on each rank writes its shard, coordinated over a separate gloo
group, so its collectives never mix with those of the training thread. When all shards are on disk,
rank 0 writes hdp.json with the size and checksum of every file, renames the folder to its final
name and deletes all but the last `keep_last` checkpoints (directory.py has the rules for the
folder, files.py the files).

A save that fails on any rank (disk full) leaves the previous checkpoint intact, removes what it
wrote, and raises CheckpointError on ALL ranks at the next `save` or `wait`. Training may continue.

Loading first checks everything (format, model config, presence, size and checksum of each file,
names and shapes of all tensors) and raises ValueError on all ranks before anything has changed.
State is resharded to the current number of ranks. Random number generators continue if that number
is the same, and are otherwise seeded from (seed, step, rank); the sampler does not depend on it.

Invariants (tests of the same names in tests/checkpoint/test_*.py): any_number_of_ranks,
killed_save_leaves_the_previous_one, failed_save_leaves_the_previous_one, error_reaches_all_ranks,
one_save_at_a_time, staged_state_is_a_snapshot, damage_is_found_before_anything_changes.

Reading a checkpoint runs no code from it (files.py), although torch's part of it is a pickle.
"""

from __future__ import annotations

import concurrent.futures
import json
import shutil
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from hdp import __version__
from hdp.distributed.agree import on_all_ranks, on_rank_0
from hdp.distributed.mesh import HDPMesh
from hdp.distributed.rng import pack_rng, seed_rng, unpack_rng
from hdp.errors import CheckpointError

from .directory import CheckpointInfo, Lock, clean, committed, saving_path, step_path
from .files import (
    ERRORS,
    check_fits,
    fetch,
    has_part,
    make_stager,
    put_state,
    read_metadata,
    reason,
    rng_buffer,
    save_async,
    state_of,
)

SAVE_TIMEOUT_S = 3600.0
_INCIDENTAL = ("dtype", "torch_dtype", "use_cache")  # dtypes are compared tensor by tensor
_SHARED_FOLDER_TIMEOUT_S = 10.0
_EXIT_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What `Checkpointer.load` found in addition to model and optimizer state."""

    path: Path
    step: int
    extra: dict[str, Any]
    world_size: int  # number of ranks that wrote it
    has_average: bool = False  # whether `load` filled the averages it was given


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
        """Lock `directory` (created if missing; shared by all nodes) and clean up killed saves.

        `model_config`: a JSON-serializable description of the model (a Hugging Face config's
        to_dict()). Loading a checkpoint with a different value for the same key is an error;
        versions, paths and dtypes are not compared. `keep_last`: number of complete checkpoints to
        keep, None for all. Raises ValueError on all ranks.
        """
        if keep_last is not None and keep_last < 1:
            raise ValueError(f"keep_last={keep_last} must be at least 1, or None to keep all")
        self.directory = Path(directory).absolute()
        self.keep_last = keep_last
        self.seed = seed
        self.status = "idle"  # for the log
        self._mesh = mesh
        self._model_config = _as_json(model_config or {}, "model_config")
        self._lock: Lock | None = None
        self._saving: Future[Any] | None = None
        self._step = -1  # of the save in progress
        self._start_s = 0.0  # of the save in progress
        ranks = dist.get_process_group_ranks(mesh.hdp_group)
        self._group = dist.new_group(
            ranks,
            backend="gloo",
            timeout=timedelta(seconds=SAVE_TIMEOUT_S),
            use_local_synchronization=len(ranks) < dist.get_world_size(),
        )
        self._stager = make_stager(pinned=mesh.device.type == "cuda")
        self._run_id = on_rank_0(self._lock_directory, self._group)
        self._check_shared()

    # ---- saving ----

    def save(
        self,
        step: int,
        *,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        averages: Mapping[str, torch.Tensor] | None = None,
        extra: Mapping[str, Any] | None = None,
        keep_step: int | None = None,
    ) -> None:
        """Start saving; return once the state is copied. Waits for a save that is still running.

        `averages`: of the weights, by name and sharded alike (`EMA.averages`). `extra`:
        JSON-serializable, the same on all ranks (sampler, schedule, tokens seen). `keep_step`: a
        step whose checkpoint is kept in addition to the last ones. Raises
        CheckpointError and saves nothing if the previous save failed; call again to save.
        """
        self.wait()
        plain = _as_json(extra or {}, "extra")
        state = state_of(model, optimizer, averages)
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
        self._step, self._start_s = step, time.monotonic()
        final = step_path(self.directory, step)
        self.status = f"saving step {step}"
        self._saving = save_async(
            state,
            info,
            path=saving_path(final, self._run_id),
            final=final,
            keep_last=self.keep_last,
            keep_step=keep_step,
            group=self._group,
            stager=self._stager,
        )

    def wait(self) -> None:
        """Wait for the save in progress. Raises CheckpointError on all ranks if it failed."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        try:
            saving.result()
        except ERRORS as error:
            self.status = f"saving step {self._step} failed"
            final = step_path(self.directory, self._step)
            if self._mesh.hdp_rank == 0:
                shutil.rmtree(saving_path(final, self._run_id), ignore_errors=True)
            remaining = committed(self.directory)
            raise CheckpointError(
                f"saving {final} failed{reason(error)}; it was removed, "
                + (f"{remaining[-1].name} is intact" if remaining else "there is no checkpoint yet")
            ) from error
        self.status = f"saved step {self._step} in {time.monotonic() - self._start_s:.1f} s"

    @property
    def busy(self) -> bool:
        """Whether a save is running on this rank. May differ between ranks: for logging only."""
        return self._saving is not None and not self._saving.done()

    # ---- loading ----

    def latest(self) -> Path | None:
        """The most recently committed checkpoint; the same on all ranks."""
        found = on_rank_0(lambda: committed(self.directory), self._group)
        return found[-1] if found else None

    def load(
        self,
        *,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        averages: Mapping[str, torch.Tensor] | None = None,
        path: str | Path | None = None,
    ) -> Restored | None:
        """Load model, optimizer and random number generators from `path`, or from the latest
        checkpoint by default. Returns None if there is none. `averages` are filled in place if the
        checkpoint has them (`Restored.has_average`) and are left alone otherwise.

        Raises ValueError on all ranks, with nothing changed, for a checkpoint that is damaged, not
        written by hdp, or of another model.
        """
        self.wait()
        checkpoint = self.latest() if path is None else Path(path).absolute()
        if checkpoint is None:
            return None
        info = on_rank_0(lambda: self._read_info(checkpoint), self._group)
        names = sorted(info.files)[self._mesh.hdp_rank :: self._mesh.hdp_size]
        on_all_ranks(lambda: info.verify(checkpoint, names), self._group)
        metadata = on_all_ranks(lambda: read_metadata(checkpoint), self._group)
        has_average = averages is not None and has_part(metadata, "ema")
        state = state_of(model, optimizer, averages if has_average else None)
        on_all_ranks(lambda: check_fits(state, metadata, checkpoint), self._group)
        rank = str(self._mesh.hdp_rank)
        same_size = info.world_size == self._mesh.hdp_size
        if same_size:
            state["rng"] = {rank: rng_buffer(metadata, self._mesh.hdp_rank)}
        try:
            fetch(state, checkpoint, self._group)
        except ERRORS as error:
            raise CheckpointError(
                f"reading {checkpoint} failed{reason(error)} after it passed all checks; model and "
                "optimizer may be partly loaded, so load a checkpoint again before training"
            ) from error
        put_state(model, optimizer, state)
        if same_size:
            unpack_rng(state["rng"][rank], self._mesh.device)
        else:
            seed_rng(self.seed, step=info.step, rank=self._mesh.hdp_rank)
        return Restored(
            path=checkpoint,
            step=info.step,
            extra=info.extra,
            world_size=info.world_size,
            has_average=has_average,
        )

    def _read_info(self, checkpoint: Path) -> CheckpointInfo:
        info = CheckpointInfo.read(checkpoint)
        ours, theirs = self._model_config, info.model_config
        common = [key for key in sorted(ours.keys() & theirs) if _defines_model(key)]
        if keys := [key for key in common if ours[key] != theirs[key]]:
            differences = ", ".join(
                f"{key}={theirs[key]} there and {ours[key]} here" for key in keys[:4]
            )
            raise ValueError(
                f"{checkpoint} is of another model: {differences}; choose a checkpoint of this "
                "model, or another folder"
            )
        return info

    # ---- closing ----

    def close(self) -> None:
        """Finish the save in progress and unlock the folder."""
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
        # If all ranks raised the same error (a non-finite loss), the save can still finish; if
        # another rank is gone, it never will.
        if self._saving is not None:
            concurrent.futures.wait([self._saving], timeout=_EXIT_TIMEOUT_S)
        self._release()

    # ---- the folder ----

    def _lock_directory(self) -> str:
        """Create, lock and clean the folder; return an id for this start of the run."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"cannot create the checkpoint folder ({error}); choose another one"
            ) from error
        self._lock = Lock(self.directory)
        clean(self.directory)
        return uuid.uuid4().hex[:8]

    def _check_shared(self) -> None:
        """Check that all ranks see the same folder; otherwise their shards would be scattered."""
        marker = self.directory / ".shared"
        on_rank_0(lambda: marker.write_text("all ranks must see this file"), self._group)

        def wait_for_marker() -> None:
            deadline = time.monotonic() + _SHARED_FOLDER_TIMEOUT_S
            while not marker.exists():  # network file systems cache that a file was missing
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"{self.directory} is not the folder that rank 0 sees; checkpoints need a "
                        "file system that all nodes share"
                    )
                time.sleep(0.1)

        on_all_ranks(wait_for_marker, self._group)
        on_rank_0(lambda: marker.unlink(missing_ok=True), self._group)


def _defines_model(key: str) -> bool:
    """Whether a config key defines the model. Other keys vary with library version or location."""
    return not (key.startswith("_") or key.endswith("_version") or key in _INCIDENTAL)


def _as_json(value: Mapping[str, Any], name: str) -> dict[str, Any]:
    """`value` after a round trip through JSON."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be JSON-serializable: {error}") from error
