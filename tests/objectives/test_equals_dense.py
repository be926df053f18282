"""Every objective, for any plan on any number of ranks, equals one dense process: loss, gradients.

The dense side differentiates the published formula on padded tensors (dense.py); ours runs a real
model through `train_step`.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hdp.distributed.fsdp import shard
from hdp.distributed.mesh import HDPMesh
from hdp.objectives import BradleyTerry, ValueLoss, pair_units
from hdp.scheduler import CostModel, plan
from hdp.training.step import StepContext, train_step
from tests.objectives import dense
from tests.objectives.cases import BY_NAME, CASES, SEQLENS, samples_for
from tests.random_plans import random_plan
from tests.run_ranks import run_ranks
from tests.tiny_models import keep_norms_exact, plain_logprobs, plain_model, tiny_model
from tests.training.steps import TakeGradients, make_batch

COST = CostModel.from_coefficients(quadratic_s=1e-6, linear_s=1e-4, fixed_s=1e-4)


def make_plan(case, world, policy):
    if policy == "random" and not case.paired:
        return random_plan(SEQLENS, world, seed=3)
    units = pair_units(len(SEQLENS)) if case.paired else None
    capacity = max(24, -(-(97 + 40) // world) + 4) if policy == "tight" else 300
    cost = (
        COST
        if policy == "tight"
        else CostModel.from_coefficients(
            quadratic_s=1e-2,
            linear_s=1e-6,  # rings wherever they are possible
        )
    )
    return plan(SEQLENS, hdp_size=world, max_tokens_per_rank=capacity, cost=cost, units=units)


def dense_gradients(case, dtype=torch.float64):
    """(loss, {parameter: gradient}) of the published formula."""
    samples = samples_for(case)
    model = keep_norms_exact(plain_model(tiny_model(dtype=dtype).double()))
    longest = max(SEQLENS)
    rows, entropies = [], []
    for sample, logprobs in zip(samples, plain_logprobs(model, samples), strict=True):
        padded = torch.zeros(longest, dtype=torch.float64)
        padded[: len(logprobs)] = logprobs
        rows.append(padded)
        if case.entropy:
            logits = model(torch.from_numpy(sample.input_ids)[None]).logits[0]
            logp = logits.log_softmax(-1)
            entropy = torch.zeros(longest, dtype=torch.float64)
            entropy[: len(logp)] = -(logp.exp() * logp).sum(-1)
            entropies.append(entropy)
    m = dense.pad([s.labels(0, len(s.input_ids)) >= 0 for s in samples], longest)
    names = list(samples[0].columns)
    columns = {
        name: dense.pad(
            [np.nan_to_num(s.shifted(name, 0, len(s.input_ids))) for s in samples], longest
        )
        for name in names
    }
    if case.mode is not None:
        extra = {"constant": 100.0} if case.mode == "constant" else {}
        extra |= {"groups": torch.arange(len(samples)) // 2} if case.mode == "group" else {}
        columns["c"] = dense.normalization(m, case.mode, **extra)
    if case.entropy:
        columns["entropy"] = torch.stack(entropies)
    loss = case.formula(torch.stack(rows), m, **columns)
    loss.backward()
    return float(loss.detach()), {f"model.{name}": p.grad for name, p in model.named_parameters()}


def sharded_gradients(rank, world, names, policies, dtype):
    mesh = HDPMesh.create(device="cpu")
    model = keep_norms_exact(tiny_model(dtype=dtype))
    shard(model, mesh.device_mesh)
    context = StepContext.create(mesh, model, TakeGradients(model))
    results = {}
    for name in names:
        case = BY_NAME[name]
        model.with_entropy = case.entropy
        samples = samples_for(case)
        for policy in policies:
            step = make_batch(make_plan(case, world, policy), rank, samples)
            result = train_step(context, step, case.make(context.comm))
            results[name, policy] = result, context.optimizer.gradients
    return results


@pytest.fixture(scope="module")
def oracle():
    return {case.name: dense_gradients(case) for case in CASES}


@pytest.mark.parametrize(
    "world",
    [1, 2, pytest.param(3, marks=pytest.mark.slow), 4, pytest.param(8, marks=pytest.mark.slow)],
)
def test_equals_dense(world, oracle):
    policies = ["tight", "rings", "random"]
    names = [case.name for case in CASES]
    ranks = run_ranks(sharded_gradients, world, names, policies, torch.float64)
    for (name, policy), (result, gradients) in ranks[0].items():
        loss, want = oracle[name]
        assert result.loss == pytest.approx(loss, rel=1e-10, abs=1e-12), (name, policy)
        for parameter, gradient in gradients.items():
            error = (gradient - want[parameter]).norm() / want[parameter].norm()
            assert error < 1e-10, (name, policy, parameter, float(error))
    for other in ranks[1:]:
        for key, (result, _) in other.items():
            assert result.metrics == ranks[0][key][0].metrics


def test_single_precision_is_close():
    names = ["grpo", "gspo-wide", "dpo", "cispo"]
    ranks = run_ranks(sharded_gradients, 2, names, ["rings"], torch.float32)
    for (name, _), (result, gradients) in ranks[0].items():
        loss, want = dense_gradients(BY_NAME[name], torch.float32)
        assert result.loss == pytest.approx(loss, rel=1e-5, abs=1e-5), name
        total = sum(float((g - want[p]).square().sum()) for p, g in gradients.items())
        norm = sum(float(want[p].square().sum()) for p in gradients)
        assert (total / norm) ** 0.5 < 1e-5, name


def test_cases_are_not_trivial(oracle):
    """Masks bite, but not everywhere; and no two objectives have the same gradient."""
    gradients = {
        name: torch.cat([g.flatten() for g in found.values()])
        for name, (_, found) in oracle.items()
    }
    names = list(gradients)
    for i, a in enumerate(names):
        assert gradients[a].norm() > 1e-6
        for b in names[i + 1 :]:
            difference = (gradients[a] - gradients[b]).norm() / gradients[a].norm()
            assert difference > 1e-3, (a, b)


def _scalar_step(rank, world, dtype):
    from hdp.training import step as module

    mesh = HDPMesh.create(device="cpu")
    model = keep_norms_exact(tiny_model(dtype=dtype))
    shard(model, mesh.device_mesh)
    inner = model.forward
    model.forward = lambda batch, comm: torch.tanh(0.3 * inner(batch, comm))
    context = module.StepContext.create(mesh, model, TakeGradients(model))
    case = BY_NAME["dpo"]
    samples = samples_for(case)
    results = {}
    for name, objective in _scalar_objectives(context.comm).items():
        for policy in ("tight", "rings"):
            step = make_batch(make_plan(case, world, policy), rank, _with_returns(samples))
            result = train_step(context, step, objective)
            results[name, policy] = result.loss, context.optimizer.gradients
    return results


def _scalar_objectives(comm):
    return {
        "reward": BradleyTerry(margin=0.1, comm=comm),
        "value": ValueLoss(),
        "value-clipped": ValueLoss(clip=0.05),
    }


def _with_returns(samples):
    from dataclasses import replace

    result = []
    for i, sample in enumerate(samples):
        rng = np.random.default_rng(i)
        n = len(sample.input_ids)
        result.append(
            replace(
                sample,
                columns={
                    "returns": rng.normal(size=n) - 0.8,
                    "old_values": rng.normal(size=n) - 0.8,
                },
            )
        )
    return result


@pytest.mark.parametrize("world", [1, 3])
def test_scores_and_values_equal_dense(world):
    samples = _with_returns(samples_for(BY_NAME["dpo"]))
    longest = max(SEQLENS)
    got = run_ranks(_scalar_step, world, torch.float64)[0]
    for name in ("reward", "value", "value-clipped"):
        model = keep_norms_exact(plain_model(tiny_model(dtype=torch.float64)))
        rows = []
        for logprobs in plain_logprobs(model, samples):
            padded = torch.zeros(longest, dtype=torch.float64)
            padded[: len(logprobs)] = logprobs
            rows.append(torch.tanh(0.3 * padded))
        output = torch.stack(rows)
        m = dense.pad([s.labels(0, len(s.input_ids)) >= 0 for s in samples], longest)
        if name == "reward":
            last = torch.tensor(SEQLENS) - 1
            loss = dense.bradley_terry(output[torch.arange(len(samples)), last], margin=0.1)
        else:
            columns = {
                key: dense.pad([s.shifted(key, 0, len(s.input_ids)) for s in samples], longest)
                for key in ("returns", "old_values")
            }
            c = dense.normalization(m, "token")
            clip = 0.05 if name == "value-clipped" else None
            loss = dense.value_loss(output, m, c, **columns, clip=clip)
        if name == "reward":  # the last position has no label, so this head scores it 0
            assert float(loss.detach()) == pytest.approx(got[name, "tight"][0], rel=1e-10)
            continue
        loss.backward()
        for policy in ("tight", "rings"):
            value, gradients = got[name, policy]
            assert value == pytest.approx(float(loss.detach()), rel=1e-10), (name, policy)
            for parameter, gradient in gradients.items():
                want = dict(model.named_parameters())[parameter.removeprefix("model.")].grad
                assert (gradient - want).norm() / want.norm() < 1e-10, (name, policy, parameter)
