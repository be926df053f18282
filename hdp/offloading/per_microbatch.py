"""PerMicrobatchOffload: offload each microbatch at the ratio in its StepPlan.

    offload = PerMicrobatchOffload(engine, cost=cost, classes=decoder_classes(cost, ...))
    with offload(batch.layout, batch.offload_ratio):
        logprobs = model(batch, comm)

The plan gives the share of a microbatch's activations that must leave the device for it to fit on
its ranks. This module decides how, from lengths and cost model alone: how much is sent and how much
is recomputed (scheduler/costs/activation_plan.py), and how much device memory hides the copies.
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
    """Creates the offload context of each microbatch's forward.

    cost: the cost model that the plan was made with
    classes: what the model saves, summed over all layers
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
        """A context around the forward of the microbatch with this layout; ratio: the plan's."""
        if not ratio:
            return nullcontext()
        policy, buffers = policy_of(self.plan(layout, ratio))
        return self.engine.forward(policy, buffers=buffers, min_bytes=self._min_bytes)

    def plan(self, layout: RingLayout, ratio: float) -> ActivationPlan:
        """How much of a microbatch is kept, sent and recomputed."""
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
        """Free the host memory."""
        self.engine.close()


def policy_of(plan: ActivationPlan) -> tuple[ActivationPolicy, CopyBuffers]:
    """A plan as the engine's policy and buffers."""
    policy = ActivationPolicy(
        ratio=plan.offload_ratio,
        recompute_pointwise=plan.recomputed_share("pointwise"),
        recompute_matmul=plan.recomputed_share("matmul"),
    )
    return policy, CopyBuffers.of_layer(plan.bytes_sent_per_layer)
