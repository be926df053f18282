"""AdamW on shards equals AdamW on whole parameters."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from hdp.checkpoint.checkpointer import Checkpointer
from hdp.distributed.fsdp import full_state_dict, set_microbatch, shard, unshard_all
from hdp.distributed.mesh import HDPMesh
from hdp.training.optim import (
    KernelAdamW,
    _keep_options,
    build_optimizer,
    decay_groups,
    optimizer_name,
    set_learning_rate,
)
from tests.run_ranks import run_ranks
from tests.tiny_models import tiny_model

# ---- groups ----


def test_norms_and_biases_do_not_decay():
    model = tiny_model("qwen2", dtype=torch.float32)
    model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    names = {id(p): name for name, p in model.named_parameters()}
    decaying, rest = decay_groups(model, 0.1)
    assert decaying["weight_decay"] == 0.1
    assert rest["weight_decay"] == 0.0
    assert all("norm" in n or n.endswith("bias") for n in (names[id(p)] for p in rest["params"]))
    kept = [names[id(p)] for p in decaying["params"]]
    assert not any("norm" in n or n.endswith("bias") for n in kept)
    assert any("embed_tokens" in n for n in kept) and any("lm_head" in n for n in kept)
    assert len(decaying["params"]) + len(rest["params"]) == len(names) - 1


def test_bad_options_are_named():
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="weight_decay=-1"):
        build_optimizer(model, lr=1e-3, weight_decay=-1)
    with pytest.raises(ValueError, match="'sgd' is unknown"):
        build_optimizer(model, lr=1e-3, backend="sgd")
    with pytest.raises(ValueError, match="no trainable parameters"):
        build_optimizer(model.requires_grad_(False), lr=1e-3)


# ---- the update ----

OPTIONS = {"lr": 0.03, "weight_decay": 0.2, "betas": (0.8, 0.95), "eps": 1e-6}


def _by_hand(parameter, gradients):
    """AdamW as in its paper: Algorithm 2, with the schedule multiplier in the learning rate."""
    x = parameter.detach().clone()
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    beta1, beta2 = OPTIONS["betas"]
    decay = OPTIONS["weight_decay"] if x.ndim >= 2 else 0.0
    for t, g in enumerate(gradients, start=1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
        x = x - OPTIONS["lr"] * (m_hat / (v_hat.sqrt() + OPTIONS["eps"]) + decay * x)
    return x


def _model():
    torch.manual_seed(0)
    # 5 and 3 rows: uneven shards, and empty ones on four ranks
    return nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double()


def _gradients(model, steps=6):
    generator = torch.Generator().manual_seed(1)
    return [
        [
            torch.randn(p.shape, generator=generator, dtype=p.dtype) * 10.0 ** (step - 3)
            for p in model.parameters()
        ]
        for step in range(steps)
    ]


def _train_sharded(model, optimizer, gradients):
    for step_gradients in gradients:
        unshard_all(model)
        set_microbatch(model, reduce=True)
        # A loss with the given gradient, all of it contributed by the last rank.
        share = 1.0 if dist.get_rank() == dist.get_world_size() - 1 else 0.0
        out = model(torch.ones(1, 7, dtype=torch.float64)).sum() * 0
        loss = sum((p * g).sum() for p, g in zip(model.parameters(), step_gradients, strict=True))
        (out + share * loss).backward()
        optimizer.step()
        optimizer.zero_grad()


def _sharded_run(rank, world_size):
    model = _model()
    gradients = _gradients(model)
    shard(model, init_device_mesh("cpu", (world_size,)), layers=list(model))
    optimizer = build_optimizer(model, **OPTIONS)
    assert optimizer_name(optimizer) == "AdamW (torch, fused)"
    _train_sharded(model, optimizer, gradients)
    return full_state_dict(model)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_update_of_shards_is_that_of_the_whole(world_size):
    state = run_ranks(_sharded_run, world_size)[0]
    model = _model()
    gradients = _gradients(model)
    for i, (name, parameter) in enumerate(model.named_parameters()):
        want = _by_hand(parameter, [step[i] for step in gradients])
        torch.testing.assert_close(state[name], want, rtol=1e-12, atol=1e-12)


def _train(model, optimizer, gradients):
    for step_gradients in gradients:
        for parameter, gradient in zip(model.parameters(), step_gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def test_learning_rate_is_used_from_the_next_step_on():
    model = _model()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = build_optimizer(model, **OPTIONS)
    set_learning_rate(optimizer, 0.0)
    assert all(
        torch.equal(a, b)
        for a, b in zip(_train(model, optimizer, _gradients(model, 1)), before, strict=True)
    )
    set_learning_rate(optimizer, 0.1)
    assert {group["lr"] for group in optimizer.param_groups} == {0.1}


def test_loaded_state_keeps_the_options_of_this_run():
    """Regression: a run resumed with another --weight-decay kept the old one."""
    first = build_optimizer(_model(), lr=0.1, weight_decay=0.3, betas=(0.8, 0.9))
    second = build_optimizer(_model(), lr=0.2, weight_decay=0.0, betas=(0.7, 0.99))
    options = [{**group, "params": None} for group in second.param_groups]
    second.load_state_dict(first.state_dict())
    assert [{**group, "params": None} for group in second.param_groups] == options


# ---- kernels of libraries ----

LIBRARIES = ("apex", "transformer_engine")


def _adam_of_a_library(overflow, lists, lr, beta1, beta2, eps, step, adamw, bias_correction, decay):
    """The arithmetic of apex's csrc/multi_tensor_adam.cu in decoupled mode."""
    assert adamw == 1 and bias_correction == 1 and isinstance(step, int)
    # The real launcher launches at the last chunk of the last tensor; an empty one has no chunk.
    assert lists[0][-1].numel(), "the last tensor is empty: nothing would be updated"
    for tensors in zip(*lists, strict=True):
        assert all(x.is_contiguous() and type(x) in (torch.Tensor, nn.Parameter) for x in tensors)
        g, p, m, v = tensors
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        m_hat, v_hat = m / (1 - beta1**step), v / (1 - beta2**step)
        p.sub_(lr * (m_hat / (v_hat.sqrt() + eps) + decay * p))


def _put_fake_libraries(modules) -> None:
    """Fake both libraries' interfaces with the arithmetic above."""

    def apply(op, flag, lists, *args):
        return op(flag, lists, *args)

    fakes = {
        "apex": {},
        "apex.multi_tensor_apply": {"multi_tensor_applier": apply},
        "amp_C": {"multi_tensor_adam": _adam_of_a_library},
        "transformer_engine": {},
        "transformer_engine.pytorch": {},
        "transformer_engine.pytorch.optimizers": {
            "multi_tensor_adam": _adam_of_a_library,
            "multi_tensor_applier": apply,
        },
    }
    for name, members in fakes.items():
        modules[name] = types.ModuleType(name)
        vars(modules[name]).update(members)


@pytest.fixture
def fake_libraries(monkeypatch):
    fakes = {}
    _put_fake_libraries(fakes)
    for name, module in fakes.items():
        monkeypatch.setitem(sys.modules, name, module)


class _OnCPU(KernelAdamW):
    """Runs the fake kernel on CPU: only the device check and the overflow flag need a GPU."""

    def __init__(self, params, *, library, **options):
        with pytest.raises(ValueError, match=f"'{library}' needs parameters on cuda"):
            super().__init__(params, library=library, **options)
        self._overflow = torch.zeros(1, dtype=torch.int32)
        self.register_load_state_dict_pre_hook(_keep_options)


def _on_cpu(model, library):
    options = {k: v for k, v in OPTIONS.items() if k != "weight_decay"}
    return _OnCPU(decay_groups(model, OPTIONS["weight_decay"]), library=library, **options)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_is_the_same_update_with_the_same_state(fake_libraries, library):
    models = [_model(), _model()]
    optimizers = [_on_cpu(models[0], library), build_optimizer(models[1], **OPTIONS)]
    assert optimizer_name(optimizers[0]) == f"AdamW ({library})"
    gradients = _gradients(models[0])
    first, second = (_train(m, o, gradients[:3]) for m, o in zip(models, optimizers, strict=True))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    # A run may switch between the two.
    states = [o.state_dict() for o in optimizers]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    assert states[0]["state"][0].keys() == states[1]["state"][0].keys()
    optimizers[1].load_state_dict(states[0])
    optimizers[0].load_state_dict(states[1])
    assert [group["fused"] for group in optimizers[0].param_groups] == [False, False]
    assert [group["fused"] for group in optimizers[1].param_groups] == [True, True]
    for a, b in zip(
        *(_train(m, o, gradients[3:]) for m, o in zip(models, optimizers, strict=True)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def _through_a_checkpoint(rank, world_size, directory, library):
    """Three steps with a library, a checkpoint, three with torch."""
    _put_fake_libraries(sys.modules)
    gradients = _gradients(_model())
    with HDPMesh.create(device="cpu") as mesh:
        options = {"mesh": mesh, "keep_last": 1, "model_config": {}, "seed": 0}
        with Checkpointer(Path(directory), **options) as checkpointer:
            first = _model()
            shard(first, mesh.device_mesh, layers=list(first))
            optimizer = _on_cpu(first, library)
            _train_sharded(first, optimizer, gradients[:3])
            checkpointer.save(3, model=first, optimizer=optimizer, extra={})
            checkpointer.wait()
            second = _model()
            shard(second, mesh.device_mesh, layers=list(second))
            optimizer = build_optimizer(second, **OPTIONS)
            assert checkpointer.load(model=second, optimizer=optimizer).step == 3
            _train_sharded(second, optimizer, gradients[3:])
            return full_state_dict(second)


@pytest.mark.parametrize("library", LIBRARIES)
def test_checkpoint_of_a_library_is_one_of_torch(tmp_path, library):
    """On four ranks: shards of 5 and 3 rows are uneven, and some are empty."""
    state = run_ranks(_through_a_checkpoint, 4, str(tmp_path), library)[0]
    model = _model()
    gradients = _gradients(model)
    for i, (name, parameter) in enumerate(model.named_parameters()):
        want = _by_hand(parameter, [step[i] for step in gradients])
        torch.testing.assert_close(state[name], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("library", LIBRARIES)
def test_missing_library_is_named(monkeypatch, library):
    for name in ("amp_C", "transformer_engine"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=rf"'{library}' .*cannot be imported .*use 'adamw'"):
        build_optimizer(nn.Linear(2, 2), lr=1e-3, backend=library)
