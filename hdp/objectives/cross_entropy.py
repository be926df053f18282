"""Cross-entropy per token: pre-training and supervised fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .objective import Share

if TYPE_CHECKING:
    from hdp.data.feed import StepBatch
    from hdp.data.pack import PackedBatch


def cross_entropy(logprobs: Tensor, batch: PackedBatch, step: StepBatch) -> Share:
    """The mean over the step's label tokens of -logprob: the default objective.

    logprobs, batch, step: as in `Objective`. The sum over ranks and microbatches is the token-level
    loss of ByteScale Eq. 1 and 2, in nats; nothing is divided by a number of microbatches.
    """
    return token_cross_entropy(logprobs, global_count=step.num_loss_tokens), {}


def token_cross_entropy(
    logprobs: Tensor, *, global_count: int, weights: Tensor | None = None
) -> Tensor:
    """A shard's part of the loss: -sum(weights * logprobs) / global_count.

    Summed over the microbatches and the ranks of a step it is the mean cross-entropy of the step's
    label tokens, however the step was cut.

    Args:
        logprobs: (total_tokens,) of this microbatch; 0 where there is no label.
        global_count: label tokens of the whole step, over all ranks and microbatches.
        weights: (total_tokens,) detached per-token weights, or None for 1.

    Returns:
        Scalar, in the dtype of `logprobs`. It depends on `logprobs` even when it is zero, so that
        its backward reaches every parameter of the model.
    """
    if global_count < 1:
        raise ValueError(
            f"global_count={global_count}: a step needs at least one label token; "
            "check loss_mask and the labels of this batch"
        )
    total = logprobs.sum() if weights is None else (weights * logprobs).sum()
    return -total / global_count
