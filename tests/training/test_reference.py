"""References beside the policy: a copy, or the policy without its adapters."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hdp.data import Sample, SampleList
from hdp.data.feed import make_step
from hdp.distributed.fsdp import shard
from hdp.distributed.mesh import HDPMesh
from hdp.models.lora import LoRA, add_lora
from hdp.objectives import DPO, pair_units
from hdp.scheduler import CostModel, plan
from hdp.training.reference import KTOBaseline, Reference, add_column
from hdp.training.step import StepContext, forward_step, train_step
from hdp.training.token_rows import token_rows
from tests.run_ranks import run_ranks
from tests.tiny_models import keep_norms_exact, local_batch, random_samples, tiny_model
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


def _baseline(rank, world, shift):
    """z of a step whose reference is another model, and whose policy and reference change roles."""
    with HDPMesh.create(device="cpu") as mesh:
        policy, other = _sharded(mesh), _sharded(mesh, seed=5)
        if shift:
            policy, other = other, policy
        context = StepContext.create(mesh, policy, TakeGradients(policy))
        reference = Reference.copy(context, other)
        cost = CostModel.from_coefficients(quadratic_s=1e-2, linear_s=1e-6)

        def make_plan(seqlens):
            return plan(seqlens, hdp_size=world, max_tokens_per_rank=120, cost=cost)

        source = SampleList(_answers())
        baseline = KTOBaseline(reference=reference, dataset=source, plan=make_plan, max_length=120)
        ids = np.arange(len(source))
        step = baseline(make_step(source, ids, make_plan(source.seqlens), rank))
        [z] = {float(x) for batch in step.batches for x in batch.columns["kl_baseline"]}
        assert all("ref_logprobs" in batch.columns for batch in step.batches)
        return z


def _answers():
    """Samples whose first half is a prompt."""
    made = random_samples([40, 9, 22], masked=0.0)
    return [
        replace(s, loss_mask=np.arange(len(s.input_ids)) >= len(s.input_ids) // 2) for s in made
    ]


def test_kto_baseline_is_the_mean_log_ratio_of_other_answers():
    """By hand on one process: prompt i with answer i + 1; below 0 it is 0."""
    samples, sums = _answers(), []
    models = [keep_norms_exact(tiny_model(seed=seed)) for seed in (0, 5)]
    for i, sample in enumerate(samples):
        other = samples[(i + 1) % 3]
        start, after = len(sample.input_ids) // 2, len(other.input_ids) // 2
        ids = np.concatenate([sample.input_ids[:start], other.input_ids[after:]])
        mixed = Sample(input_ids=ids, loss_mask=np.arange(len(ids)) >= start)
        ours, theirs = (model(local_batch([mixed]), None).sum().item() for model in models)
        sums.append(ours - theirs)
    mean = sum(sums) / 3
    assert abs(mean) > 0.1
    for world in (1, 2):
        for shift in (False, True):
            want = np.float32(max(-mean if shift else mean, 0.0))
            for z in run_ranks(_baseline, world, shift):
                assert z == pytest.approx(want, rel=1e-6)


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
