"""Evaluation: loss and perplexity of the current weights on data that is not trained on.

The evaluation set is planned like a batch of training and run forward only, on the same ranks and
rings: a sequence that fits in training fits here, without gradients and without offload. Each rank
adds up the log-probabilities of its labels in fp64; one all-reduce at the end gives the same mean
on all ranks, whatever their number:

    loss = -(sum of logprobs of all labels) / (number of labels), in nats; perplexity = exp(loss)

The steps are as large as the packed tokens' memory allows, so that the planner has the most to
balance. Nothing of training changes: no random numbers are drawn, the sampler and its prefetched
step stay where they are, and the model's mode is restored
(test_training_is_the_same_with_and_without_evaluation).
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from hdp.console import count
from hdp.data import Sampler
from hdp.data.feed import StepFeed

from .setup import Run
from .step import forward_step

_STEP_TOKENS_PER_RANK = 1 << 20  # 24 MiB of ids, positions and labels


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The outcome of an evaluation, the same on all ranks but for `seconds`."""

    step: int
    loss: float  # mean over the labels, nats
    perplexity: float
    num_tokens: int
    num_loss_tokens: int
    num_seqs: int
    seconds: float
    is_best: bool = False  # the lowest loss of the run so far

    def line(self) -> str:
        """The log line."""
        best = "  (best so far)" if self.is_best else ""
        return (
            f"eval at step {self.step}  loss {self.loss:.4f}  perplexity {self.perplexity:,.2f}  "
            f"{count(self.num_loss_tokens, 'label')} of {count(self.num_seqs, 'sequence')} in "
            f"{self.seconds:.1f} s{best}"
        )

    def scalars(self) -> dict[str, float]:
        """What is logged, by name."""
        return {
            "eval_loss": self.loss,
            "eval_perplexity": self.perplexity,
            "eval_tokens": self.num_tokens,
            "eval_loss_tokens": self.num_loss_tokens,
            "eval_s": self.seconds,
        }


class Evaluator:
    """Evaluates a run's model on the run's evaluation data, which must not be None."""

    def __init__(self, run: Run) -> None:
        data = run.data.evaluation
        assert data is not None
        self._run, self._data = run, data
        budget = run.mesh.hdp_size * _STEP_TOKENS_PER_RANK
        self._sampler = Sampler(data.seqlens, batch_tokens=budget, shuffle=False)
        self._feed = StepFeed(
            data,
            self._sampler,
            run.plan,
            rank=run.mesh.hdp_rank,
            position=(0, 0),
            device=run.mesh.device,
        )

    def evaluate(self, step: int) -> Evaluation:
        """Loss and perplexity of the current weights, after training step `step`. Collective."""
        run, start = self._run, time.perf_counter()
        totals = torch.zeros(2, dtype=torch.float64, device=run.mesh.device)
        position = (0, 0)
        while position[0] == 0:
            run.context.watchdog.progress(step=step, what="evaluating")
            batch = self._feed.make(position)
            for logprobs in forward_step(run.context, batch):
                totals[0] += logprobs.double().sum()  # 0 where there is no label
            if run.is_main:
                totals[1] += batch.num_loss_tokens
            assert batch.next_position is not None
            position = batch.next_position
        dist.all_reduce(totals, group=run.mesh.hdp_group)
        total, num_labels = totals.tolist()
        loss = -total / num_labels
        return Evaluation(
            step=step,
            loss=loss,
            perplexity=float(torch.tensor(loss, dtype=torch.float64).exp()),  # inf, not an error
            num_tokens=int(self._data.seqlens.sum()),
            num_loss_tokens=int(num_labels),
            num_seqs=len(self._data),
            seconds=time.perf_counter() - start,
        )
