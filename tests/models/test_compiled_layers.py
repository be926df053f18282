"""Compiled layers equal plain ones, with a few graphs shared by all layers and all lengths."""

from __future__ import annotations

import random

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from hdp.attention.comm import RingComm
from hdp.data.pack import pack_rank
from hdp.distributed.fsdp import (
    full_state_dict,
    reduce_gradients,
    set_microbatch,
    shard,
    unshard_all,
)
from hdp.distributed.mesh import HDPMesh
from hdp.models.compiled import compile_layers
from hdp.offloading.context import offload
from hdp.offloading.engine import open_engine
from hdp.offloading.tensors import is_parameter
from hdp.offloading.types import CopyBuffers
from hdp.scheduler import StepPlan
from tests.run_ranks import run_ranks
from tests.tiny_models import local_batch, random_samples, tiny_model


class Counting:
    """A back end that traces, splits forward from backward and runs both, and keeps the graphs."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        return aot_eager(graph, inputs)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def pair(model_type="llama", *, dtype=torch.float32, backend=None, **overrides):
    """(plain model, the same model compiled, its back end)."""
    backend = backend or Counting()
    plain, compiled = (tiny_model(model_type, dtype=dtype, **overrides) for _ in range(2))
    compile_layers(compiled.layers, backend)
    return plain, compiled, backend


def check_equal(plain, compiled, seqlens, *, rtol, context=None):
    """Compare logprobs and all gradients for one packed batch."""
    batch = local_batch(random_samples(seqlens))
    want = plain(batch)
    if context is None:
        got = compiled(batch)
    else:
        with context:
            got = compiled(batch)
    torch.testing.assert_close(got, want, rtol=rtol, atol=rtol)
    weights = torch.linspace(-1, 1, len(got), dtype=got.dtype)
    for model, logprobs in ((plain, want), (compiled, got)):
        model.zero_grad()
        (weights * logprobs).sum().backward()
    for (name, a), b in zip(compiled.named_parameters(), plain.parameters(), strict=True):
        error = (a.grad - b.grad).abs().max() / b.grad.abs().max()
        assert error < rtol, f"{name}: gradients differ by {error:.1e}"


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
def test_equals_plain_layers(model_type):
    plain, compiled, backend = pair(model_type)
    check_equal(plain, compiled, [20, 7, 33], rtol=1e-4)
    assert backend.graphs, "nothing was compiled"


def test_equals_plain_layers_in_half_precision():
    plain, compiled, _ = pair(dtype=torch.bfloat16)
    check_equal(plain, compiled, [20, 7, 33], rtol=5e-2)


def test_lengths_and_layers_share_their_graphs():
    """The first length compiles the graphs; ten other lengths and more layers compile none."""
    counts = []
    for num_layers in (1, 4):
        torch._dynamo.reset()
        _, model, backend = pair(num_hidden_layers=num_layers)
        rng = random.Random(0)
        lengths = [[rng.randint(2, 60) for _ in range(rng.randint(1, 5))] for _ in range(11)]
        for i, seqlens in enumerate(lengths):
            model(local_batch(random_samples(seqlens))).sum().backward()
            if i == 0:
                counts.append(len(backend.graphs))
        assert len(backend.graphs) == counts[-1], f"recompiled for {seqlens} tokens"
    assert counts[0] <= 5 and counts[1] <= counts[0] + 1, f"{counts} graphs for 1 and 4 layers"


def test_graphs_contain_norms_mlp_and_rope():
    _, model, backend = pair()
    model(local_batch(random_samples([20, 7])))
    nodes = [node for graph in backend.graphs for node in graph.graph.nodes]
    called = [str(node.target) for node in nodes if node.op == "call_function"]
    for operation in ("rsqrt", "silu", "neg", "linear"):
        assert any(operation in name for name in called), operation
    assert not any("attention" in name or "hdp" in name for name in called)


@pytest.mark.parametrize(
    "policy",
    [
        {"ratio": 1.0},
        {"ratio": 0.5, "recompute_pointwise": 1.0, "recompute_matmul": 1.0},
    ],
)
def test_saved_tensors_of_graphs_are_offloaded(policy):
    plain, compiled, _ = pair()
    buffers = CopyBuffers(send_bytes=1 << 16, keep_bytes=1 << 10, prefetch_bytes=1 << 14)
    engine = open_engine(torch.device("cpu"), max_bytes=1 << 28, buffers=buffers)
    try:
        for seqlens in ([64, 90], [30, 40, 51]):
            context = offload(**policy, min_bytes=1024, engine=engine)
            check_equal(plain, compiled, seqlens, rtol=1e-4, context=context)
        assert engine.counts.sent > 0
    finally:
        engine.close()


def _train_step(rank, world_size, compiled, checkpointing):
    """Gradients of a ring over both ranks plus local sequences; rank 0 has two microbatches."""
    model = tiny_model(dtype=torch.float32)
    backend = Counting()
    if compiled:
        compile_layers(model.layers, backend)
    seqlens = [40, 9, 21, 33]
    plan = StepPlan.from_lists(
        seqlens, [[0, 1], [0], [1], [0]], [[[0, 1], [3]], [[0, 2]]], max_tokens_per_rank=64
    )
    samples = random_samples(seqlens)
    with HDPMesh.create(device="cpu") as mesh:
        shard(model, mesh.device_mesh, activation_checkpointing=checkpointing)
        comm = RingComm(mesh.hdp_group, mesh.device)
        unshard_all(model)
        for i in range(len(plan.microbatches(rank))):
            set_microbatch(model, reduce=False)
            model(pack_rank(plan, rank, samples)[i], comm).sum().backward()
        reduce_gradients(model)
        for parameter in model.parameters():
            parameter.data.copy_(parameter.grad)
        assert bool(backend.graphs) == compiled
        return full_state_dict(model)


def test_sharded_ring_with_checkpointing():
    want = run_ranks(_train_step, 2, False, False)[0]
    got = run_ranks(_train_step, 2, True, True)[0]
    for name, gradient in want.items():
        error = (got[name] - gradient).abs().max() / gradient.abs().max()
        assert error < 1e-4, f"{name}: gradients differ by {error:.1e}"


@pytest.mark.slow
def test_inductor_equals_plain_layers():
    plain, compiled, _ = pair(backend="inductor")
    for seqlens in ([20, 7, 33], [11, 50]):
        check_equal(plain, compiled, seqlens, rtol=1e-4)


def _kept_bytes(model, num_tokens):
    """Bytes that autograd keeps for backward: each storage counted once, parameters excluded."""
    kept = {}

    def pack(x):
        if not is_parameter(x):
            kept[x.untyped_storage().data_ptr()] = (x.untyped_storage().nbytes(), x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        logprobs = model(local_batch(random_samples([num_tokens])))
    assert logprobs.requires_grad
    return sum(num_bytes for num_bytes, _ in kept.values())


@pytest.mark.slow
def test_layers_keep_less_for_backward():
    """At the shape of LLaMA-3-8B's layers, scaled down 8x in each dimension: 0.69 of the bytes."""
    per_layer = {}
    shape = {"hidden_size": 512, "intermediate_size": 1792, "num_attention_heads": 8}
    for name in ("plain", "compiled"):
        sizes = []
        for num_layers in (1, 3):
            torch._dynamo.reset()
            model = tiny_model(dtype=torch.bfloat16, num_hidden_layers=num_layers, **shape)
            if name == "compiled":
                compile_layers(model.layers)
            sizes.append(_kept_bytes(model, 128))
        per_layer[name] = (sizes[1] - sizes[0]) / 2
    assert per_layer["compiled"] < 0.72 * per_layer["plain"], per_layer


@pytest.mark.gpu
def test_gpu_inductor_equals_plain_layers():
    plain, compiled, _ = pair(backend="inductor")
    batch = local_batch(random_samples([20, 7, 33])).to(torch.device("cuda"))
    torch.testing.assert_close(compiled.cuda()(batch), plain.cuda()(batch), rtol=1e-4, atol=1e-4)
