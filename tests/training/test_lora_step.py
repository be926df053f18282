"""LoRA and scalar heads on several ranks: gradients, and checkpoints for other numbers of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hdp.checkpoint.checkpointer import Checkpointer
from hdp.distributed.fsdp import full_state_dict, shard
from hdp.distributed.mesh import HDPMesh
from hdp.models.lora import LoRA, adapters_off, add_lora
from hdp.models.scalar_head import ScalarHeadLM
from hdp.objectives import ValueLoss
from hdp.training.optim import build_optimizer
from hdp.training.step import StepContext, forward_step, train_step
from hdp.training.token_rows import token_rows
from tests.run_ranks import run_ranks
from tests.tiny_models import (
    VOCAB,
    build_model,
    keep_norms_exact,
    local_batch,
    random_samples,
    tiny_config,
    tiny_model,
)
from tests.training.steps import SEQLENS, TakeGradients, make_batch, make_plan

SAMPLES = random_samples(SEQLENS)
COUNT = sum(sample.num_loss_tokens for sample in SAMPLES)


def lora_model(*, scalar=False, skeleton=False):
    """A model whose adapters are not zero; `skeleton`: what other ranks than 0 build."""
    if skeleton:
        model = build_model(tiny_config(), dtype=torch.float64, skeleton=True)
    else:
        model = tiny_model()
    keep_norms_exact(model)
    if scalar:
        model = ScalarHeadLM.from_causal_lm(model)
    add_lora(model, LoRA(rank=3, alpha=5), seed=11)
    for name, p in model.named_parameters():
        if "lora_" in name and not p.is_meta:
            generator = torch.Generator().manual_seed(len(name))
            p.data = 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return model


def dense(scalar):
    """(loss, gradients) of the same peft model on one process, without sharding or plans."""
    model = lora_model(scalar=scalar)
    output = model(local_batch(SAMPLES), None)
    loss = _value_loss(output) if scalar else -output.sum() / COUNT
    loss.backward()
    return float(loss.detach()), {
        name: p.grad for name, p in model.named_parameters() if p.requires_grad
    }


def _value_loss(values):
    batch = local_batch(SAMPLES)
    return 0.5 * ((values - 0.3).square() * (batch.labels >= 0)).sum() / COUNT


def sharded(rank, world, scalar, policies, activation_checkpointing=False):
    with HDPMesh.create(device="cpu") as mesh:
        model = lora_model(scalar=scalar, skeleton=rank > 0)
        shard(model, mesh.device_mesh, activation_checkpointing=activation_checkpointing)
        context = StepContext.create(mesh, model, TakeGradients(model))
        samples = SAMPLES
        if scalar:
            from dataclasses import replace

            samples = [
                replace(s, columns={"returns": np.full(len(s.input_ids), 0.3)}) for s in SAMPLES
            ]
        objective = (ValueLoss(),) if scalar else ()
        results = {}
        for policy in policies:
            step = make_batch(make_plan(policy, SEQLENS, world), rank, samples)
            if not scalar:
                with adapters_off(model):  # before the first backward: FSDP2 creates parameters
                    base = token_rows(mesh, step, forward_step(context, step))
            result = train_step(context, step, *objective)
            results[policy] = (
                result.loss,
                context.optimizer.gradients,
                None if scalar else base,
                all(p.grad is None for p in model.parameters() if not p.requires_grad),
            )
        return results


@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_gradients_equal_dense(world, scalar):
    pytest.importorskip("peft")
    loss, want = dense(scalar)
    plain = tiny_model()
    keep_norms_exact(plain)
    rows = plain(local_batch(SAMPLES), None).detach().numpy()
    for policy, (value, gradients, base, frozen) in run_ranks(
        sharded, world, scalar, ["hdp", "random1"]
    )[0].items():
        assert value == pytest.approx(loss, rel=1e-10)
        assert frozen and gradients.keys() == want.keys()
        for name, gradient in gradients.items():
            assert (gradient - want[name]).norm() <= 1e-10 * want[name].norm(), (policy, name)
        if not scalar:  # the adapter switched off is the model it was put into
            ends = np.cumsum(SEQLENS)
            for row, start, stop in zip(base, [0, *ends], ends, strict=False):
                np.testing.assert_allclose(row[1:], rows[start : stop - 1], rtol=1e-10)


def test_gradients_with_recomputed_layers():
    pytest.importorskip("peft")
    loss, want = dense(False)
    value, gradients, _, _ = run_ranks(sharded, 2, False, ["hdp"], True)[0]["hdp"]
    assert value == pytest.approx(loss, rel=1e-10)
    for name, gradient in gradients.items():
        assert (gradient - want[name]).norm() <= 1e-10 * want[name].norm(), name


def _off_is_base(rank, world):
    """The bits of a sharded model with adapters off, and of the same model without any."""
    with HDPMesh.create(device="cpu") as mesh:
        step = make_batch(make_plan("random1", SEQLENS, world), rank, SAMPLES)
        outputs = []
        for with_lora in (False, True):
            model = lora_model() if with_lora else keep_norms_exact(tiny_model())
            shard(model, mesh.device_mesh)
            context = StepContext.create(mesh, model)
            if with_lora:
                with adapters_off(model):
                    outputs.append(forward_step(context, step))
            else:
                outputs.append(forward_step(context, step))
        return all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


@pytest.mark.parametrize("world", [1, 3])
def test_adapter_off_is_the_base_bit_for_bit(world):
    pytest.importorskip("peft")
    assert all(run_ranks(_off_is_base, world))


def _train(rank, world, folder, first, last, scalar):
    """Steps first..last on `world` ranks, resumed from `folder` and saved there."""
    with HDPMesh.create(device="cpu") as mesh:
        model = lora_model(scalar=scalar, skeleton=rank > 0)
        shard(model, mesh.device_mesh)
        optimizer = build_optimizer(model, lr=1e-2)
        context = StepContext.create(mesh, model, optimizer)
        samples = SAMPLES
        if scalar:
            from dataclasses import replace

            samples = [
                replace(s, columns={"returns": np.full(len(s.input_ids), 0.3)}) for s in SAMPLES
            ]
        objective = (ValueLoss(),) if scalar else ()
        with Checkpointer(folder, mesh, model_config={"vocab_size": VOCAB}) as saver:
            restored = saver.load(model=model, optimizer=optimizer)
            assert (restored.step if restored else 0) == first
            for _ in range(first, last):
                step = make_batch(make_plan("hdp", SEQLENS, world), rank, samples)
                train_step(context, step, *objective)
            saver.save(last, model=model, optimizer=optimizer)
        return full_state_dict(model)


@pytest.mark.parametrize("scalar", [False, True])
def test_resume_on_another_number_of_ranks(scalar, tmp_path):
    pytest.importorskip("peft")
    straight = run_ranks(_train, 1, tmp_path / "a", 0, 4, scalar)[0]
    run_ranks(_train, 2, tmp_path / "b", 0, 2, scalar)
    resumed = run_ranks(_train, 3, tmp_path / "b", 2, 4, scalar)[0]
    assert straight.keys() == resumed.keys()
    initial = lora_model(scalar=scalar).state_dict()
    for name, x in straight.items():
        torch.testing.assert_close(resumed[name], x, rtol=1e-7, atol=1e-9)
        if "lora_" not in name and name != "score.weight":
            assert torch.equal(resumed[name], initial[name]), name
