"""Callback: your code at a few named points of `hdp.train`.

    class StopWhenGood(hdp.Callback):
        def on_step_end(self, run, progress, metrics):
            if metrics.loss < 2.0:
                progress.stop(f"loss {metrics.loss:.3f} is below 2.0")

    hdp.train(config, callbacks=[StopWhenGood()])

Every event runs on all ranks, in the order of the list, between two steps: a callback may run
collectives if it does so on all ranks, and prints on one rank with `run.say`. Everything it needs
is in two arguments: `run` stays the same (config, model, optimizer, data, mesh), `progress` counts
(step, total_tokens, time) and stops the run. An exception in a callback ends the run on all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .evaluate import Evaluation
from .metrics import StepMetrics
from .progress import Progress
from .setup import Run


class Callback:
    """Base class: override the events you need."""

    def on_train_start(self, run: Run, progress: Progress) -> None:
        """Everything is set up and a checkpoint, if any, is loaded; no step has run yet."""

    def on_step_end(self, run: Run, progress: Progress, metrics: StepMetrics) -> None:
        """A logged step (`log_every`) has ended. `metrics` is the same on all ranks."""

    def on_evaluate(self, run: Run, progress: Progress, evaluation: Evaluation) -> None:
        """An evaluation has ended. `evaluation` is the same on all ranks but for its time."""

    def on_save(self, run: Run, progress: Progress, checkpoint: Path) -> None:
        """A checkpoint is complete on disk; it may be of an earlier step than progress.step."""

    def on_train_end(self, run: Run, progress: Progress) -> None:
        """The last step has ended and its checkpoint is on disk. Not called after an error."""


class Callbacks(Callback):
    """Several callbacks as one: passes each event on to all of them, in order."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        for callback in callbacks:
            if not isinstance(callback, Callback):
                raise ValueError(
                    f"callbacks must be instances of hdp.Callback, got {callback!r}; "
                    "derive the class from it and pass an instance"
                )
        self._callbacks = tuple(callbacks)

    def on_train_start(self, run: Run, progress: Progress) -> None:
        for callback in self._callbacks:
            callback.on_train_start(run, progress)

    def on_step_end(self, run: Run, progress: Progress, metrics: StepMetrics) -> None:
        for callback in self._callbacks:
            callback.on_step_end(run, progress, metrics)

    def on_evaluate(self, run: Run, progress: Progress, evaluation: Evaluation) -> None:
        for callback in self._callbacks:
            callback.on_evaluate(run, progress, evaluation)

    def on_save(self, run: Run, progress: Progress, checkpoint: Path) -> None:
        for callback in self._callbacks:
            callback.on_save(run, progress, checkpoint)

    def on_train_end(self, run: Run, progress: Progress) -> None:
        for callback in self._callbacks:
            callback.on_train_end(run, progress)
