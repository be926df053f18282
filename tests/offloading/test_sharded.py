"""Offload of models with weights and activations sharded over ranks: FSDP2, DTensor."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from tests.offloading.offload_engines import (
    POLICIES,
    TIGHT,
    assert_same,
    forward_of,
    gradients,
    make_input,
    make_model,
    open_engine,
)
from tests.run_ranks import run_ranks


def local_gradients(model, x, forward=None):
    gradients(model, x, forward)
    return {name: p.grad.to_local().clone() for name, p in model.named_parameters()}


def offload_every_way(model, x):
    """[bytes sent] by policy; gradients are those without offload."""
    want, sent = local_gradients(model, x), []
    for policy in POLICIES:
        with open_engine(buffers=TIGHT) as engine:
            for _ in range(2):
                assert_same(
                    local_gradients(model, x, forward_of(engine, policy, min_bytes=500)), want
                )
            sent.append(engine.counts.sent)
    return sent


def fsdp_rank(rank, world_size, reshard, param_dtype):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh("cpu", (world_size,))
    model = make_model(2, dtype=torch.float32)
    options = {
        "mesh": mesh,
        "reshard_after_forward": reshard,
        "mp_policy": MixedPrecisionPolicy(param_dtype=param_dtype),
    }
    for layer in model:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    return offload_every_way(model, make_input(dtype=param_dtype, seed=rank))


@pytest.mark.parametrize("param_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reshard", [True, False])
def test_fsdp2(reshard, param_dtype):
    """Weights have no memory between a layer's forward and backward; nothing is made with them
    then, and none of them travel."""
    for sent in run_ranks(fsdp_rank, 2, reshard, param_dtype):
        saved = 96 * 32 * param_dtype.itemsize * 2 * 2  # of one width, per layer and pass
        assert sent[0] > 10 * saved
        assert sent[-1] < 4 * saved  # layer inputs and attention outputs


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x):
        return self.down(F.silu(self.up(self.norm(x))))


def dtensor_rank(rank, world_size):
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    torch.manual_seed(0)
    model = nn.Sequential(Mlp(), Mlp())
    plan = {
        "norm": SequenceParallel(sequence_dim=0, use_local_output=False),
        "up": ColwiseParallel(input_layouts=Shard(0), use_local_output=False),
        "down": RowwiseParallel(output_layouts=Shard(0)),
    }
    for layer in model:
        parallelize_module(layer, init_device_mesh("cpu", (world_size,)), plan)
    return offload_every_way(model, torch.randn(40, 64))


def test_dtensor():
    """Tensor and sequence parallel: saved tensors are DTensors, and their local parts are sent."""
    for sent in run_ranks(dtensor_rank, 2):
        assert sent[0] > 0


def collective_rank(rank, world_size):
    import torch.distributed._functional_collectives as collectives

    x = torch.full((400,), rank + 1.0, requires_grad=True)
    with open_engine(buffers=TIGHT) as engine:
        gathered = collectives.all_gather_tensor_autograd(x * 1, 0, dist.group.WORLD)
        assert type(gathered).__name__ == "AsyncCollectiveTensor"
        with forward_of(engine):
            y = (gathered * gathered).sum()
        y.backward()
        assert torch.equal(x.grad, 2 * world_size * x.detach())
        return engine.counts.sent


@pytest.mark.filterwarnings("ignore:.*all_gather_tensor_autograd.*")
def test_a_collective_in_flight_is_waited_for():
    """A collective's output is not copied or watched for writes before the collective ends."""
    assert run_ranks(collective_rank, 2) == [3200, 3200]
