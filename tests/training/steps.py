"""Contexts, plans and batches for tests of one training step, and the dense step they equal."""

from __future__ import annotations

import numpy as np
import torch

from hdp.data.feed import StepBatch
from hdp.data.pack import pack_rank
from hdp.distributed.fsdp import shard
from hdp.distributed.mesh import HDPMesh
from hdp.scheduler import CostModel, StepPlan, plan
from hdp.training.step import StepContext
from tests.random_plans import random_plan
from tests.tiny_models import (
    keep_norms_exact,
    plain_logprobs,
    plain_model,
    random_samples,
    tiny_model,
)

COST = CostModel.from_coefficients(quadratic_s=1e-6, linear_s=1e-4, fixed_s=1e-4)
# odd lengths, length 1, lengths below the ring size, one that needs every rank
SEQLENS = [97, 1, 3, 40, 2, 17, 64, 1, 33, 5]


class TakeGradients(torch.optim.Optimizer):
    """An optimizer that stores the full gradients instead of applying them."""

    def __init__(self, model):
        super().__init__([p for p in model.parameters() if p.requires_grad], {})
        self._model, self.gradients = model, None

    def step(self, closure=None):
        self.gradients = {
            name: p.grad.full_tensor()
            for name, p in self._model.named_parameters()
            if p.grad is not None or p.requires_grad  # a frozen one has none
        }


def _num_loss_tokens(samples):
    return sum(int((s.labels(0, len(s.input_ids)) >= 0).sum()) for s in samples)


def dense_step(dtype, **overrides):
    """(loss, {name: gradient}) of the plain transformers model, one sequence at a time, in fp64."""
    plain = keep_norms_exact(plain_model(tiny_model(dtype=dtype, **overrides).double()))
    samples = random_samples(SEQLENS)
    count = _num_loss_tokens(samples)
    loss = 0.0
    for logprobs in plain_logprobs(plain, samples):
        share = -logprobs.sum() / count
        if share.requires_grad:
            share.backward()
        loss += share.item()
    return loss, {f"model.{name}": p.grad for name, p in plain.named_parameters()}


def make_plan(policy, seqlens, hdp_size) -> StepPlan:
    if policy.startswith("random"):
        return random_plan(seqlens, hdp_size, seed=int(policy.removeprefix("random")))
    if policy == "local":
        ranks = [seq % hdp_size for seq in range(len(seqlens))]
        mine = [[[s] for s, owner in enumerate(ranks) if owner == r] for r in range(hdp_size)]
        return StepPlan.from_lists(seqlens, [[r] for r in ranks], mine, max_tokens_per_rank=128)
    capacity = max(16, -(-max(seqlens) // hdp_size))
    cp_size = hdp_size if policy == "static" else None
    return plan(
        seqlens,
        hdp_size=hdp_size,
        max_tokens_per_rank=capacity,
        cost=COST,
        policy=policy,
        cp_size=cp_size,
    )


def make_context(dtype, **options):
    mesh = HDPMesh.create(device="cpu")
    model = keep_norms_exact(tiny_model(dtype=dtype))
    shard(model, mesh.device_mesh)
    return StepContext.create(mesh, model, TakeGradients(model), **options)


def make_batch(plan_, rank, samples) -> StepBatch:
    return StepBatch(
        plan=plan_,
        batches=pack_rank(plan_, rank, samples),
        seq_ids=np.arange(len(samples)) + 1000,
        num_loss_tokens=_num_loss_tokens(samples),
        next_position=(0,),
    )
