"""Narrator: what a run tells people: a line per step with the time left, and a summary at the end.

On a terminal the time left is in a bar below the lines; in logs and pipes it ends each line.
"""

from __future__ import annotations

import math
import time
from collections import deque
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from hdp import console

from .metrics import StepMetrics
from .progress import Progress
from .setup import Run

_PACE_STEPS = 20  # logged steps that the pace is measured over
_SAMPLE_TOKENS, _SAMPLE_CHARACTERS = 1000, 2000


class Narrator:
    """A context manager for the steps of a run; only rank 0 says anything."""

    def __init__(self, run: Run, progress: Progress) -> None:
        self._run, self._progress = run, progress
        self._bar: console.StepBar | None = None
        self._stack = ExitStack()
        self._times: deque[tuple[int, float]] = deque(maxlen=_PACE_STEPS)
        self._lowest = (math.inf, 0)  # loss, step
        self._start_tokens = progress.total_tokens

    def __enter__(self) -> Narrator:
        bar = console.step_bar(
            self._run.config.steps, self._progress.step, enabled=self._run.is_main
        )
        self._bar = self._stack.enter_context(bar)
        self._began = (self._progress.step, time.monotonic())
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar = None
        self._stack.__exit__(*error)

    def step(self, metrics: StepMetrics) -> None:
        """Say what a step did."""
        steps = self._run.config.steps
        self._lowest = min(self._lowest, (metrics.loss, metrics.step))
        left_s = self.left_s(metrics.step, time.monotonic())
        if self._bar is None:
            self._run.say(metrics.line(steps, eta_s=left_s))
            return
        self._run.say(metrics.line(steps))
        self._bar(metrics.step, f"loss {metrics.loss:.4f}  eta {console.duration(left_s)}")

    def left_s(self, step: int, now: float) -> float:
        """Seconds to the end of the run. Validation and saves count, as far as they came so far.

        The first step compiles kernels and fills caches: it counts only while there is no other.
        """
        first_step, first_time = self._times[0] if self._times else self._began
        self._times.append((step, now))
        pace_s = (now - first_time) / max(step - first_step, 1)
        return pace_s * max(self._run.config.steps - step, 0)

    def summary(self) -> None:
        """Say what came of the run and where it is, after the last save and the export."""
        run, progress = self._run, self._progress
        folder, seconds = run.config.run_dir, time.monotonic() - progress.started_s
        tokens = progress.total_tokens - self._start_tokens
        done = progress.step - progress.first_step + 1
        if done < 1:
            return
        run.say(
            f"{console.count(done, 'step')} in {console.duration(seconds)}: {tokens:,} tokens, "
            f"{tokens / seconds:,.0f} tokens/s with saves and pauses"
        )
        if math.isfinite(self._lowest[0]):
            since = f" (since step {progress.first_step:,})" if progress.first_step > 1 else ""
            run.say("lowest training loss {:.4f} at step {:,}".format(*self._lowest) + since)
        run.say(f"checkpoints: {Path(folder) / 'checkpoints'}; metrics: {folder}/metrics.jsonl")
        exported = run.config.export_hf
        if exported and not progress.stop_signal:
            run.say(f"model: {exported}")
        board = f"; tensorboard --logdir {folder}" if run.config.tensorboard else ""
        run.say(f"to look at it: hdp report {folder}{board}")


def sample_texts(dataset: Any, seq_ids: Any, count: int = 4) -> list[tuple[str, str]]:
    """(name, beginning) of a few sequences as the model reads them; [] without a tokenizer."""
    tokenizer = getattr(dataset, "tokenizer", None)
    if tokenizer is None:
        return []
    found = []
    for number in [int(seq_id) for seq_id in seq_ids[:count]]:
        ids = dataset[number].input_ids
        text = tokenizer.decode(ids[:_SAMPLE_TOKENS])
        end = " ..." if len(ids) > _SAMPLE_TOKENS or len(text) > _SAMPLE_CHARACTERS else ""
        name = f"{console.printable(dataset.name(number))}, {len(ids):,} tokens"
        found.append((name, text[:_SAMPLE_CHARACTERS] + end))
    return found
