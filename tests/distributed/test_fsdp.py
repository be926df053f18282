"""FSDP2 with SUM reduction, on ranks with different numbers of microbatches."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from hdp.attention.comm import RingComm
from hdp.data.pack import pack_rank
from hdp.distributed.fsdp import (
    check_sharded,
    reduce_gradients,
    reshard_all,
    set_microbatch,
    shard,
    unshard_all,
)
from hdp.models.loading import build_model
from hdp.objectives import token_cross_entropy
from hdp.scheduler import StepPlan
from tests.run_ranks import run_ranks
from tests.tiny_models import (
    keep_norms_exact,
    plain_logprobs,
    plain_model,
    random_samples,
    tiny_config,
    tiny_model,
)


def _mesh(world_size):
    return init_device_mesh("cpu", (world_size,), mesh_dim_names=("hdp",))


class _Collectives(TorchDispatchMode):
    """Records the names of collectives that run inside it, excluding ring transfers."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        library, name = func.name().split("::")
        if library in ("c10d", "_c10d_functional") and name not in ("send", "recv_"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


# ---- gradients ----

# (seqlens, rings, microbatches by rank)
PLANS = {
    1: [([5, 1, 17], [[0]] * 3, [[[0], [1], [2]]])],
    2: [
        # one microbatch on one rank, five on the other
        ([9, 8, 1, 30, 4, 11], [[0]] + [[1]] * 5, [[[0]], [[1], [2], [3], [4], [5]]]),
        # the ring is the first microbatch on one rank and the third on the other
        (
            [40, 3, 7, 9, 5],
            [[1, 0], [0], [1], [1], [1]],
            [[[0], [1]], [[2], [3], [0], [4]]],
        ),
        # a rank without any tokens
        ([12, 6], [[0], [0]], [[[0], [1]], [[]]]),
        # the ring is last on one rank but not on the other: reducing in backward would deadlock
        ([40, 9], [[0, 1], [1]], [[[0]], [[0], [1]]]),
    ],
    3: [
        (
            [50, 33, 4, 6, 2, 19],
            [[2, 0, 1], [1, 2], [0], [0], [1], [2]],
            [[[2], [0], [3]], [[0], [1], [4]], [[0, 5], [1], []]],
        ),
        ([21, 30, 8], [[0, 1, 2], [1, 2], [0]], [[[2], [0]], [[1], [0]], [[1], [0]]]),
    ],
    4: [
        (
            [64, 21, 3, 5, 7, 2, 13, 1],
            [[3, 1, 0, 2], [0, 2], [0], [1], [2], [3], [3], [1]],
            [[[0], [1], [2]], [[3], [0], [7]], [[0], [1, 4], []], [[5], [0], [6]]],
        ),
        ([25, 4], [[0, 1, 2, 3], [2]], [[[0], []], [[0], []], [[0], [1]], [[0], []]]),
    ],
}


def _expected_gradients(model, samples, global_count):
    """(loss, {name: gradient}) of the plain model, run one sequence at a time."""
    plain = keep_norms_exact(plain_model(model))
    loss = -sum(x.sum() for x in plain_logprobs(plain, samples)) / global_count
    loss.backward()
    grads = {f"model.{name}": p.grad for name, p in plain.named_parameters()}
    return loss.detach(), grads


def _backward_all(model, plan, rank, samples, global_count, comm, overlap=True):
    """Run one step's forwards and backwards; returns (local loss, collectives of each microbatch).

    Without overlap there is one more entry, for the reduction.
    """
    loss_sum, seen = torch.zeros((), dtype=torch.float64), []
    num_microbatches = int(plan.num_microbatches[rank])
    for index in range(num_microbatches):
        batch = pack_rank(plan, rank, samples)[index]
        set_microbatch(model, reduce=overlap and index == num_microbatches - 1)
        with _Collectives() as collectives:
            loss = token_cross_entropy(model(batch, comm), global_count=global_count)
            loss.backward()
        loss_sum += loss.detach()
        seen.append(collectives.names)
    if not overlap:
        with _Collectives() as collectives:
            reduce_gradients(model)
        seen.append(collectives.names)
    return loss_sum, seen


def _check_step(rank, world_size, case, options, tolerance):
    seqlens, rings, microbatches = PLANS[world_size][case]
    plan = StepPlan.from_lists(seqlens, rings, microbatches, max_tokens_per_rank=1000)
    plan.validate()
    overlap = options.pop("overlap", plan.ends_together)
    samples = random_samples(seqlens)
    global_count = sum(int((s.labels(0, len(s.input_ids)) != -100).sum()) for s in samples)
    tied = options.pop("tie_word_embeddings", False)
    model = keep_norms_exact(tiny_model("qwen2", tie_word_embeddings=tied))
    expected_loss, expected = _expected_gradients(model, samples, global_count)
    if rank > 0:
        config = tiny_config("qwen2", tie_word_embeddings=tied)
        model = keep_norms_exact(build_model(config, dtype=torch.float64, skeleton=True))
    shard(model, _mesh(world_size), **options)
    for step in range(2):
        model.zero_grad()
        unshard_all(model)
        loss, seen = _backward_all(model, plan, rank, samples, global_count, RingComm(), overlap)
        dist.all_reduce(loss)
        assert abs(loss - expected_loss) < tolerance, (loss, expected_loss)
        assert seen[:-1] == [[]] * (len(seen) - 1), f"collectives before the last: {seen}"
        num_units = len(model.layers) + 1
        expected_seen = num_units if world_size > 1 else 0
        assert len(seen[-1]) == expected_seen, seen[-1]
        assert all("reduce_scatter" in name for name in seen[-1]), seen[-1]
        names = [name for name, _ in model.named_parameters()]
        assert sorted(names) == sorted(expected)
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor), f"{name} is not sharded"
            got, want = parameter.grad.full_tensor(), expected[name]
            error = (got - want).abs().max() / max(1.0, want.abs().max())
            assert error < tolerance, f"step {step}: {name} is off by {error:.3g}"


@pytest.mark.parametrize(
    ("world_size", "case"), [(world, i) for world in PLANS for i in range(len(PLANS[world]))]
)
def test_gradients_are_dense_sums(world_size, case):
    run_ranks(_check_step, world_size, case, {}, 1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"activation_checkpointing": True},
        {"tie_word_embeddings": True},
        {"overlap": False},
        {"overlap": False, "activation_checkpointing": True, "tie_word_embeddings": True},
    ],
)
def test_gradients_are_dense_sums_with(options):
    run_ranks(_check_step, 3, 0, options, 1e-12)


def test_only_plans_that_end_together_may_overlap():
    """Every ring's microbatch is the last one on all its ranks or on none."""
    rings = [[0, 1], [0], [1]]

    def ends_together(*microbatches):
        plan = StepPlan.from_lists([8, 4, 4], rings, microbatches, max_tokens_per_rank=8)
        return plan.validate().ends_together

    assert ends_together([[0], [1]], [[0], [2]])
    assert ends_together([[1], [0]], [[2], [0]])
    assert ends_together([[0, 1]], [[0, 2]])
    assert not ends_together([[1], [0]], [[0], [2]])  # rank 0 would reduce in the ring, 1 after it
    assert not ends_together([[0], [1]], [[2], [0]])


# test_no_collective_in_between: _check_step asserts it for every plan above; this test shows that
# the watcher does see collectives.
def _watch(rank, world_size):
    with _Collectives() as collectives:
        x = torch.ones(2)
        dist.all_reduce(x)
        out = torch.empty(2 * world_size)
        dist.all_gather_into_tensor(out, x)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    shard(model, _mesh(world_size), layers=list(model))
    with _Collectives() as gathers:
        unshard_all(model)
    with _Collectives() as again:
        unshard_all(model)
    return collectives.names, gathers.names, again.names


def test_no_collective_in_between():
    for seen, gathers, again in run_ranks(_watch, 2):
        assert len(seen) == 2
        assert len(gathers) == 2 and all("gather" in name for name in gathers)
        assert again == []


def _forget_unshard(rank, world_size):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    shard(model, _mesh(world_size), layers=list(model))
    with pytest.raises(RuntimeError, match=r"first '0'.*unshard_all"):
        set_microbatch(model, reduce=True)
    unshard_all(model)
    set_microbatch(model, reduce=True)
    reshard_all(model)
    with pytest.raises(RuntimeError, match="unshard_all"):
        set_microbatch(model, reduce=False)


def test_forgotten_unshard_is_an_error_not_a_hang():
    run_ranks(_forget_unshard, 2)


# ---- SUM ----


def _frozen_and_forward_only(rank, world_size, frozen):
    """A forward-only phase before a step, and frozen parameters."""
    plan = StepPlan.from_lists(
        [40, 20, 9], [[0, 1], [0], [1]], [[[0], [1]], [[0], [2]]], max_tokens_per_rank=1000
    )
    samples = random_samples(plan.seqlens.tolist())
    model = keep_norms_exact(tiny_model())
    _, expected = _expected_gradients(model, samples, 30)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in name)
    shard(model, _mesh(world_size), activation_checkpointing=True)
    unshard_all(model)
    with torch.no_grad(), _Collectives() as collectives:
        for index in range(2):
            model(pack_rank(plan, rank, samples)[index], RingComm())
    assert collectives.names == []
    reshard_all(model)
    unshard_all(model)
    _backward_all(model, plan, rank, samples, 30, RingComm())
    for name, parameter in model.named_parameters():
        if frozen in name:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(
                parameter.grad.full_tensor(), expected[name], rtol=0, atol=1e-12
            )


@pytest.mark.parametrize("frozen", ["embed", "layers.0", "norm"])
def test_frozen_parameters_and_forward_only_phases(frozen):
    run_ranks(_frozen_and_forward_only, 2, frozen)


def _forgotten_sum(rank, world_size):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    shard(model, _mesh(world_size), layers=list(model))
    check_sharded(model)
    model[1].set_gradient_divide_factor(float(world_size))
    with pytest.raises(AssertionError, match="'1' does not sum gradients"):
        unshard_all(model)
    model[1].set_gradient_divide_factor(1.0)
    model[0].set_force_sum_reduction_for_comms(False)
    with pytest.raises(AssertionError, match="'0' does not sum gradients"):
        unshard_all(model)


def test_every_module_sums():
    run_ranks(_forgotten_sum, 2)


# ---- precision ----


class _Scale(nn.Module):
    """y = weight * x with a single weight, whose gradient is the sum of x."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(1, 1, bias=False)])

    def forward(self, x):
        return self.layers[0](x)


def _many_microbatches(rank, world_size):
    model = shard(_Scale(), _mesh(world_size), param_dtype=torch.bfloat16)
    (parameter,) = model.parameters()
    assert parameter.dtype == torch.float32
    unshard_all(model)
    count = 1000 + rank
    for index in range(count):
        set_microbatch(model, reduce=index == count - 1)
        out = model(torch.ones(1, 1, dtype=torch.bfloat16))
        assert out.dtype == torch.bfloat16
        out.sum().backward()
    return parameter.grad.full_tensor()


def test_bf16_gradients_are_summed_in_fp32():
    """In bf16 a sum of ones would stop at 256; averaging would give half of it."""
    for grad in run_ranks(_many_microbatches, 2):
        assert grad.dtype == torch.float32
        assert grad.tolist() == [[2001.0]]


def _bf16_model(rank, world_size):
    seqlens, rings, microbatches = PLANS[world_size][0]
    plan = StepPlan.from_lists(seqlens, rings, microbatches, max_tokens_per_rank=1000)
    samples = random_samples(seqlens)
    model = tiny_model(dtype=torch.float32)
    _, expected = _expected_gradients(model, samples, 50)
    shard(model, _mesh(world_size), param_dtype=torch.bfloat16, activation_checkpointing=True)
    unshard_all(model)
    _backward_all(model, plan, rank, samples, 50, RingComm())
    got, want = [], []
    for name, parameter in model.named_parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        got.append(parameter.grad.full_tensor().flatten())
        want.append(expected[name].flatten())
    got, want = torch.cat(got), torch.cat(want)
    return ((got - want).norm() / want.norm()).item()


def test_bf16_step_is_close_to_fp32():
    for error in run_ranks(_bf16_model, 3):
        assert 1e-4 < error < 3e-2  # bf16 has 8 bits; the lower bound shows that it ran in bf16
