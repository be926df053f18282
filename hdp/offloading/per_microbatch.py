"""PerMicrobatchOffload: each microbatch with the offload ratio that its StepPlan gives it.

    offload = PerMicrobatchOffload(engine, cost=cost, classes=decoder_classes(cost, ...))
    with offload(batch.layout, batch.offload_ratio):
        logprobs = model(batch, comm)

The plan says what share of a microbatch's activations must leave the device, and on how many ranks
it fits because of that. What is done about it is decided here, from lengths and cost model alone:
how much travels and how much is recomputed (scheduler/costs/activation_plan.py), and how much
device memory hides the copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from hdp.attention.layout import RingLayout
from hdp.scheduler import CostModel
from hdp.scheduler.costs.activation_plan import ActivationPlan, SavedClass, plan_microbatch

from .engine import OffloadEngine
from .types import ActivationPolicy, CopyBuffers


class PerMicrobatchOffload:
    """Makes the context of a microbatch's forward.

    cost: the cost model that the plan was made with
    classes: what the model saves, all layers together
    min_bytes: smaller tensors stay on the device
    """

    def __init__(
        self,
        engine: OffloadEngine,
        *,
        cost: CostModel,
        classes: Sequence[SavedClass],
        min_bytes: int = 1 << 20,
    ) -> None:
        self.engine, self.cost, self._classes = engine, cost, tuple(classes)
        self._min_bytes = min_bytes

    def __call__(self, layout: RingLayout, ratio: float) -> AbstractContextManager[Any]:
        """Context around the forward of a microbatch of so many tokens; ratio: the plan's."""
        if not ratio:
            return nullcontext()
        policy, buffers = policy_of(self.plan(layout, ratio))
        return self.engine.forward(policy, buffers=buffers, min_bytes=self._min_bytes)

    def plan(self, layout: RingLayout, ratio: float) -> ActivationPlan:
        """What of a microbatch is kept, sent and recomputed."""
        ring = np.array(layout.ring_seqlens, dtype=np.float64)
        local = np.array(layout.local_seqlens, dtype=np.float64)
        compute_s = self.cost.compute_s(ring, layout.ring_size, layout.gathered).sum()
        compute_s += self.cost.compute_s(local, 1).sum()
        return plan_microbatch(
            self.cost,
            self._classes,
            num_tokens=layout.total_tokens,
            compute_s=float(compute_s),
            offload_ratio=ratio,
        )

    def close(self) -> None:
        """Give the host memory back."""
        self.engine.close()


def policy_of(plan: ActivationPlan) -> tuple[ActivationPolicy, CopyBuffers]:
    """What the engine is told of a plan."""
    policy = ActivationPolicy(
        ratio=plan.offload_ratio,
        recompute_pointwise=plan.recomputed_share("pointwise"),
        recompute_matmul=plan.recomputed_share("matmul"),
    )
    return policy, CopyBuffers.of_layer(plan.bytes_sent_per_layer)
