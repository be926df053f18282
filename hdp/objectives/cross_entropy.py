"""Token-level cross-entropy, for pre-training and supervised fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .objective import Share

if TYPE_CHECKING:
    from hdp.data.feed import StepBatch
    from hdp.data.pack import PackedBatch


def cross_entropy(logprobs: Tensor, batch: PackedBatch, step: StepBatch) -> Share:
    """The default objective: the mean of -logprob over the step's label tokens.

    logprobs, batch, step: as for `Objective`. The shares of all ranks and microbatches add up to
    the token-level loss of ByteScale Eq. 1 and 2, in nats; the number of microbatches plays no
    part.
    """
    return token_cross_entropy(logprobs, global_count=step.num_loss_tokens), {}


def token_cross_entropy(
    logprobs: Tensor, *, global_count: int, weights: Tensor | None = None
) -> Tensor:
    """One microbatch's share of the loss: -sum(weights * logprobs) / global_count.

    Summed over all microbatches and ranks of a step, it is the mean cross-entropy of the step's
    label tokens, however the step was split.

    Args:
        logprobs: (total_tokens,) of this microbatch; 0 for tokens without a label.
        global_count: label tokens in the whole step, over all ranks and microbatches.
        weights: (total_tokens,) detached per-token weights; None means 1.

    Returns:
        A scalar in the dtype of `logprobs`. It depends on `logprobs` even when it is zero, so its
        backward reaches every parameter of the model.
    """
    if global_count < 1:
        raise ValueError(
            f"global_count={global_count}, but a step needs at least one label token; "
            "check the batch's loss_mask and labels"
        )
    total = logprobs.sum() if weights is None else (weights * logprobs).sum()
    return -total / global_count
