"""Validation: when a run is evaluated, and what follows from the outcome.

A new best loss is saved at once, and its checkpoint is kept however many follow. So many
evaluations in a row without one stop the run (`--early-stop`). The best loss, its step and the
count are part of each checkpoint, so a resumed run continues them.
"""

from __future__ import annotations

from dataclasses import replace

from .callbacks import Callback
from .evaluate import Evaluator
from .metrics import MetricsWriter
from .progress import Progress
from .setup import Run


class Validation:
    """The evaluations of one run; without evaluation data it does nothing."""

    def __init__(self, run: Run, events: Callback, writer: MetricsWriter) -> None:
        self._run, self._events, self._writer = run, events, writer
        self._evaluator = Evaluator(run) if run.data.evaluation is not None else None

    def after_step(self, progress: Progress) -> bool:
        """Evaluate if this step is due; returns whether its loss is a new best. Collective."""
        config = self._run.config
        is_due = config.eval_every and progress.step % config.eval_every == 0
        if self._evaluator is None or not (is_due or progress.step == config.steps):
            return False
        evaluation = self._evaluator.evaluate(progress.step)
        is_best = progress.evaluated(progress.step, evaluation.loss)
        evaluation = replace(evaluation, is_best=is_best)
        self._run.say(evaluation.line())
        self._writer.log(progress.step, evaluation.scalars())
        self._events.on_evaluate(self._run, progress, evaluation)
        if has_stopped_improving(self._run, progress):
            progress.stop(early_stop_reason(progress))
        return is_best


def has_stopped_improving(run: Run, progress: Progress) -> bool:
    """Whether `--early-stop` evaluations in a row had no new best."""
    return 0 < run.config.early_stop <= progress.num_worse


def early_stop_reason(progress: Progress) -> str:
    """For the log."""
    return (
        f"{progress.num_worse} evaluations without a better loss than {progress.best_loss:.4f} "
        f"of step {progress.best_step}"
    )
