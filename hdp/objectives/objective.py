"""The interface of an objective."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from hdp.data.feed import StepBatch
    from hdp.data.pack import PackedBatch

# (share of the loss, shares of sums to report): scalars. The names are the same in every microbatch
# of every rank.
Share = tuple[Tensor, Mapping[str, Tensor]]


class Objective(Protocol):
    """What a step minimizes; any function with these arguments is one."""

    def __call__(self, output: Tensor, batch: PackedBatch, step: StepBatch, /) -> Share:
        """A microbatch's share of the step's loss, and of the sums to report.

        output: what the model returned, (total_tokens,) log-probabilities of `batch.labels`; the
            loss must depend on it even where it is zero, so that its backward reaches every
            parameter
        batch: the microbatch, with its columns
        step: the whole step: its plan and `num_loss_tokens` are what to divide by
        """
        ...
