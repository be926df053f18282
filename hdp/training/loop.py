"""train(): from a configuration to a trained model.

The path, in reading order: data (tokens and lengths) -> sampler (ids of a global batch) -> plan
(which rank holds what) -> feed (packed microbatches, one step ahead) -> step (forward, backward,
reduce, optimize) -> metrics, checkpoints. `setup.py` builds the parts and `step.py` runs one step;
this file loops over steps and handles resume, save and export.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from hdp.checkpoint.checkpointer import Checkpointer
from hdp.config import TrainConfig
from hdp.data.feed import StepBatch
from hdp.distributed.agree import agree_on_values, on_rank_0
from hdp.distributed.fsdp import full_state_dict
from hdp.distributed.mesh import HDPMesh
from hdp.distributed.watchdog import Watchdog
from hdp.errors import CheckpointError
from hdp.models.export import export_dtype, export_model, loader_of
from hdp.models.export_folder import check_target, new_export
from hdp.models.lora import merged, save_adapter

from .callbacks import Callback, Callbacks
from .dry_run import dry_run
from .evaluation_state import evaluation_state
from .metrics import MetricsWriter, StepMetrics
from .narrate import Narrator, sample_texts
from .observe import Observer, write_trace
from .optim import set_learning_rate
from .progress import Progress
from .run_config import accept, check_new_run
from .saves import Saves
from .schedule import learning_rate
from .setup import LONG_S, Run, set_up
from .signals import StopSignals
from .step import train_step
from .validation import (
    Validation,
    early_stop_reason,
    has_stopped_improving,
)

_KEPT_STEPS = 10_000  # so that memory does not grow with the length of a run
_PATHS = (
    *("model", "data", "eval_data", "tokenizer", "cache_dir", "run_dir", "cost"),
    *("export_hf", "export_ema", "export_adapter"),
)


def train(config: TrainConfig, callbacks: Sequence[Callback] = ()) -> list[StepMetrics]:
    """Train as `config` says, on all ranks that torchrun started (without torchrun: on one).

    callbacks: your code at named points of the run; see `Callback`. Returns the metrics of the last
    10,000 logged steps, on all ranks; metrics.jsonl has them all. SIGTERM, SIGINT, SIGUSR1 and
    SIGHUP end the run after the current step, with a checkpoint.

    Raises ValueError for a configuration that cannot run, NonFiniteError before a bad update is
    applied, RankFailure when another rank is lost, and CheckpointError if the last save failed.
    """
    events = Callbacks(callbacks)
    if config.dry_run:
        dry_run(config)
        return []
    device = None if config.device == "auto" else config.device
    with (
        HDPMesh.create(
            hdp_size=config.hdp_size,
            device=device,
            timeout_s=LONG_S,
            join_timeout_s=config.timeout_s,
        ) as mesh,
        Watchdog.start(mesh, timeout_s=config.timeout_s) as watchdog,
    ):
        _check_same_options(config, mesh)
        on_rank_0(partial(check_new_run, config), mesh.hdp_group)
        for folder in filter(None, (config.export_hf, config.export_ema, config.export_adapter)):
            on_rank_0(partial(check_target, folder), mesh.hdp_group)  # not after the last step
        with watchdog.allow(LONG_S, "loading data and model"):
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
            with watchdog.allow(LONG_S, "loading a checkpoint"):
                run, progress = _resume(run, checkpointer)
            for line in on_rank_0(partial(accept, config, step=progress.step), mesh.hdp_group):
                run.say(line)
            with StopSignals(run.say) as signals, _writer(run, progress) as writer:
                saves = Saves(run, checkpointer, events)
                saves.resume(progress)
                events.on_train_start(run, progress)
                narrator = Narrator(run, progress)
                steps = _steps(run, saves, progress, events, signals, narrator, writer)
                metrics = deque(steps, maxlen=_KEPT_STEPS)
                with watchdog.allow(LONG_S, "writing the last checkpoint and the model"):
                    _finish(run, saves, progress)
                narrator.summary()
                events.on_train_end(run, progress)
    return list(metrics)


def _check_same_options(config: TrainConfig, mesh: HDPMesh) -> None:
    """Raise ValueError on all ranks if nodes were started with different flags. Collective.

    Most differences would go unnoticed: for instance, each rank would update its shards with its
    own learning rate. Paths may differ, since nodes have their own copies and caches, but the
    contents of a cost file may not (`open_cost`).
    """
    # Whether there is an export decides which collectives run.
    paths = {name: getattr(config, name) is not None for name in _PATHS}
    options = {name: value for name, value in asdict(config).items() if name not in _PATHS}
    agree_on_values(
        {**options, **{f"whether {name} is given": given for name, given in paths.items()}},
        mesh.hdp_group,
        problem="ranks were started with different options",
        remedy="use the same command on all nodes",
    )


def _steps(
    run: Run,
    saves: Saves,
    progress: Progress,
    events: Callback,
    signals: StopSignals,
    narrator: Narrator,
    writer: MetricsWriter,
) -> Iterator[StepMetrics]:
    """Run the steps from progress.step + 1 on and yield the metrics of the logged ones."""
    config, watchdog = run.config, run.context.watchdog
    observer = Observer(run)
    validation = Validation(run, events, writer)
    with narrator, run.feed() as feed:
        batches, began = iter(feed), time.perf_counter()
        for step in range(progress.first_step, config.steps + 1):
            if progress.stop_reason:  # a resumed run that had stopped improving
                break
            watchdog.progress(step=step, what="waiting for the plan and tokens")
            batch = next(batches)
            if step == progress.first_step and writer.boards:
                writer.boards.texts(step, "samples", sample_texts(run.dataset, batch.seq_ids))
            lr = learning_rate(config, step)
            set_learning_rate(run.optimizer, lr)
            with _first_step_allowance(run, is_first=step == progress.first_step):
                if run.reference is not None:
                    batch = run.reference(batch)
                result = train_step(run.context, batch, run.objective)
            if run.ema:
                run.ema.update(run.model)
            _advance(run, progress, batch)
            ended = time.perf_counter()
            if step % config.log_every == 0 or step == config.steps:
                total = progress.total_tokens
                times = {"lr": lr, "step_s": ended - began}
                metrics = observer.measure(step, batch, result, total_tokens=total, **times)
                narrator.step(metrics)
                writer.write(metrics)
                events.on_step_end(run, progress, metrics)
                yield metrics
            if step == config.trace_step and (picture := write_trace(run, step, batch)):
                writer.boards.picture(step, "timeline", picture)
            paused = time.perf_counter()
            is_best = validation.after_step(progress)
            began = ended + time.perf_counter() - paused
            stop = _agree(run, saves, progress, signals)
            is_due = config.save_every and step % config.save_every == 0
            if step == config.steps or is_due or is_best or stop:
                with watchdog.allow(LONG_S, f"saving step {step}"):
                    saves.start(progress)
            if stop:
                break


@contextlib.contextmanager
def _writer(run: Run, progress: Progress) -> Iterator[MetricsWriter]:
    """Where the metrics of the steps go; also says that the step to trace will not come.

    It is closed after the last checkpoint: an upload may take longer than a scheduler waits.
    """
    config, traced = run.config, run.config.trace_step
    if traced is not None and not progress.first_step <= traced <= config.steps:
        run.say(
            f"--trace-step {traced}: this run trains steps {progress.first_step} to {config.steps}"
            ", so nothing will be traced"
        )
    watchdog, ranks = run.context.watchdog, {"ranks": run.mesh.hdp_size}
    with contextlib.ExitStack() as stack:
        with watchdog.allow(LONG_S, "opening TensorBoard and W&B"):
            writer = MetricsWriter(
                Path(config.run_dir),
                tensorboard=config.tensorboard,
                wandb=config.wandb,
                wandb_mode=config.wandb_mode,
                config={**json.loads(config.to_json()), **ranks},
                enabled=run.is_main,
                first_step=progress.first_step,
                say=run.say,
            )
        stack.push(writer)
        yield writer
        # Not after an error: that should be told within --timeout-s.
        with watchdog.allow(LONG_S, "closing TensorBoard and W&B"):
            stack.close()


def _first_step_allowance(run: Run, *, is_first: bool) -> AbstractContextManager[None]:
    """Kernels are compiled and tuned in the first step, which can take longer than --timeout-s."""
    if is_first and (run.config.compile or run.mesh.device.type == "cuda"):
        return run.context.watchdog.allow(LONG_S, "compiling kernels in the first step")
    return contextlib.nullcontext()


def _advance(run: Run, progress: Progress, batch: StepBatch) -> None:
    """Count the step that has just been trained."""
    assert batch.next_position is not None
    run.sampler.position = batch.next_position
    progress.step += 1
    progress.total_tokens += int(batch.plan.seqlens.sum())


def _agree(run: Run, saves: Saves, progress: Progress, signals: StopSignals) -> bool:
    """Whether to stop after this step; also ends a save that all ranks have written. Collective.

    Ranks receive signals and finish writing at different times, so both are settled by one small
    all-reduce per step.
    """
    code = 1 + signals.received if signals.received else progress.stop_code
    state = torch.tensor([code, int(saves.busy)], device=run.mesh.device)
    dist.all_reduce(state, op=dist.ReduceOp.MAX, group=run.mesh.hdp_group)
    code, busy = state.tolist()
    if not busy:
        saves.finish(progress)
    return progress.settle_stop(code)


def _resume(run: Run, checkpointer: Checkpointer) -> tuple[Run, Progress]:
    """The run, and the progress stored in its newest checkpoint, which is loaded, if there is one.

    With --epochs, the number of steps follows from the checkpoint's place in the data.
    """
    newest = checkpointer.latest()
    if newest is None:
        return run, Progress()
    averages = run.ema.averages if run.ema else None
    restored = checkpointer.load(model=run.model, optimizer=run.optimizer, averages=averages)
    assert restored is not None
    if run.ema and not restored.has_average:
        run.ema.restart(run.model)
        run.say(f"{newest} has no average of the weights: it starts from its weights")
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
    run = run.until_epochs(restored.step)
    progress = Progress(
        step=restored.step,
        first_step=restored.step + 1,
        total_tokens=restored.extra["total_tokens"],
        **evaluation_state(run, restored.extra),
    )
    if restored.step >= run.config.steps:
        flag = "--steps" if run.epochs is None else "--epochs"
        run.say(
            f"all {run.config.steps} steps are done: raise {flag} to train longer, or choose "
            "another --run-dir to start a new run"
        )
    elif has_stopped_improving(run, progress):
        progress.stop_reason = early_stop_reason(progress)
    return run, progress


def _finish(run: Run, saves: Saves, progress: Progress) -> None:
    """Wait for the last save, then export; a failed save must not cost the export."""
    failed = None
    try:
        saves.wait(progress)
    except CheckpointError as error:
        failed = error
    if progress.stop_reason:
        run.say(f"stopped after step {progress.step} of {run.config.steps}: {progress.stop_reason}")
    if progress.best_step:
        on_disk = saves.best or "none"
        run.say(
            f"best evaluation loss {progress.best_loss:.4f} at step {progress.best_step}; "
            f"best checkpoint on disk: {on_disk}"
        )
    if line := run.data.epochs_line():
        run.say(line)
    _export_all(run, saves, progress)
    if failed is not None:
        raise failed


def _export_all(run: Run, saves: Saves, progress: Progress) -> None:
    """Export the model and its average, if asked for. Collective."""
    config = run.config
    targets = (config.export_hf, config.export_ema, config.export_adapter)
    if any(targets) and progress.stop_signal:  # its sender will not wait
        run.say("the model was not exported; run the same command to go on")
        return
    if config.export_ema and run.ema:  # before the weights of the best step replace the last ones
        with run.ema.applied(run.model):
            _export(run, Path(config.export_ema))
    if config.export_hf:
        if config.export_best and progress.best_step:
            found = saves.load_best()
            run.say(
                f"exporting the weights of {saves.best}"
                if found
                else "exporting the last weights, because no best checkpoint can be read"
            )
        _export(run, Path(config.export_hf))
    if config.export_adapter:
        _export_adapter(run, Path(config.export_adapter))


def _export(run: Run, folder: Path) -> None:
    """Write the model in the format `from_pretrained` reads. Collective; rank 0 writes."""
    state = merged(run.model, full_state_dict(run.model))
    if run.is_main:
        dtype = export_dtype(run.model, run.config.export_dtype)
        export_model(run.model, folder, state, tokenizer=run.dataset.tokenizer, dtype=dtype)
        kind = str(dtype).removeprefix("torch.")
        run.say(f"wrote {folder} in {kind}: load it with {loader_of(run.model)}.from_pretrained")


def _export_adapter(run: Run, folder: Path) -> None:
    """Write the adapter alone, as peft reads it. Collective; rank 0 writes."""
    state = full_state_dict(run.model)
    if run.is_main:
        with new_export(check_target(folder)) as partial_folder:
            save_adapter(run.model, state, partial_folder, base=run.config.model)
        run.say(f"wrote {folder}: load it with peft.PeftModel.from_pretrained(model, {folder!s})")
