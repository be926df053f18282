"""Saves: starts the checkpoints of a run and tells when each is complete on disk."""

from __future__ import annotations

import json
from pathlib import Path

from hdp.checkpoint.checkpointer import Checkpointer
from hdp.checkpoint.directory import step_path
from hdp.errors import CheckpointError

from .callbacks import Callback
from .evaluation_state import evaluation_extra
from .progress import Progress
from .setup import Run


class Saves:
    """The checkpoints of one run. A save is written in the background while training goes on."""

    def __init__(self, run: Run, checkpointer: Checkpointer, events: Callback) -> None:
        self._run, self._checkpointer, self._events = run, checkpointer, events
        self._pending = False
        self._best_on_disk = 0  # step of the best checkpoint that is complete; 0: none

    def resume(self, progress: Progress) -> None:
        """Take note of the best checkpoint of the run that is resumed, if it is still there."""
        path = step_path(self._checkpointer.directory, progress.best_step)
        self._best_on_disk = progress.best_step if progress.best_step and path.is_dir() else 0

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing. May differ between ranks."""
        return self._checkpointer.busy

    def start(self, progress: Progress) -> None:
        """Start a save. If the previous one failed, report that and keep training. Collective."""
        self.finish(progress)
        run = self._run
        self._checkpointer.save(
            progress.step,
            model=run.model,
            optimizer=run.optimizer,
            averages=run.ema.averages if run.ema else None,
            extra={
                "sampler": run.sampler.state_dict(),
                "total_tokens": progress.total_tokens,
                "data": run.dataset.fingerprint,
                "evaluation": evaluation_extra(run, progress),
            },
            # Not this step's: until it is complete, the one before it is the best on disk.
            keep_step=self._best_on_disk or None,
        )
        self._pending = True

    def finish(self, progress: Progress) -> None:
        """Wait for the save in progress, if any; report a failure. Collective."""
        try:
            self.wait(progress)
        except CheckpointError as error:
            self._run.say(f"{error}; training continues")

    @property
    def best(self) -> Path | None:
        """The best checkpoint on disk, the same on all ranks; None if there is none."""
        step = self._best_on_disk
        return step_path(self._checkpointer.directory, step) if step else None

    def load_best(self) -> bool:
        """Put the weights of the best checkpoint into the model. Collective; for a run's end.

        Returns False, with nothing changed, if it cannot be read.
        """
        if self.best is None:
            return False
        try:
            self._checkpointer.load(model=self._run.model, path=self.best)
        except ValueError as error:  # deleted or damaged meanwhile
            self._run.say(str(error))
            return False
        return True

    def wait(self, progress: Progress) -> None:
        """Wait for the save in progress, if any. Collective.

        Raises CheckpointError on all ranks if it failed.
        """
        if not self._pending:
            return
        self._pending = False
        self._checkpointer.wait()
        run, newest = self._run, self._checkpointer.latest()
        assert newest is not None
        run.say(f"{self._checkpointer.status}: {newest}")
        if newest == step_path(self._checkpointer.directory, progress.best_step):
            self._best_on_disk = progress.best_step
            if run.is_main:
                write_best(run, progress, newest)
        self._events.on_save(run, progress, newest)


def write_best(run: Run, progress: Progress, checkpoint: Path) -> None:
    """Write best.json, which names the best checkpoint; a full disk is reported, not raised."""
    path = Path(run.config.run_dir) / "best.json"
    best = {
        "checkpoint": str(checkpoint),
        "step": progress.best_step,
        "eval_loss": progress.best_loss,
    }
    partial = path.with_suffix(".partial")
    try:
        partial.write_text(json.dumps(best, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        run.say(f"cannot write {path}: {error}; training continues")
