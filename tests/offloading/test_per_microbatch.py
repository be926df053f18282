"""Offload as planned: the same gradients on fewer ranks, and memory as predicted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hdp.attention.comm import RingComm
from hdp.attention.layout import RingLayout
from hdp.data.pack import Sample, pack_rank
from hdp.distributed.fsdp import shard
from hdp.distributed.mesh import HDPMesh
from hdp.models.causal_lm import transformer_shape
from hdp.offloading.engine import open_engine
from hdp.offloading.per_microbatch import PerMicrobatchOffload
from hdp.scheduler import CostModel, StepPlan, plan
from hdp.scheduler.costs.activation_plan import decoder_classes
from hdp.training.recorder import StepRecorder
from hdp.training.step import StepContext, keep_everything, train_step
from tests.run_ranks import run_ranks
from tests.tiny_models import keep_norms_exact, random_samples, tiny_model
from tests.training.steps import SEQLENS, TakeGradients, dense_step, make_batch

LAYERS = 4  # two of them are always at work


def planned_offload(model, *, host_bytes_per_s=5e9) -> PerMicrobatchOffload:
    shape = transformer_shape(model)
    size = next(model.parameters()).dtype.itemsize
    cost = CostModel.from_transformer(
        **shape, flops_per_s=1e9, host_bytes_per_s=host_bytes_per_s, bytes_per_element=size
    )
    classes = decoder_classes(cost, **shape, bytes_per_element=size)
    engine = open_engine(torch.device("cpu"), max_bytes=64 << 20)
    return PerMicrobatchOffload(engine, cost=cost, classes=classes, min_bytes=64)


def _step(rank, world, capacity):
    """(loss, gradients, plan, LinkStats after) of one step with offload."""
    mesh = HDPMesh.create(device="cpu")
    model = keep_norms_exact(tiny_model(num_hidden_layers=LAYERS))
    offload = planned_offload(model)
    shard(model, mesh.device_mesh)
    comm = RingComm(mesh.hdp_group)
    context = StepContext(
        mesh=mesh,
        model=model,
        optimizer=TakeGradients(model),
        comm=comm,
        recorder=StepRecorder(mesh.hdp_rank, comm),
        offload=offload,
    )
    made = plan(
        SEQLENS, hdp_size=world, max_tokens_per_rank=capacity, cost=offload.cost, offload=True
    )
    result = train_step(context, make_batch(made, rank, random_samples(SEQLENS)))
    stats = offload.engine.stats()
    offload.close()
    return result.loss, context.optimizer.gradients, made, stats


@pytest.mark.parametrize(("world", "capacity"), [(2, 40), (3, 30)])
def test_step_with_offload_equals_dense(world, capacity):
    results = run_ranks(_step, world, capacity)
    loss, gradients, made, _ = results[0]
    assert world * capacity < max(SEQLENS) and made.notes["ranks_saved"] >= 1
    want_loss, want = dense_step(torch.float64, num_hidden_layers=LAYERS)
    assert loss == pytest.approx(want_loss, rel=1e-10)
    for name, value in want.items():
        error = (gradients[name] - value).norm() / value.norm()
        assert error < 1e-10, f"{name}: relative error {error:.2e}"
    for *_, stats in results:
        assert stats.sent_bytes > 0 and stats.in_use_bytes == 0


@pytest.mark.parametrize("host_bytes_per_s", [5e9, 1e5])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
def test_bytes_kept_match_the_plan(ratio, host_bytes_per_s):
    """Counted by the engine, of what an unmodified Llama saves. Over a slow link norms and products
    are recomputed instead."""
    model = tiny_model(dtype=torch.float32, num_hidden_layers=8)
    offload = planned_offload(model, host_bytes_per_s=host_bytes_per_s)
    made = StepPlan.from_lists([256], [[0]], [[[0]]], max_tokens_per_rank=256)
    batch = pack_rank(made, 0, [Sample(input_ids=np.arange(256) % 61)])[0]
    with offload(batch.layout, ratio):
        loss = model(batch, RingComm()).sum()
    counts = offload.engine.counts
    total = counts.sent + counts.kept + counts.recomputed
    assert counts.kept / total == pytest.approx(1 - ratio * 6 / 8, abs=0.04)
    assert (counts.recomputed > 0.1 * total) == (host_bytes_per_s < 1e6)
    loss.backward()
    assert offload.engine.stats().in_use_bytes == 0
    offload.close()


def test_a_ratio_without_an_engine_is_refused():
    layout = RingLayout(local_seqlens=(4,))
    with keep_everything(layout, 0.0):
        pass
    with pytest.raises(ValueError, match=r"ratio 0\.50: give StepContext a PerMicrobatchOffload"):
        keep_everything(layout, 0.5)
