"""A training step under any plan equals dense training in one process: loss and gradients."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from hdp.distributed.fsdp import shard
from hdp.distributed.mesh import HDPMesh
from hdp.scheduler import StepPlan
from hdp.training.step import StepContext, forward_step, train_step
from tests.random_plans import random_plan
from tests.run_ranks import run_ranks
from tests.tiny_models import (
    keep_norms_exact,
    plain_logprobs,
    plain_model,
    random_samples,
    tiny_model,
)
from tests.training.steps import SEQLENS, dense_step, make_batch, make_context, make_plan


def _step_grads(rank, world, policies, dtype, options):
    context = make_context(dtype, **options)
    samples = random_samples(SEQLENS)
    results = {}
    for policy in policies:
        step = make_batch(make_plan(policy, SEQLENS, world), rank, samples)
        result = train_step(context, step)
        assert all(p.grad is None for p in context.model.parameters())
        results[policy] = result, context.optimizer.gradients
    return results if rank == 0 else None


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_step_equals_dense(world, dtype, tolerance):
    policies = ["hdp", "static", "bytescale", "random1", "random2", "random3"]
    drawn = [random_plan(SEQLENS, world, seed) for seed in (1, 2, 3)]
    if world > 2:  # rings of both modes
        assert any((~p.gathered & (p.degrees > 1)).any() and p.gathered.any() for p in drawn)
    results = run_ranks(_step_grads, world, policies, dtype, {})[0]
    loss, grads = dense_step(dtype)
    for policy in policies:
        result, got = results[policy]
        assert result.loss == pytest.approx(loss, rel=tolerance), policy
        assert got.keys() == grads.keys()
        for name, want in grads.items():
            error = (got[name].double() - want).norm() / want.norm()
            assert error < tolerance, f"{policy}, {name}: relative error {error:.2e}"


@pytest.mark.parametrize("world", [2, 3])
def test_overlapped_reduction_changes_nothing(world):
    policies = ["hdp", "random1", "random4", "local"]
    assert {make_plan(policy, SEQLENS, world).ends_together for policy in policies} == {True, False}
    plain = run_ranks(_step_grads, world, policies, torch.float64, {})[0]
    overlapped = run_ranks(_step_grads, world, policies, torch.float64, {"overlap_reduce": True})[0]
    for policy in policies:
        for name, want in plain[policy][1].items():
            torch.testing.assert_close(overlapped[policy][1][name], want, rtol=1e-12, atol=1e-14)


def _weighted(logprobs, batch, step):
    """An objective with a column, its own normalization, and two metric sums."""
    weights = batch.columns["weights"]
    labels = batch.labels >= 0
    loss = -(weights * logprobs).sum() / step.plan.num_seqs
    return loss, {"weight": weights[labels].sum(), "labels": labels.sum()}


def _samples_with_weights():
    rng = np.random.default_rng(5)
    return [
        dataclasses.replace(sample, columns={"weights": rng.normal(size=len(sample.input_ids))})
        for sample in random_samples(SEQLENS)
    ]


def _weighted_step(rank, world, policies):
    context = make_context(torch.float64)
    samples = _samples_with_weights()
    results = {}
    for policy in policies:
        step = make_batch(make_plan(policy, SEQLENS, world), rank, samples)
        result = train_step(context, step, _weighted)
        results[policy] = result, context.optimizer.gradients
    return results


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_custom_objective_equals_dense(world):
    """Loss, gradients and sums agree on every rank, however the plan splits the batch."""
    plain = keep_norms_exact(plain_model(tiny_model(dtype=torch.float64)))
    samples = _samples_with_weights()
    loss = weight = labels = 0.0
    for sample, logprobs in zip(samples, plain_logprobs(plain, samples), strict=True):
        seqlen = len(sample.input_ids)
        weights = torch.from_numpy(sample.shifted("weights", 0, seqlen))
        has_label = torch.from_numpy(sample.labels(0, seqlen) >= 0)
        loss = loss - (weights * logprobs).sum() / len(samples)
        weight, labels = weight + float(weights[has_label].sum()), labels + int(has_label.sum())
    loss.backward()
    want = {f"model.{name}": p.grad for name, p in plain.named_parameters()}
    by_rank = run_ranks(_weighted_step, world, ["hdp", "random1", "random2"])
    for policy in by_rank[0]:
        results = [by_rank[rank][policy][0] for rank in range(world)]
        assert all(result == results[0] for result in results)
        assert results[0].loss == pytest.approx(loss.item(), rel=1e-12)
        assert results[0].metrics == pytest.approx({"weight": weight, "labels": labels}, rel=1e-12)
        for name, got in by_rank[0][policy][1].items():
            error = (got - want[name]).norm() / want[name].norm()
            assert error < 1e-10, f"{policy}, {name}: relative error {error:.2e}"


def _forward(rank, world, policies):
    context = make_context(torch.float64)
    samples = random_samples(SEQLENS)
    rows = []
    for policy in policies:
        step = make_batch(make_plan(policy, SEQLENS, world), rank, samples)
        outputs = forward_step(context, step)
        assert context.model.training and not any(x.requires_grad for x in outputs)
        for batch, logprobs in zip(step.batches, outputs, strict=True):
            # a rank without tokens has one row that belongs to no sequence
            spans = [span for span in batch.layout.spans() if span[0] < len(batch.seqs)]
            places = [(batch.seqs[i], p) for i, a, b in spans for p in range(a, b)]
            rows += zip([policy] * len(places), places, logprobs.tolist(), strict=False)
        train_step(context, step)  # same plan, after forward_step has freed the parameters
    return rows, context.optimizer.gradients


@pytest.mark.parametrize("world", [1, 3])
def test_forward_step_gives_each_token_its_logprob(world):
    policies = ["hdp", "random1", "random4"]
    samples = random_samples(SEQLENS)
    with torch.no_grad():
        model = keep_norms_exact(plain_model(tiny_model(dtype=torch.float64)))
        plain = plain_logprobs(model, samples)
    want = {(s, p): float(x) for s, row in enumerate(plain) for p, x in enumerate(row)}
    results = run_ranks(_forward, world, policies)
    for policy in policies:
        got = {place: x for rows, _ in results for name, place, x in rows if name == policy}
        assert got.keys() == want.keys()
        for place, value in want.items():
            assert got[place] == pytest.approx(value, rel=1e-10, abs=1e-12), (policy, place)
    _, dense = dense_step(torch.float64)
    for name, got in results[0][1].items():
        assert (got - dense[name]).norm() / dense[name].norm() < 1e-10, name


def test_a_context_without_an_optimizer_cannot_train():
    mesh = HDPMesh.create(device="cpu")
    context = StepContext.create(mesh, shard(tiny_model(), mesh.device_mesh))
    step = make_batch(make_plan("hdp", [5, 3], 1), 0, random_samples([5, 3]))
    with pytest.raises(ValueError, match="no optimizer"):
        train_step(context, step)
    with pytest.raises(ValueError, match=r"tokens are on meta .* call step\.to\(mesh\.device\)"):
        forward_step(context, step.to(torch.device("meta")))
    assert len(forward_step(context, step)) == 1
    mesh.close()


def _idle_rank(rank, world):
    """A hand-made plan may give a rank no microbatch; it must still reduce with the others."""
    context = make_context(torch.float64)
    lists = [[[0], [1]], [], [[2]]]
    idle = StepPlan.from_lists([5, 3, 9], [[0], [0], [2]], lists, max_tokens_per_rank=16)
    assert [len(idle.microbatches(r)) for r in range(3)] == [2, 0, 1]
    samples = random_samples([5, 3, 9])
    result = train_step(context, make_batch(idle, rank, samples))
    other = train_step(context, make_batch(make_plan("hdp", [5, 3, 9], world), rank, samples))
    return result, other


def test_rank_without_microbatches_takes_part():
    for result, other in run_ranks(_idle_rank, 3, timeout_s=60.0):
        assert result.loss == pytest.approx(other.loss, rel=1e-12)
        assert result.grad_norm == pytest.approx(other.grad_norm, rel=1e-12)


def _clipped(rank, world):
    context = make_context(torch.float64, grad_clip=0.01)
    step = make_batch(make_plan("random1", SEQLENS, world), rank, random_samples(SEQLENS))
    result = train_step(context, step)
    gradients = context.optimizer.gradients
    return result.grad_norm, math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))


def test_gradients_are_clipped_to_the_global_norm():
    before, after = run_ranks(_clipped, 2)[0]
    assert before > 0.1
    assert after == pytest.approx(0.01)
