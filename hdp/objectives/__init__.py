"""Objectives: what a step minimizes, as functions of log-probabilities and per-token columns.

An objective sees one microbatch of one rank and knows nothing about plans, rings or ranks:

    def weighted(logprobs, batch, step):
        loss = -(batch.columns["weights"] * logprobs).sum() / step.num_loss_tokens
        return loss, {"weight": batch.columns["weights"].sum()}

    train_step(context, step, objective=weighted)

It returns the microbatch's share of the step's loss and of the sums to report. Shares are added up
over microbatches and ranks, so an objective must divide by a total of the whole step, never by one
of its microbatch; the result then does not depend on how the plan split the batch.
"""

from .cross_entropy import cross_entropy, token_cross_entropy
from .objective import Objective, Share

__all__ = ["Objective", "Share", "cross_entropy", "token_cross_entropy"]
