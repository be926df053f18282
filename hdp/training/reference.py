"""Models beside the policy, run on the policy's own plan.

Preference losses and KL penalties compare the policy with a reference: the model it started from. A
reference sees the very microbatches that the update will see, on the same ranks and rings, so what
it says of a row stays where the update needs it, and nothing is sent:

    reference = Reference.copy(context, model)        # a second sharded model, never trained
    reference = Reference.adapter_off(context)        # with LoRA: the policy itself, no second copy
    train_step(context, reference(step), DPO(comm=context.comm))

The same holds for old log-probabilities, a teacher or a critic: `add_column` puts what any model's
`forward_step` returned beside the tokens. `token_rows` makes whole sequences of it instead, for the
columns of another plan.

Invariants (tests/training/test_reference.py): columns_are_token_rows, a copy and the adapter
switched off give the same bits, the_policy_is_left_alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hdp.data.feed import StepBatch, make_step
from hdp.data.pairs import Mismatched
from hdp.data.sample import SampleSource
from hdp.models.lora import adapters_off
from hdp.scheduler import StepPlan

from .step import StepContext, forward_step

REF_LOGPROBS = "ref_logprobs"


def add_column(step: StepBatch, name: str, outputs: Sequence[Tensor]) -> StepBatch:
    """The step with `outputs`, one tensor of (total_tokens, ...) per microbatch, as a column.

    outputs: as `forward_step` returned them for this very step. Raises ValueError for a different
    number of microbatches or rows.
    """
    ours = [batch.total_tokens for batch in step.batches]
    theirs = [len(output) for output in outputs]
    if ours != theirs:
        raise ValueError(
            f"column {name!r} has microbatches of {theirs} rows, and the step's have {ours}: pass "
            "the outputs of forward_step for the same step"
        )
    batches = tuple(
        replace(batch, columns={**batch.columns, name: output.detach()})
        for batch, output in zip(step.batches, outputs, strict=True)
    )
    return replace(step, batches=batches)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """Adds the reference's log-probabilities to steps. Made by `copy` or `adapter_off`."""

    context: StepContext
    policy: StepContext
    enter: Callable[[], AbstractContextManager[None]] = nullcontext

    @classmethod
    def copy(cls, context: StepContext, model: nn.Module) -> Reference:
        """`model`, sharded over the same mesh, as the reference. Its weights are frozen.

        Raises ValueError if its vocabulary differs from the policy's.
        """
        check_same_vocabulary(context.model, model)
        model.requires_grad_(False)
        return cls(context=replace(context, model=model, optimizer=None), policy=context)

    @classmethod
    def adapter_off(cls, context: StepContext) -> Reference:
        """The policy without its LoRA adapters. Raises ValueError if it has none."""
        with adapters_off(context.model):
            pass
        return cls(context=context, policy=context, enter=lambda: adapters_off(context.model))

    def __call__(self, step: StepBatch) -> StepBatch:
        """The step with the column ref_logprobs. Collective; one forward."""
        with self.enter():
            outputs = forward_step(self.context, step)
        return add_column(step, REF_LOGPROBS, outputs)


@dataclass(frozen=True, slots=True, kw_only=True)
class KTOBaseline:
    """Adds ref_logprobs and kl_baseline, the z of `KTO`, to steps.

    z is how much likelier the policy finds answers to other prompts than the reference does, the
    mean over the step's sequences, at least 0 (arXiv 2402.01306 Sec. 4.1). Each prompt is paired
    with the next one's answer in the batch, so z is the same on any number of ranks. A batch of one
    sequence has no other answer, and z = 0.
    """

    reference: Reference
    dataset: SampleSource
    plan: Callable[[np.ndarray], StepPlan]
    max_length: int  # that the ranks can hold

    def __call__(self, step: StepBatch) -> StepBatch:
        """The step with both columns. Collective; three forwards."""
        z = max(self._log_ratio(step), 0.0) if len(step.seq_ids) > 1 else 0.0
        constants = [
            torch.full_like(batch.labels, z, dtype=torch.float32) for batch in step.batches
        ]
        return add_column(self.reference(step), "kl_baseline", constants)

    def _log_ratio(self, step: StepBatch) -> float:
        context = self.reference.context
        mesh, policy = context.mesh, self.reference.policy
        samples = [self.dataset[int(i)] for i in step.seq_ids]
        source = Mismatched(samples, max_length=self.max_length)
        ids = np.arange(len(samples))
        made = make_step(source, ids, self.plan(source.seqlens), mesh.hdp_rank).to(mesh.device)
        ours = forward_step(policy, made)
        theirs = self.reference(made)
        total = torch.zeros((), dtype=torch.float64, device=mesh.device)
        for output, batch in zip(ours, theirs.batches, strict=True):
            total += (output.double() - batch.columns[REF_LOGPROBS].double()).sum()
        dist.all_reduce(total, group=mesh.hdp_group)
        return total.item() / len(samples)


def check_same_vocabulary(policy: nn.Module, reference: nn.Module) -> None:
    """Raise ValueError unless ids mean the same number of tokens in both models."""
    ours, theirs = (getattr(model, "config").vocab_size for model in (policy, reference))  # noqa: B009
    if ours != theirs:
        raise ValueError(
            f"the reference has a vocabulary of {theirs} and the policy one of {ours}: log-"
            "probabilities of different tokens cannot be compared; use a reference with the "
            "policy's tokenizer"
        )
