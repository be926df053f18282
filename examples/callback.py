"""Watch a run with a callback of your own: stop as soon as the loss is good enough.

    torchrun --standalone --nproc-per-node 4 examples/callback.py

A callback is a class with the events it needs; here, one event in a few lines. `progress.stop`
ends the run on all ranks after the same step, with a checkpoint, so a later run can go on from it.
"""

from __future__ import annotations

import hdp


class StopWhenGood(hdp.Callback):
    """Stop when the mean loss of the last five steps is below `target`."""

    def __init__(self, target: float) -> None:
        self.target = target
        self.losses: list[float] = []

    def on_step_end(self, run: hdp.Run, progress: hdp.Progress, metrics: hdp.StepMetrics) -> None:
        self.losses = [*self.losses[-4:], metrics.loss]
        mean = sum(self.losses) / len(self.losses)
        if len(self.losses) == 5 and mean < self.target:
            progress.stop(f"the mean loss of 5 steps is {mean:.2f}, below {self.target}")


CONFIG = hdp.TrainConfig(
    pattern="a*.py",
    tokenizer="bytes",
    max_length=2048,
    overlong="truncate",
    batch_tokens=8192,
    max_tokens_per_rank=2048,
    lr=3e-3,
    warmup_steps=5,
    steps=60,
    run_dir="runs/callback",
)

if __name__ == "__main__":
    hdp.train(CONFIG, callbacks=[StopWhenGood(target=4.0)])
