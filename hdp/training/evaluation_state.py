"""What a checkpoint stores about evaluations, and whether it still holds when a run resumes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hdp.data.sample import content_checksum

from .progress import Progress
from .setup import Run


def evaluation_extra(run: Run, progress: Progress) -> dict[str, Any]:
    """The best loss, its step, the count for `--early-stop`, and which data they are of."""
    return {
        "best_loss": progress.best_loss if progress.best_step else None,
        "best_step": progress.best_step,
        "num_worse": progress.num_worse,
        "data": _checksum(run),
    }


def evaluation_state(run: Run, extra: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of Progress about evaluations, from a checkpoint; {} if they do not hold.

    A loss on other data says nothing about this run's: the best loss and the count start again.
    """
    state = extra.get("evaluation")
    if not state:
        return {}
    if run.data.evaluation is not None and state.get("data") != _checksum(run):
        if state["best_step"]:
            run.say(
                "the evaluation data changed since this checkpoint: the best loss and the count "
                "for --early-stop start again"
            )
        return {}
    if not state["best_step"]:
        return {"num_worse": state["num_worse"]}
    return {name: state[name] for name in ("best_loss", "best_step", "num_worse")}


def _checksum(run: Run) -> int | None:
    evaluation = run.data.evaluation
    return None if evaluation is None else content_checksum(evaluation)
