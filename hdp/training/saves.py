"""Saves: starts the checkpoints of a run and tells when each is complete on disk."""

from __future__ import annotations

import json
from pathlib import Path

from hdp.checkpoint.checkpointer import Checkpointer
from hdp.checkpoint.directory import step_path
from hdp.errors import CheckpointError

from .callbacks import Callback
from .progress import Progress
from .setup import Run


class Saves:
    """The checkpoints of one run. A save is written in the background while training goes on."""

    def __init__(self, run: Run, checkpointer: Checkpointer, events: Callback) -> None:
        self._run, self._checkpointer, self._events = run, checkpointer, events
        self._pending = False

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
                "evaluation": {
                    "best_loss": progress.best_loss if progress.best_step else None,
                    "best_step": progress.best_step,
                    "num_worse": progress.num_worse,
                },
            },
            keep_step=progress.best_step or None,
        )
        self._pending = True

    def finish(self, progress: Progress) -> None:
        """Wait for the save in progress, if any; report a failure. Collective."""
        try:
            self.wait(progress)
        except CheckpointError as error:
            self._run.say(f"{error}; training continues")

    def best(self, progress: Progress) -> Path | None:
        """The checkpoint of the best evaluation, if it is on disk. Rank 0 may call it alone."""
        path = step_path(self._checkpointer.directory, progress.best_step)
        return path if progress.best_step and path.is_dir() else None

    def load_best(self, progress: Progress) -> None:
        """Put the weights of the best evaluation into the model. Collective; for a run's end.

        Raises ValueError on all ranks, with nothing changed, if they are not on disk.
        """
        path = step_path(self._checkpointer.directory, progress.best_step)
        self._checkpointer.load(model=self._run.model, path=path)

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
        if run.is_main and newest == self.best(progress):
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
