"""Saves: starts the checkpoints of a run and tells when each is complete on disk."""

from __future__ import annotations

from hdp.checkpoint.checkpointer import Checkpointer
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
            },
        )
        self._pending = True

    def finish(self, progress: Progress) -> None:
        """Wait for the save in progress, if any; report a failure. Collective."""
        try:
            self.wait(progress)
        except CheckpointError as error:
            self._run.say(f"{error}; training continues")

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
        self._events.on_save(run, progress, newest)
