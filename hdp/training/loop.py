"""train(): from a configuration to a trained model.

The path, in reading order: data (tokens and lengths) -> sampler (ids of a global batch) -> plan
(which rank holds what) -> feed (packed microbatches, one step ahead) -> step (forward, backward,
reduce, optimize) -> metrics, checkpoints. `setup.py` builds the parts and `step.py` runs one step;
this file loops over steps and handles resume, save and export.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

from hdp.checkpoint.checkpointer import Checkpointer
from hdp.config import TrainConfig
from hdp.distributed.agree import agree_on_values, on_rank_0
from hdp.distributed.fsdp import full_state_dict
from hdp.distributed.mesh import HDPMesh
from hdp.distributed.watchdog import Watchdog
from hdp.errors import CheckpointError
from hdp.models.export import check_target, export_model

from .metrics import MetricsWriter, StepMetrics
from .observe import Observer, write_trace
from .optim import learning_rate, set_learning_rate
from .setup import Run, set_up
from .step import train_step

_PATHS = ("model", "data", "tokenizer", "cache_dir", "run_dir", "cost", "export_hf")
_LONG_S = 3600.0  # time limit for loading, saving and exporting before a rank counts as hung


def train(config: TrainConfig) -> list[StepMetrics]:
    """Train as `config` says, on all ranks that torchrun started (without torchrun: on one).

    Returns the metrics of the logged steps, on all ranks. Raises ValueError for a configuration
    that cannot run, NonFiniteError before a bad update is applied, RankFailure when another rank is
    lost, and CheckpointError if the last save failed.
    """
    device = None if config.device == "auto" else config.device
    with (
        HDPMesh.create(hdp_size=config.hdp_size, device=device, timeout_s=_LONG_S) as mesh,
        Watchdog.start(mesh, timeout_s=config.timeout_s) as watchdog,
    ):
        _check_same_options(config, mesh)
        if config.export_hf:  # fail now, not after the last step
            on_rank_0(partial(check_target, config.export_hf), mesh.hdp_group)
        with watchdog.allow(_LONG_S, "loading data and model"):
            run = set_up(config, mesh, watchdog)
        with (
            contextlib.closing(run),
            Checkpointer(
                Path(config.run_dir) / "checkpoints",
                mesh=mesh,
                keep_last=config.keep_last,
                model_config=run.model.config.to_dict(),
                seed=config.seed,
            ) as checkpointer,
        ):
            if run.is_main:
                (Path(config.run_dir) / "config.json").write_text(config.to_json() + "\n")
            with watchdog.allow(_LONG_S, "loading a checkpoint"):
                last_step, total_tokens = _resume(run, checkpointer)
            metrics = list(_steps(run, checkpointer, last_step + 1, total_tokens))
            with watchdog.allow(_LONG_S, "writing the last checkpoint and the model"):
                _finish(run, checkpointer)
    return metrics


def _check_same_options(config: TrainConfig, mesh: HDPMesh) -> None:
    """Raise ValueError on all ranks if nodes were started with different flags. Collective.

    Most differences would go unnoticed: for instance, each rank would update its shards with its
    own learning rate. Paths may differ, since nodes have their own copies and caches, but the
    contents of a cost file may not (`open_cost`).
    """
    agree_on_values(
        {name: value for name, value in asdict(config).items() if name not in _PATHS},
        mesh.hdp_group,
        problem="ranks were started with different options",
        remedy="use the same command on all nodes",
    )


def _steps(
    run: Run, checkpointer: Checkpointer, first_step: int, total_tokens: int
) -> Iterator[StepMetrics]:
    """Run steps first_step .. config.steps and yield the metrics of the logged ones.

    total_tokens: tokens the run has already trained on.
    """
    config, watchdog, sampler = run.config, run.context.watchdog, run.sampler
    observer = Observer(run)
    with (
        MetricsWriter(
            Path(config.run_dir),
            tensorboard=config.tensorboard,
            enabled=run.is_main,
            first_step=first_step,
            say=run.say,
        ) as writer,
        run.feed() as feed,
    ):
        batches, began = iter(feed), time.perf_counter()
        for step in range(first_step, config.steps + 1):
            watchdog.progress(step=step, what="waiting for the plan and tokens")
            batch = next(batches)
            lr = learning_rate(config, step)
            set_learning_rate(run.optimizer, lr)
            result = train_step(run.context, batch)
            assert batch.next_position is not None
            sampler.position = batch.next_position
            total_tokens += int(batch.plan.seqlens.sum())
            ended = time.perf_counter()
            if step % config.log_every == 0 or step == config.steps:
                metrics = observer.measure(
                    step,
                    batch,
                    result,
                    lr=lr,
                    step_s=ended - began,
                    total_tokens=total_tokens,
                )
                run.say(metrics.line(config.steps))
                writer.write(metrics)
                yield metrics
            began = ended
            if step == config.trace_step:
                write_trace(run, step, batch)
            if step == config.steps or (config.save_every and step % config.save_every == 0):
                with watchdog.allow(_LONG_S, f"saving step {step}"):
                    _save(run, checkpointer, step, total_tokens)


def _resume(run: Run, checkpointer: Checkpointer) -> tuple[int, int]:
    """(last step trained, tokens trained on) of the newest checkpoint; (0, 0) for a new run."""
    newest = checkpointer.latest()
    if newest is None:
        return 0, 0
    if not run.config.resume:
        raise ValueError(
            f"{newest} exists but --no-resume was given: choose another --run-dir, or delete it"
        )
    restored = checkpointer.load(model=run.model, optimizer=run.optimizer)
    assert restored is not None
    run.sampler.load_state_dict(restored.extra["sampler"])
    run.say(
        f"resumed from {restored.path}, step {restored.step}, "
        f"written by {restored.world_size} ranks"
    )
    if restored.extra.get("data") != run.dataset.fingerprint:
        run.say(
            "the data files, tokenizer or options changed since this checkpoint, but sequence "
            "lengths match; continuing with the new data"
        )
    if restored.step >= run.config.steps:
        run.say(
            f"all {run.config.steps} steps are done: raise --steps to train longer, or choose "
            "another --run-dir to start a new run"
        )
    return restored.step, restored.extra["total_tokens"]


def _save(run: Run, checkpointer: Checkpointer, step: int, total_tokens: int) -> None:
    """Start a save. If the previous one failed, report that and keep training."""
    try:
        checkpointer.wait()
    except CheckpointError as error:
        run.say(f"{error}; training continues")
    checkpointer.save(
        step,
        model=run.model,
        optimizer=run.optimizer,
        extra={
            "sampler": run.sampler.state_dict(),
            "total_tokens": total_tokens,
            "data": run.dataset.fingerprint,
        },
    )


def _finish(run: Run, checkpointer: Checkpointer) -> None:
    """Wait for the last save, then export; a failed save must not cost the export."""
    failed = None
    try:
        checkpointer.wait()
    except CheckpointError as error:
        failed = error
    if run.config.export_hf:
        _export(run, Path(run.config.export_hf))
    if failed is not None:
        raise failed


def _export(run: Run, folder: Path) -> None:
    """Write the model in the format `from_pretrained` reads. Collective; rank 0 writes."""
    state = full_state_dict(run.model)
    if run.is_main:
        export_model(run.model, folder, state, tokenizer=run.dataset.tokenizer)
        run.say(f"wrote {folder} in bf16: load it with AutoModelForCausalLM.from_pretrained")
