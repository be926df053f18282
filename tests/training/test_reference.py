"""References beside the policy: a copy, or the policy without its adapters."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hdp.distributed.fsdp import shard
from hdp.distributed.mesh import HDPMesh
from hdp.models.lora import LoRA, add_lora
from hdp.objectives import DPO, pair_units
from hdp.scheduler import CostModel, plan
from hdp.training.reference import Reference, add_column
from hdp.training.step import StepContext, forward_step, train_step
from hdp.training.token_rows import token_rows
from tests.run_ranks import run_ranks
from tests.tiny_models import keep_norms_exact, random_samples, tiny_model
from tests.training.steps import SEQLENS, TakeGradients, make_batch

SAMPLES = random_samples(SEQLENS, masked=0.0)


def _sharded(mesh, **options):
    model = keep_norms_exact(tiny_model(**options))
    shard(model, mesh.device_mesh)
    return model


def _step(rank, world):
    capacity = max(48, -(-(97 + 64) // world) + 8)
    cost = CostModel.from_coefficients(quadratic_s=1e-2, linear_s=1e-6)  # rings
    made = plan(
        SEQLENS,
        hdp_size=world,
        max_tokens_per_rank=capacity,
        cost=cost,
        units=pair_units(len(SEQLENS)),
    )
    return make_batch(made, rank, SAMPLES)


def _columns(rank, world):
    """Reference rows of a copy and of the adapter off, as columns and as whole sequences."""
    with HDPMesh.create(device="cpu") as mesh:
        step = _step(rank, world)
        adapted = keep_norms_exact(tiny_model())
        add_lora(adapted, LoRA(rank=2))
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.data += 0.1
        shard(adapted, mesh.device_mesh)
        optimizer = TakeGradients(adapted)
        context = StepContext.create(mesh, adapted, optimizer)
        copy = Reference.copy(context, _sharded(mesh))
        off = Reference.adapter_off(context)
        steps = [copy(step), off(step)]
        rows = token_rows(mesh, step, [batch.columns["ref_logprobs"] for batch in steps[0].batches])
        same = all(
            torch.equal(a.columns["ref_logprobs"], b.columns["ref_logprobs"])
            for a, b in zip(steps[0].batches, steps[1].batches, strict=True)
        )
        result = train_step(context, steps[1], DPO(comm=context.comm))
        # The same columns from whole sequences, packed again.
        from dataclasses import replace

        samples = [
            replace(s, columns={"ref_logprobs": row}) for s, row in zip(SAMPLES, rows, strict=True)
        ]
        again = make_batch(step.plan, rank, samples)
        packed = all(
            torch.equal(
                a.columns["ref_logprobs"][a.labels >= 0].double(),
                b.columns["ref_logprobs"][a.labels >= 0].double(),
            )
            for a, b in zip(again.batches, steps[0].batches, strict=True)
        )
        return same, packed, result.loss, set(optimizer.gradients)


@pytest.mark.parametrize("world", [1, 3])
def test_columns_are_token_rows(world):
    """A copy and the adapter switched off give the same bits; token_rows gives them to any plan."""
    pytest.importorskip("peft")
    for same, packed, loss, names in run_ranks(_columns, world):
        assert same and packed
        assert np.isfinite(loss) and loss != pytest.approx(np.log(2), abs=1e-6)
        assert names and all("lora_" in name for name in names)


def _alone(rank, world):
    with HDPMesh.create(device="cpu") as mesh:
        model = _sharded(mesh)
        context = StepContext.create(mesh, model, TakeGradients(model))
        step = _step(rank, world)
        before = forward_step(context, step)
        reference = Reference.copy(context, _sharded(mesh))
        first = train_step(context, reference(step), DPO(comm=context.comm))
        after = forward_step(context, step)
        untouched = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        return untouched, model.training, first.loss, first.metrics["margin"]


@pytest.mark.parametrize("world", [1, 2])
def test_the_policy_is_left_alone(world):
    """At first policy and reference agree: the loss is log 2, and the margin 0."""
    for untouched, training, loss, margin in run_ranks(_alone, world):
        assert untouched and training
        assert loss == pytest.approx(np.log(2), rel=1e-12) and margin == 0.0


def _refused(rank, world):
    with HDPMesh.create(device="cpu") as mesh:
        context = StepContext.create(mesh, _sharded(mesh))
        step = _step(rank, world)
        with pytest.raises(ValueError, match="reference has a vocabulary of 99 and the policy"):
            Reference.copy(context, _sharded(mesh, vocab_size=99))
        with pytest.raises(ValueError, match="no LoRA adapters to switch off"):
            Reference.adapter_off(context)
        with pytest.raises(ValueError, match="pass the outputs of forward_step for the same step"):
            add_column(step, "values", [torch.zeros(3)])
        return True


def test_what_references_refuse():
    assert run_ranks(_refused, 1) == [True]
