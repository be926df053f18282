"""What shard() does to a model: rank 0's weights on all ranks, norms over shards, clear errors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from hdp.distributed.fsdp import (
    clip_grad_norm,
    full_state_dict,
    set_microbatch,
    shard,
    unshard_all,
)
from hdp.errors import NonFiniteError
from hdp.models.causal_lm import CausalLM
from hdp.models.export import export_model
from hdp.models.loading import build_model, load_model
from tests.run_ranks import RankError, run_ranks
from tests.tiny_models import tiny_config, tiny_model


def _mesh(world_size):
    return init_device_mesh("cpu", (world_size,), mesh_dim_names=("hdp",))


# ---- whose weights ----


def _weights(rank, world_size, skeleton):
    if skeleton and rank:
        model = build_model(tiny_config(), dtype=torch.float32, skeleton=True)
    else:
        model = build_model(tiny_config(), dtype=torch.float32, seed=rank)
    shard(model, _mesh(world_size))
    inv_freq = model.model.model.rotary_emb.inv_freq
    return full_state_dict(model), inv_freq, isinstance(model, CausalLM)


@pytest.mark.parametrize("skeleton", [False, True])
def test_rank0_weights_count(skeleton):
    want = build_model(tiny_config(), dtype=torch.float32, seed=0)
    for world_size in (1, 3):
        results = run_ranks(_weights, world_size, skeleton)
        state, _, is_causal_lm = results[0]
        assert is_causal_lm
        assert state.keys() == want.state_dict().keys()
        for name, x in want.state_dict().items():
            assert torch.equal(state[name], x), name
        for rank, (state, inv_freq, _) in enumerate(results):
            assert rank == 0 or state == {}
            assert torch.equal(inv_freq, want.model.model.rotary_emb.inv_freq)


def _load_shard_export(rank, world_size, source, target):
    """Load a folder's weights, shard them over all ranks, and export the shards again."""
    model = load_model(source, skeleton=rank > 0)
    shard(model, _mesh(world_size), param_dtype=torch.bfloat16)
    state = full_state_dict(model)
    if rank == 0:
        export_model(model, target, state, dtype=None)


@pytest.mark.parametrize("tied", [False, True])
def test_load_shard_export_is_the_identity(tmp_path, tied):
    model = tiny_model("qwen3", dtype=torch.float32, tie_word_embeddings=tied)
    export_model(model, tmp_path / "in", model.state_dict(), dtype=None)
    run_ranks(_load_shard_export, 3, tmp_path / "in", tmp_path / "out")
    again = load_model(tmp_path / "out")
    assert again.config.tie_word_embeddings == tied
    for name, x in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], x), name
    assert type(again.model).__name__ == "Qwen3ForCausalLM"


def _different_models(rank, world_size):
    hidden = 32 if rank != 1 else 64
    shard(build_model(tiny_config(hidden_size=hidden)), _mesh(world_size))


def _no_weights_on_rank0(rank, world_size):
    shard(build_model(tiny_config(), skeleton=rank == 0), _mesh(world_size))


def test_ranks_that_differ_are_named():
    with pytest.raises(RankError, match=r"ranks \[1\] built a different model") as caught:
        run_ranks(_different_models, 3)
    assert len(caught.value.ranks) == 3
    with pytest.raises(RankError, match=r"rank 0 has no weights \(model\.model\.embed") as caught:
        run_ranks(_no_weights_on_rank0, 2)
    assert len(caught.value.ranks) == 2


# ---- norms ----


def _model_with_gradients(world_size, seed=0):
    torch.manual_seed(seed)
    # 5 and 3 rows: uneven and, on many ranks, empty shards
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3)).double()
    x = torch.randn(7, 3, dtype=torch.float64)
    dense = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    shard(model, _mesh(world_size), layers=list(model))
    unshard_all(model)
    set_microbatch(model, reduce=True)
    rank = dist.get_rank()
    share = x if rank == 0 else x[:1]
    ((model(share).square().sum()) * (1.0 if rank == 0 else 0.0)).backward()
    return model, dense


def _clip(rank, world_size, max_norm):
    model, dense = _model_with_gradients(world_size)
    want = math.sqrt(sum(g.square().sum().item() for g in dense))
    norm = clip_grad_norm(model, max_norm)
    assert norm == pytest.approx(want, rel=1e-12)
    scale = 1.0 if max_norm is None else min(1.0, max_norm / want)
    for parameter, grad in zip(model.parameters(), dense, strict=True):
        torch.testing.assert_close(parameter.grad.full_tensor(), grad * scale)
    return norm


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("max_norm", [None, 0.5, 1e9])
def test_clip_equals_the_dense_model(world_size, max_norm):
    assert len(set(run_ranks(_clip, world_size, max_norm))) == 1


def _non_finite(rank, world_size, value):
    model, _ = _model_with_gradients(world_size)
    if rank == 1:  # one number in one rank's shard
        model[0].weight.grad.to_local()[0, 0] = value
    try:
        clip_grad_norm(model, 1.0)
    except NonFiniteError as error:
        return str(error)
    return None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_is_seen_by_all(value):
    messages = run_ranks(_non_finite, 3, value)
    assert len(set(messages)) == 1
    assert "1 parameters on ranks [1], first 0.weight" in messages[0]


def test_clip_works_without_sharding():
    model = nn.Linear(2, 2)
    assert clip_grad_norm(model, 1.0) == 0.0
    model(torch.ones(1, 2)).sum().backward()
    norm = clip_grad_norm(model, 0.5)
    assert norm == pytest.approx(math.sqrt(6), rel=1e-6)
    assert clip_grad_norm(model, None) == pytest.approx(0.5, rel=1e-6)
    with pytest.raises(ValueError, match="max_norm=0"):
        clip_grad_norm(model, 0)


def _no_layers(rank, world_size):
    with pytest.raises(ValueError, match="no layers"):
        shard(nn.Linear(2, 2), _mesh(world_size), layers=[])
    mesh = init_device_mesh("cpu", (1, world_size), mesh_dim_names=("pp", "hdp"))
    with pytest.raises(ValueError, match="2 axes"):
        shard(nn.Sequential(nn.Linear(2, 2)), mesh)


def test_bad_arguments_are_named():
    run_ranks(_no_layers, 2)
