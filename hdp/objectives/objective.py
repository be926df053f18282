"""The interface of an objective."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from hdp.data.feed import StepBatch
    from hdp.data.pack import PackedBatch

# (share of the loss, {name: share of a sum to report}), all scalars. The names must be the same in
# every microbatch of every rank.
Share = tuple[Tensor, Mapping[str, Tensor]]


class Objective(Protocol):
    """What a step minimizes: any function with this signature.

    It may have an attribute `columns`, the names of the columns it reads: `train_step` then refuses
    samples without them before any rank enters a ring.
    """

    def __call__(self, output: Any, batch: PackedBatch, step: StepBatch, /) -> Share:
        """The microbatch's share of the step's loss and of the sums to report.

        output: what the model returns: (total_tokens,) log-probabilities of `batch.labels`, or
            `TokenStats` with the entropies, or a scalar head's values. The loss must depend on it
            even if it is zero, so that its backward reaches every parameter.
        batch: the microbatch, with its columns
        step: the whole step; its `num_loss_tokens` and plan provide the totals to divide by
        """
        ...
